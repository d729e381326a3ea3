"""What a run leaves in its folder, and what can be read from it.

<work dir>/runs/<stage>/<method>/seed<n>/
config.py     the whole config
train/        work dir of tools/train.py
test/         work dir of tools/test.py
log.txt       what both printed
record.json   what is done: {"train": {...}, "test": {...}}
failed.json   what went wrong in the last try
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.spec import Run


class Folder:
    """Of a run.

    Args:
        work_dir (str | os.PathLike): Of the whole comparison.
        run (Run): Whose.
    """

    def __init__(self, work_dir: str | os.PathLike, run: Run) -> None:
        self.path = Path(work_dir, "runs", str(run))
        self.config = self.path / "config.py"
        self.train = self.path / "train"
        self.test = self.path / "test"
        self.log = self.path / "log.txt"
        self.predictions = self.test / "predictions.pkl"

    @property
    def record(self) -> dict[str, Any]:
        """What is done, by step; empty if nothing is."""
        return read_json(self.path / "record.json") or {}

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return {"train", "test"} <= self.record.keys()

    @property
    def failure(self) -> dict[str, Any] | None:
        """What went wrong in the last try; None if nothing did."""
        return read_json(self.path / "failed.json")

    def add(self, step: str, content: dict[str, Any]) -> None:
        """Record that a step is done."""
        write_json(self.path / "record.json", {**self.record, step: content})

    def fail(self, content: dict[str, Any]) -> None:
        """Record what went wrong."""
        write_json(self.path / "failed.json", content)

    def forget_failure(self) -> None:
        """Remove the record of what went wrong."""
        (self.path / "failed.json").unlink(missing_ok=True)

    def checkpoint(self, which: str) -> Path | None:
        """Return the last checkpoint or the best; None if there is none.

        Args:
            which (str): 'last' or 'best'.
        """
        if which == "best":
            best = sorted(self.train.glob("best_*.pth"), key=lambda path: path.stat().st_mtime)
            return best[-1] if best else None
        try:
            # By name: what is written there depends on the folder that training was started in.
            path = self.train / Path((self.train / "last_checkpoint").read_text().strip()).name
        except FileNotFoundError:
            return None
        return path if path.is_file() else None

    def scalars(self) -> list[dict[str, Any]]:
        """Return what training has logged, oldest first, over all times that it was resumed."""
        lines = []
        for path in sorted(self.train.glob("*/vis_data/scalars.json")):
            for line in path.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # cut off when the process was killed
                    continue
        return lines

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other processes out of this run.

        Yields:
            int: A file descriptor. Processes that inherit it hold the lock, too: a training that
            has outlived whoever started it is not started a second time.

        Raises:
            UserError: Another process is at work on it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.path}: another process is at work on this run") from error
            yield descriptor
        finally:
            os.close(descriptor)


def read_json(path: Path) -> Any:
    """Return a JSON file's content; None if there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, as a whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
