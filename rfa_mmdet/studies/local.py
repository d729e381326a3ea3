"""Execute all runs on this machine, one after another or in parallel."""

import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from rfa_mmdet.cpus import available_cpus
from rfa_mmdet.errors import UserError
from rfa_mmdet.studies.execute import Interrupted, Processes, execute, run_config
from rfa_mmdet.studies.run import Run
from rfa_mmdet.studies.study import Study


def worker_environments(jobs: int) -> list[dict[str, str]]:
    """Return the environment variables of each parallel run.

    Args:
        jobs (int): Number of parallel runs, at least 1.

    Returns:
        list[dict[str, str]]: One GPU each, shared if there are too few. Without GPUs, an equal
        share of the cores, unless OMP_NUM_THREADS is set.

    Example:
        >>> len(worker_environments(2))
        2
    """
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": names[i % gpus].strip()} for i in range(jobs)]
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * jobs
    return [{"OMP_NUM_THREADS": str(max(1, available_cpus() // jobs))}] * jobs


def run_all(
    study: Study,
    jobs: int = 1,
    report: Callable[[Run, str], None] = lambda run, state: None,
) -> dict[Run, str]:
    """Execute all remaining runs; a failed run does not stop the others.

    Args:
        study (Study): The study.
        jobs (int): Number of parallel runs. Defaults to 1.
        report (Callable): Called with each run and its new state. Defaults to doing nothing.

    Returns:
        dict[Run, str]: Failed run -> reason.

    Raises:
        ConfigError: A folder contains a run with another config; no run has been started.
        KeyboardInterrupt: The processes have been stopped.
    """
    for run in study.runs():
        run_config(study, run)
    free: queue.SimpleQueue = queue.SimpleQueue()
    for variables in worker_environments(jobs):
        free.put(variables)
    failed: dict[Run, str] = {}
    processes = Processes()

    def one(run: Run) -> None:
        if run.finished:
            report(run, "already finished")
            return
        variables = free.get()
        try:
            report(run, "started")
            execute(study, run, {**os.environ, **variables}, processes)
            report(run, "finished")
        except Interrupted:
            pass
        except UserError as error:
            failed[run] = str(error)
            report(run, f"failed: {error}")
        finally:
            free.put(variables)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for stage in study.stages:
                for future in [pool.submit(one, run) for run in study.runs(stage)]:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return failed
