"""Collect the results of all runs in results.json."""

import math
import re
from dataclasses import asdict
from typing import Any

from rfa_mmdet.errors import ConfigError
from rfa_mmdet.studies.execute import run_config
from rfa_mmdet.studies.run import Run, missing_metric, write_json
from rfa_mmdet.studies.study import Study
from rfa_mmdet.studies.taken import fingerprint

POINTS = 200  # maximum number of points of a loss curve


def collect(study: Study, costs: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
    """Collect the records of all runs, and write results.json.

    Returns:
        dict[str, Any]: The study's ``name``, ``metric``, ``baseline``, ``checkpoint``, ``methods``
        and ``stages``; ``costs`` and ``samples``; and ``runs``, see :func:`read_run`, each
        with its ``fingerprint``, see :func:`~rfa_mmdet.studies.taken.fingerprint`.
    """
    results = dict(
        name=study.name,
        metric=study.metric,
        baseline=study.baseline,
        checkpoint=study.checkpoint,
        methods=list(study.methods),
        stages=list(map(asdict, study.stages.values())),
        costs=costs,
        samples=samples,
        runs=[
            dict(read_run(study, run), fingerprint=fingerprint(study, run)) for run in study.runs()
        ],
    )
    write_json(study.work_dir / "results.json", results)
    return results


def read_run(study: Study, run: Run) -> dict[str, Any]:
    """Return the results of a run.

    Returns:
        dict[str, Any]: ``stage``, ``method``, ``seed``; ``state``: 'finished', 'failed', 'started'
        or 'missing'; ``error`` if failed; ``metrics`` of the test, and ``test``, the one to
        compare; ``curve``, pairs [epoch, validation metric], and ``val``, the tested checkpoint's;
        ``losses``, pairs [iteration, loss]; ``memory_mb``, the training's peak.
    """
    record = run.record
    error = record.get("error")
    metrics = record.get("test", {}).get("metrics", {})
    state = "started" if run.config.is_file() else "missing"
    if run.finished:
        state = "finished"
        error = missing_metric(study.metric, metrics) or _not_a_number(study.metric, metrics)
    if run.config.is_file():
        try:
            run_config(study, run)
        except ConfigError as changed:
            error = str(changed)
    # If a resumed training repeats an epoch, the later line counts.
    curve, losses = {}, {}
    for line in run.scalars():
        if study.metric in line:
            curve[line["step"]] = _number(line[study.metric])
        elif "loss" in line:
            losses[line["step"]] = _number(line["loss"])
    points = sorted(losses.items())
    return dict(
        stage=run.stage,
        method=run.method,
        seed=run.seed,
        state="failed" if error else state,
        error=error,
        test=_number(metrics.get(study.metric)),
        metrics={name: _number(value) for name, value in metrics.items()},
        val=_validation(study, run, curve),
        curve=sorted(curve.items()),
        losses=points[:: math.ceil(len(points) / POINTS) or 1],
        memory_mb=record.get("train", {}).get("memory_mb"),
    )


def _not_a_number(metric: str, metrics: dict[str, Any]) -> str | None:
    value = metrics[metric]
    return f"metric={metric!r} is {value!r}, not a number" if _number(value) is None else None


def _validation(study: Study, run: Run, curve: dict[int, float | None]) -> float | None:
    """Return the validation metric of the tested checkpoint."""
    values = list(curve.values())
    if study.checkpoint != "best":
        return values[-1] if values else None
    path = run.checkpoint("best", study.metric)
    number = re.search(r"_(?:epoch|iter)_(\d+)\.pth$", path.name) if path else None
    if number and int(number[1]) in curve:
        return curve[int(number[1])]
    # Runs of --take have no checkpoint.
    return max((value for value in values if value is not None), default=None)


def _number(value: Any) -> float | None:
    """Return a finite number as a float, anything else as None."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None
