"""All that the runs have left, as one dict that JSON can hold."""

import math
import os
from pathlib import Path
from typing import Any

from rfa_mmdet.errors import UserError
from rfa_mmdet.studies.folders import Folder, read_json, write_json
from rfa_mmdet.studies.spec import Run, Spec

POINTS = 200  # of a curve of losses


def collect(spec: Spec, work_dir: str | os.PathLike, costs: dict[str, Any]) -> dict[str, Any]:
    """Gather the records of all runs, and write results.json.

    Args:
        spec (Spec): What is compared.
        work_dir (str | os.PathLike): Of the comparison.
        costs (dict): Of the methods.

    Returns:
        dict[str, Any]: ``name``, ``metric``, ``baseline``, ``methods``, ``stages``, ``costs``
        and ``runs``, a list of dicts as :func:`read_run` returns them.
    """
    results = dict(
        name=spec.name,
        metric=spec.metric,
        baseline=spec.baseline,
        checkpoint=spec.checkpoint,
        methods=list(spec.methods),
        stages=[
            dict(name=s.name, methods=list(s.methods), seeds=list(s.seeds), load_from=s.load_from)
            for s in spec.stages
        ],
        costs=costs,
        runs=[read_run(spec, run, work_dir) for run in spec.runs()],
    )
    write_json(Path(work_dir, "results.json"), results)
    return results


def stored(work_dir: str | os.PathLike) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        work_dir (str | os.PathLike): Of the comparison.

    Raises:
        UserError: There is none.
    """
    results = read_json(Path(work_dir, "results.json"))
    if results is None:
        raise UserError(f"{work_dir}: no run of this spec has been started there")
    return results


def read_run(spec: Spec, run: Run, work_dir: str | os.PathLike) -> dict[str, Any]:
    """Return what is known of a run.

    Args:
        spec (Spec): What is compared.
        run (Run): Of it.
        work_dir (str | os.PathLike): Of the comparison.

    Returns:
        dict[str, Any]: ``stage``, ``method``, ``seed``; ``state``: 'finished', 'failed',
        'started' or 'missing'; ``error`` of a failed one; ``test`` (the metric), ``metrics`` (all);
        ``curve``, [epoch, metric] of the validations, ``val``, the last of them; ``losses``,
        [iteration, loss]; ``iteration_seconds``, ``memory_mb``, ``memory_of``.
    """
    folder = Folder(work_dir, run)
    record, failure = folder.record, folder.failure
    state = "started" if folder.config.is_file() else "missing"
    if folder.finished:
        state, failure = "finished", None
    elif failure:
        state = "failed"
    # Where a resumed training repeats an epoch, the later line counts.
    curve, losses = {}, {}
    for line in folder.scalars():
        if spec.metric in line:
            curve[line["step"]] = _number(line[spec.metric])
        elif "loss" in line:
            losses[line["step"]] = _number(line["loss"])
    metrics = record.get("test", {}).get("metrics", {})
    if state == "finished" and spec.metric not in metrics:
        state = "failed"
        failure = dict(
            error=f"metric={spec.metric!r} is not what the test gives: {', '.join(metrics)}"
        )
    train = record.get("train", {})
    return dict(
        stage=run.stage,
        method=run.method,
        seed=run.seed,
        state=state,
        error=failure["error"] if failure else None,
        test=_number(metrics.get(spec.metric)),
        metrics={k: _number(v) for k, v in metrics.items()},
        val=list(curve.values())[-1] if curve else None,
        curve=[[step, value] for step, value in sorted(curve.items())],
        losses=_thinned([[step, value] for step, value in sorted(losses.items())]),
        iteration_seconds=train.get("iteration_seconds"),
        memory_mb=train.get("memory_mb"),
        memory_of=train.get("memory_of"),
    )


def _number(value: Any) -> float | None:
    """Return a float that JSON knows."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _thinned(points: list) -> list:
    return points[:: max(1, math.ceil(len(points) / POINTS))]
