"""One run and its folder.

<work dir>/runs/<stage>/<method>/seed<n>/
config.py     complete config
train/        work dir of the training
test/         work dir of the test, with predictions.pkl if the report has samples
log.txt       output of both
record.json   finished steps, {"train": {...}, "test": {...}}, and the "error" of the last attempt

A training has an "id". A run that starts from another one records its id as "source".
"""

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

# Dataloader workers inherit the lock of their training. If that was killed, they exit within 5
# seconds, or later on a busy machine.
LOCK_TIMEOUT = 30.0


@dataclass(frozen=True)
class Run:
    """One training and one test.

    Attributes:
        work_dir (Path): Work dir of the study.
        stage, method (str): Names of its stage and method.
        seed (int): Seed of all random numbers.

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
        """Folder of the run."""
        return self.work_dir / "runs" / str(self)

    @property
    def config(self) -> Path:
        """File with the complete config."""
        return self.folder / "config.py"

    @property
    def predictions(self) -> Path:
        """File with the detections on the test images."""
        return self.folder / "test" / "predictions.pkl"

    @property
    def record(self) -> dict[str, Any]:
        """Record of the finished steps; empty if there is none."""
        return read_json(self.folder / "record.json") or {}

    @property
    def finished(self) -> bool:
        """Whether all steps are finished."""
        return {"train", "test"} <= self.record.keys()

    def update(self, **content: Any) -> None:
        """Update entries of the record."""
        write_json(self.folder / "record.json", {**self.record, **content})

    def checkpoint(self, which: str, metric: str = "") -> Path | None:
        """Return the 'last' or 'best' checkpoint, if there is one.

        Args:
            which (str): 'last' or 'best'.
            metric (str): The one to choose if there are best checkpoints of several metrics.
        """
        train = self.folder / "train"
        if which == "best":
            found = list(train.glob("best_*.pth"))
            pattern = rf"best_{re.escape(metric.replace('/', '_'))}_(epoch|iter)_\d+\.pth"
            own = [path for path in found if re.fullmatch(pattern, path.name)]
            return max(own or found, key=lambda path: path.stat().st_mtime, default=None)
        try:
            # Only the name: the path in it is relative to where the training was started.
            path = train / Path((train / "last_checkpoint").read_text().strip()).name
        except FileNotFoundError:
            return None
        return path if path.is_file() else None

    def resumable_checkpoint(self) -> Path | None:
        """Return the last checkpoint of a validated epoch, or else the last one, if there is one.

        MMEngine saves an epoch before it validates it, and a resumed training does not go back. If
        it was killed in between, the epoch could not be chosen as the best.
        """
        train = self.folder / "train"
        validated = [line["step"] for line in self.scalars() if "loss" not in line]
        saved = [epoch for epoch in validated if (train / f"epoch_{epoch}.pth").is_file()]
        return train / f"epoch_{max(saved)}.pth" if saved else self.checkpoint("last")

    def scalars(self) -> list[dict[str, Any]]:
        """Return the training's logged scalars, oldest first, including those before a resume."""
        lines = []
        for path in sorted(self.folder.glob("train/*/vis_data/scalars.json")):
            for line in path.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # truncated when the process was killed
                    continue
        return lines

    def keep_scalars(self, lines: list[dict[str, Any]]) -> None:
        """Write scalars where a training would log them, as older than those of any training."""
        folder = self.folder / "train" / "0_taken" / "vis_data"
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / "scalars.json").write_text(text, encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other processes out of this run.

        Yields:
            int: A file descriptor. Child processes that inherit it also hold the lock, so a
            training that outlives its parent is not started again.

        Raises:
            UserError: Another process still works on this run after ``LOCK_TIMEOUT`` seconds.
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


def missing_metric(metric: str, metrics: dict[str, Any]) -> str | None:
    """Say that a test does not report the metric to compare; None if it does."""
    if metric in metrics:
        return None
    return f"metric={metric!r}: the test only reports {', '.join(metrics) or 'nothing'}"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with written_whole(path) as part:
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
