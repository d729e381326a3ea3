"""All runs on this machine, one after another or several at a time."""

import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.studies.execute import Interrupted, Processes, RunFailed, execute, prepare
from rfa_mmdet.studies.folders import Folder
from rfa_mmdet.studies.spec import Run, Spec

Say = Callable[[Run, str], None]


def places(jobs: int) -> list[dict[str, str]]:
    """Return what the processes of each of several runs at a time find in their environment.

    Args:
        jobs (int): Runs at a time.

    Returns:
        list[dict[str, str]]: One GPU each, of those that CUDA_VISIBLE_DEVICES leaves; where there
        are fewer, several share one. Without GPUs, an equal share of the cores, unless
        OMP_NUM_THREADS is set.

    Raises:
        ConfigError: ``jobs`` is not positive.

    Example:
        >>> len(places(1))
        1
    """
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}: must be at least 1")
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[i % gpus].strip()} for i in range(jobs)]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{} for _ in range(jobs)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [{"OMP_NUM_THREADS": str(max(1, (cores or 1) // jobs))} for _ in range(jobs)]


def run_all(
    spec: Spec, work_dir: str | os.PathLike, tools: Path, jobs: int = 1, say: Say = lambda *_: None
) -> dict[Run, str]:
    """Do all that is left to do; what fails does not stop the rest.

    Args:
        spec (Spec): What is compared.
        work_dir (str | os.PathLike): Where to write.
        tools (Path): Folder of train.py and test.py.
        jobs (int): Runs at a time. Defaults to 1.
        say (Callable): Told of each run what becomes of it.

    Returns:
        dict[Run, str]: What went wrong, by run.

    Raises:
        ConfigError: A folder holds a run with another config; nothing is started then.
        KeyboardInterrupt: By Ctrl-C or SIGTERM; the processes have been ended.
    """
    free: queue.SimpleQueue = queue.SimpleQueue()
    for place in places(jobs):
        free.put(place)
    for run in spec.runs():
        prepare(spec, run, Folder(work_dir, run))
    failed: dict[Run, str] = {}
    processes = Processes()

    def one(run: Run) -> None:
        place = free.get()
        try:
            say(run, "started")
            execute(spec, run, work_dir, tools, {**os.environ, **place}, processes)
            say(run, "finished")
        except Interrupted:
            pass
        except (RunFailed, UserError) as error:
            failed[run] = str(error)
            say(run, f"failed: {error}")
        finally:
            free.put(place)

    with ThreadPoolExecutor(jobs) as pool, _ending(processes):
        for stage in spec.stages:
            left = []
            for run in spec.runs(stage):
                if Folder(work_dir, run).finished:
                    say(run, "was finished before")
                else:
                    left.append(run)
            waiting = {pool.submit(one, run) for run in left}
            try:
                while waiting:
                    # Waking up now and then is what lets signals through.
                    done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            except BaseException:
                for future in waiting:
                    future.cancel()
                processes.end()
                raise
    return failed


@contextmanager
def _ending(processes: Processes):
    """Have SIGTERM do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        processes.end()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
