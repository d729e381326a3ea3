"""Execute one run: a training, then a test, each in its own process."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from mmengine.config import Config

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.run import Run, missing_metric
from rfa_mmdet.studies.study import Study


class RunFailed(UserError):
    """A run, or the one it starts from, has failed."""


class Interrupted(Exception):
    """This program stopped a run, which can be resumed later."""


class Processes:
    """The processes of all current runs, which can be stopped together."""

    def __init__(self) -> None:
        self.ended = False
        self._running: set[int] = set()

    def run(self, command: Sequence[str], **options: Any) -> tuple[int, float]:
        """Run a process; return its exit status and its peak memory in MB."""
        process = subprocess.Popen(command, **options)
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
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, kilobytes on Linux
        return process.returncode, usage.ru_maxrss / unit

    def end(self) -> None:
        """Stop all processes, including any that start later."""
        self.ended = True
        for pid in tuple(self._running):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def execute(
    study: Study,
    run: Run,
    environment: Mapping[str, str] | None = None,
    processes: Processes | None = None,
) -> None:
    """Execute the remaining steps of a run; an interrupted training resumes.

    Args:
        study (Study): The study.
        run (Run): One of its runs.
        environment (Mapping[str, str] | None): Environment variables of the processes. Defaults to
            None: those of this process.
        processes (Processes | None): Lets another thread stop the run. Defaults to None.

    Raises:
        RunFailed: A step failed; this is also recorded.
        Interrupted: ``processes`` were stopped.
        ConfigError: The run's folder contains another config, or a run that is outdated.
        UserError: Another process is working on the run.
    """
    cfg = run_config(study, run)
    if run.finished:
        return
    with run.locked() as lock:
        if run.finished:  # by another process, while this one waited
            return

        def tool(*arguments: Any) -> float:
            options = dict(env=environment, pass_fds=(lock,))
            return _run_tool(run, arguments, processes or Processes(), options)

        run.update(error=None)
        try:
            cfg.load_from = _start_checkpoint(study, run) or cfg.get("load_from")
            if not run.config.is_file():
                with written_whole(run.config) as part:
                    cfg.dump(part)
            if "train" not in run.record:
                source = study.source(run)
                names = dict(id=uuid4().hex, source=training_id(source) if source else None)
                run.update(train=dict(_train(run, tool), **names))
            run.update(test=_test(run, study, tool))
        except RunFailed as error:
            run.update(error=str(error))
            raise


def run_config(study: Study, run: Run) -> Config:
    """Return the config of a run.

    Raises:
        ConfigError: The run's folder contains a run with another config, from an earlier training
            of the run that it starts from, or with a test of another checkpoint.
    """
    cfg = study.config(run)
    if not run.config.is_file():
        return cfg
    old, new = (
        json.loads(json.dumps(one.to_dict(), default=str))
        for one in (Config.fromfile(run.config, import_custom_modules=False), cfg)
    )
    source, start = study.source(run), old.get("load_from")
    # The work dir may have moved: only compare <stage>/<method>/<seed> of the source.
    if source and start and Path(start).parts[-5:-2] == source.folder.parts[-3:]:
        new["load_from"] = start
    changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
    if changed:
        raise ConfigError(
            f"{run.folder}: contains a run with another config (different: {', '.join(changed)}); "
            "choose another --work-dir, or delete the folder"
        )
    if outdated := _outdated(study, run):
        raise ConfigError(
            f"{run.folder}: {outdated}; choose another --work-dir, or delete the folder"
        )
    return cfg


def training_id(run: Run) -> str | None:
    """Return what identifies the training of a run; None if it is not known."""
    return run.record.get("train", {}).get("id")


def _outdated(study: Study, run: Run) -> str | None:
    """Say why a finished run is no longer one of the study, although its config is."""
    tested = run.record.get("test", {}).get("checkpoint")
    if tested not in (None, study.checkpoint):
        return f"tested the {tested} checkpoint, but the spec has checkpoint={study.checkpoint!r}"
    source, started = study.source(run), run.record.get("train", {}).get("source")
    if source and started and training_id(source) not in (None, started):
        return f"was started from an earlier training of {source}"
    return None


def _start_checkpoint(study: Study, run: Run) -> str | None:
    source = study.source(run)
    if source is None:
        return None
    path = source.checkpoint(study.checkpoint, study.metric)
    if not source.finished:
        raise RunFailed(f"starts from {source}, which is not finished")
    if path is None:
        raise RunFailed(f"starts from {source}, which has no checkpoint in {source.folder}")
    return str(path.resolve())


def _train(run: Run, tool: Callable[..., float]) -> dict[str, Any]:
    start = run.resumable_checkpoint()
    resume = ("--resume", start) if start else ()
    peak = tool("train", run.config, "--work-dir", run.folder / "train", *resume)
    # With CUDA, MMEngine logs the peak of reserved memory in MB.
    cuda = [line["memory"] for line in run.scalars() if "memory" in line]
    return dict(memory_mb=max(cuda, default=peak))


def _test(run: Run, study: Study, tool: Callable[..., float]) -> dict[str, Any]:
    which = study.checkpoint
    checkpoint = run.checkpoint(which, study.metric)
    if checkpoint is None:
        raise RunFailed(f"the training left no {which} checkpoint in {run.folder / 'train'}")
    work_dir = run.folder / "test"
    # Only detections can be drawn, so studies of other models have no samples.
    out = ("--out", run.predictions) if study.samples else ()
    tool("test", run.config, checkpoint, "--work-dir", work_dir, *out)
    logs = sorted(work_dir.glob("*/*.json"), key=lambda log: log.stat().st_mtime)
    if not logs:
        raise RunFailed(f"the test left no metrics in {work_dir}")
    logged = json.loads(logs[-1].read_text())
    metrics = {k: v for k, v in logged.items() if k not in ("time", "data_time")}
    if not metrics and study.metric.startswith("coco/"):
        metrics[study.metric] = 0.0  # CocoMetric reports nothing if nothing was detected
    if missing := missing_metric(study.metric, metrics):
        raise RunFailed(missing)
    return dict(metrics=metrics, checkpoint=which)


def _run_tool(run: Run, arguments: Sequence, processes: Processes, options: dict) -> float:
    """Run a tool, with output to the run's log; return its peak memory in MB."""
    command = [sys.executable, "-m", "rfa_mmdet", *map(str, arguments)]
    path = run.folder / "log.txt"
    with open(path, "ab") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        own = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        code, peak = processes.run(command, **own, **options)
    if processes.ended:
        raise Interrupted
    if code < 0:
        raise RunFailed(f"{arguments[0]} was killed by signal {-code}")
    if code:
        lines = path.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        errors = [line.strip() for line in lines if "error: " in line.lower()]
        reason = (errors or lines or ["no output"])[-1]
        raise RunFailed(f"{arguments[0]} failed with exit code {code}: {reason}")
    return peak
