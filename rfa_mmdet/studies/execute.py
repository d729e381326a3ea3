"""One run: tools/train.py, then tools/test.py, each in a process of its own."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config

from rfa_mmdet.errors import ConfigError
from rfa_mmdet.studies.folders import Folder
from rfa_mmdet.studies.spec import Run, Spec


class RunFailed(Exception):
    """A run, or what it starts from, has failed; the message says how."""


class Interrupted(Exception):
    """A run was ended by this program, to go on another time."""


class Processes:
    """The processes of all runs at work, to be ended together."""

    def __init__(self) -> None:
        self.ended = False
        self._running: set[int] = set()

    def wait(self, process: subprocess.Popen) -> tuple[int, Any]:
        """Wait for a process; return its exit code and what it has used of the machine."""
        self._running.add(process.pid)
        if self.ended:
            self.end()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            self.end()
            raise
        finally:
            self._running.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage

    def end(self) -> None:
        """End all, and those to come."""
        self.ended = True
        for pid in tuple(self._running):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def execute(
    spec: Spec,
    run: Run,
    work_dir: str | os.PathLike,
    tools: Path,
    environment: Mapping[str, str] | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Do what is left of a run.

    A training that was broken off goes on from its last checkpoint.

    Args:
        spec (Spec): What is compared.
        run (Run): Of it.
        work_dir (str | os.PathLike): Of the whole comparison.
        tools (Path): Folder of train.py and test.py.
        environment (Mapping[str, str] | None): Of the processes. Defaults to this one's.
        processes (Processes | None): Through which another thread can end the run.

    Returns:
        dict[str, Any]: The record of the run.

    Raises:
        RunFailed: A step has failed; that is recorded as well.
        Interrupted: ``processes`` were ended.
        ConfigError: The folder holds a run with another config.
        UserError: Another process is at work on the run.
    """
    folder = Folder(work_dir, run)
    cfg = prepare(spec, run, folder)
    if folder.finished:
        return folder.record
    with folder.locked() as lock:
        folder.forget_failure()
        try:
            _load_from(spec, run, work_dir, cfg)
            _write_config(folder, cfg)
            start = dict(folder=folder, lock=lock, environment=environment)
            start["processes"] = processes or Processes()
            if "train" not in folder.record:
                _train(tools, **start)
            _test(tools, spec.checkpoint, **start)
        except RunFailed as error:
            folder.fail(dict(error=str(error), log=str(folder.log)))
            raise
    return folder.record


def prepare(spec: Spec, run: Run, folder: Folder) -> Config:
    """Return the config of a run.

    Args:
        spec (Spec): What is compared.
        run (Run): Of it.
        folder (Folder): Of the run.

    Raises:
        ConfigError: The folder holds a run with another config.
    """
    cfg = spec.config(run)
    if not folder.config.is_file():
        return cfg
    old = Config.fromfile(folder.config).to_dict()
    new = json.loads(json.dumps(cfg.to_dict(), default=str))
    old = json.loads(json.dumps(old, default=str))
    old.pop("load_from", None), new.pop("load_from", None)  # a path, checked by the spec's stages
    if old != new:
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        raise ConfigError(
            f"{folder.path}: holds a run with another config (other: {', '.join(changed)}); name "
            "another --work-dir, or delete the folder"
        )
    return cfg


def _load_from(spec: Spec, run: Run, work_dir: str | os.PathLike, cfg: Config) -> None:
    source = spec.source(run)
    if source is None:
        return
    before = Folder(work_dir, source)
    path = before.checkpoint(spec.checkpoint)
    if not before.finished or path is None:
        raise RunFailed(f"{source}, which it starts from, is not finished")
    cfg.load_from = str(path.resolve())


def _write_config(folder: Folder, cfg: Config) -> None:
    if not folder.config.is_file():
        part = folder.config.with_name("writing_config.py")
        cfg.dump(part)
        part.replace(folder.config)


def _train(tools: Path, folder: Folder, **start: Any) -> None:
    command = [tools / "train.py", folder.config, "--work-dir", folder.train]
    if folder.checkpoint("last"):
        command += ["--resume", "auto"]
    seconds, peak = _start(command, folder, **start)
    times = [line["time"] for line in folder.scalars() if "loss" in line and "time" in line]
    cuda = [line["memory"] for line in folder.scalars() if "loss" in line and "memory" in line]
    folder.add(
        "train",
        dict(
            seconds=seconds,
            # The first of a process compiles, fills caches and waits for workers.
            iteration_seconds=statistics.median(times[1:] or times) if times else None,
            # MMEngine logs what CUDA has reserved at most, in MB, where there is CUDA.
            memory_mb=max(cuda) if cuda else peak,
            memory_of="CUDA" if cuda else "process",
        ),
    )


def _test(tools: Path, which: str, folder: Folder, **start: Any) -> None:
    checkpoint = folder.checkpoint(which)
    if checkpoint is None:
        raise RunFailed(f"training has left no {which} checkpoint in {folder.train}")
    command = [tools / "test.py", folder.config, checkpoint, "--work-dir", folder.test]
    part = folder.test / "writing_predictions.pkl"
    folder.test.mkdir(parents=True, exist_ok=True)
    seconds, _ = _start([*command, "--out", part], folder, **start)
    logs = sorted(folder.test.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    if not logs or not part.is_file():
        raise RunFailed(f"tools/test.py has left no metrics in {folder.test}")
    part.replace(folder.predictions)
    metrics = json.loads(logs[-1].read_text())
    folder.add(
        "test",
        dict(
            checkpoint=checkpoint.name,
            seconds=seconds,
            metrics={k: v for k, v in metrics.items() if k not in ("time", "data_time")},
        ),
    )


def _start(
    command: list[Any],
    folder: Folder,
    lock: int,
    environment: Mapping[str, str] | None,
    processes: Processes,
) -> tuple[float, float]:
    """Run a tool to its end; return seconds, and the process's peak memory in MB."""
    command = [sys.executable, *map(str, command)]
    begin = time.monotonic()
    with open(folder.log, "a", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        at = log.tell()
        process = subprocess.Popen(
            command,
            env=dict(environment or os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
        )
        code, usage = processes.wait(process)
    if processes.ended:
        raise Interrupted(str(folder.path))
    if code:
        raise RunFailed(_what_happened(Path(command[1]).name, code, folder.log, at))
    # Kilobytes on Linux, bytes on macOS.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return time.monotonic() - begin, usage.ru_maxrss / unit


def _what_happened(tool: str, code: int, log: Path, at: int) -> str:
    with open(log, "rb") as file:
        file.seek(at)
        lines = file.read().decode(errors="replace").strip().splitlines()
    if code < 0:
        return f"tools/{tool} was ended by signal {-code}"
    said = [line.strip() for line in lines if "error: " in line.lower()]
    return f"tools/{tool} ended with code {code}: {(said or lines or ['it said nothing'])[-1]}"
