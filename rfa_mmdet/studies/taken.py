"""Take the finished runs of a results.json, so that a study can resume on another machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.run import Run, read_json, write_json
from rfa_mmdet.studies.study import Study


def description(study: Study) -> dict[str, Any]:
    """Return what a results.json says of its study."""
    return dict(
        name=study.name,
        metric=study.metric,
        baseline=study.baseline,
        checkpoint=study.checkpoint,
        methods=list(study.methods),
        stages=list(map(asdict, study.stages.values())),
    )


def take_runs(study: Study, path: str | Path) -> list[Run]:
    """Take the finished runs of a results.json that have no folder here.

    Their checkpoints stay where they were, so no other run can start from them.

    Args:
        study (Study): The study.
        path (str | Path): A results.json of the same spec.

    Returns:
        list[Run]: The runs that were taken.

    Raises:
        UserError: There is no such file, or it is damaged.
        ConfigError: It belongs to another study.
    """
    results = read_json(Path(path))
    if not isinstance(results, dict) or "runs" not in results:
        raise UserError(f"{path}: must be a results.json of tools/ablate.py")
    # As after a round trip through JSON.
    own = {key: _plain(value) for key, value in description(study).items()}
    changed = [key for key, value in own.items() if results.get(key) != value]
    if changed:
        raise ConfigError(f"{path}: belongs to another study (different: {', '.join(changed)})")
    found = {(run["stage"], run["method"], run["seed"]): run for run in results["runs"]}
    taken = []
    for run in study.runs():
        result = found.get((run.stage, run.method, run.seed), {"state": "missing"})
        if result["state"] == "finished" and not run.config.is_file():
            with run.locked():
                _write(study, run, result)
            taken.append(run)
    return taken


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _write(study: Study, run: Run, result: dict[str, Any]) -> None:
    """Write the folder of a run, so that :func:`~rfa_mmdet.studies.results.read_run` reads it."""
    lines = [{"step": step, "loss": loss} for step, loss in result["losses"]]
    lines += [{"step": epoch, study.metric: value} for epoch, value in result["curve"]]
    run.keep_scalars(lines)
    with written_whole(run.config) as part:
        study.config(run).dump(part)
    write_json(
        run.folder / "record.json",
        dict(train=dict(memory_mb=result["memory_mb"]), test=dict(metrics=result["metrics"])),
    )
