"""One run, and its folder.

<work dir>/runs/<stage>/<method>/seed<n>/
config.py     the complete config
train/        work dir of the training
test/         work dir of the test, with predictions.pkl
log.txt       what both printed
record.json   what is done, {"train": {...}, "test": {...}}, and the "error" of the last attempt
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

# Loader workers hold the lock of the training that forked them. Where that was killed, they notice
# within 5 seconds, or later on a busy machine.
LOCK_TIMEOUT = 30.0


@dataclass(frozen=True)
class Run:
    """One training and one test.

    Attributes:
        work_dir (Path): Of the whole study.
        stage, method (str): Names.
        seed (int): Of all random numbers.

    Example:
        >>> run = Run(Path("work_dirs/some"), "scratch", "rfaconv", 1)
        >>> str(run), run.finished
        ('scratch/rfaconv/seed1', False)
    """

    work_dir: Path
    stage: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.method}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where everything of it is."""
        return self.work_dir / "runs" / str(self)

    @property
    def config(self) -> Path:
        """The file of its complete config."""
        return self.folder / "config.py"

    @property
    def predictions(self) -> Path:
        """The file of its detections on the test images."""
        return self.folder / "test" / "predictions.pkl"

    @property
    def record(self) -> dict[str, Any]:
        """What is known of each step; empty if nothing is."""
        return read_json(self.folder / "record.json") or {}

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return {"train", "test"} <= self.record.keys()

    def update(self, **content: Any) -> None:
        """Write entries of the record."""
        write_json(self.folder / "record.json", {**self.record, **content})

    def checkpoint(self, which: str) -> Path | None:
        """Return the 'last' or the 'best' checkpoint, if there is one."""
        train = self.folder / "train"
        if which == "best":
            return max(train.glob("best_*.pth"), key=lambda p: p.stat().st_mtime, default=None)
        try:
            # Only the name: the path written there is relative to where the training was started.
            path = train / Path((train / "last_checkpoint").read_text().strip()).name
        except FileNotFoundError:
            return None
        return path if path.is_file() else None

    def scalars(self) -> list[dict[str, Any]]:
        """Return what the training has logged, oldest first, including before it was resumed."""
        lines = []
        for path in sorted(self.folder.glob("train/*/vis_data/scalars.json")):
            for line in path.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # cut short when the process was killed
                    continue
        return lines

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other processes out of this run.

        Yields:
            int: A file descriptor. Child processes that inherit it hold the lock too, so a training
            that outlives its parent is not started a second time.

        Raises:
            UserError: Another process is working on this run, and still is after ``LOCK_TIMEOUT``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            until = time.monotonic() + LOCK_TIMEOUT
            while not _lock(descriptor):
                if time.monotonic() > until:
                    raise UserError(f"{self.folder}: another process is working on this run")
                time.sleep(0.1)
            yield descriptor
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, as a whole or not at all."""
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
