"""Take the finished runs of a results.json, so that a study can resume on another machine."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.run import Run, read_json, write_json
from rfa_mmdet.studies.study import Study


def description(study: Study) -> dict[str, Any]:
    """Return what a results.json says of its study.

    Returns:
        dict[str, Any]: Attributes of the study, and ``configs``, a digest of the configs of all
        stages and methods. It does not depend on the folder of the data, ``data_root``.
    """
    first = [
        Run(study.work_dir, stage.name, method, stage.seeds[0])
        for stage in study.stages.values()
        for method in stage.methods
    ]
    configs = "\n".join(_portable_config(study, run) for run in first)
    return dict(
        name=study.name,
        metric=study.metric,
        baseline=study.baseline,
        checkpoint=study.checkpoint,
        methods=list(study.methods),
        stages=list(map(asdict, study.stages.values())),
        configs=hashlib.sha256(configs.encode()).hexdigest()[:16],
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
        ConfigError: It belongs to another study, or does not say which configs its runs had.
    """
    results = read_json(Path(path))
    if not isinstance(results, dict) or "runs" not in results:
        raise UserError(f"{path}: must be a results.json of tools/ablate.py")
    if "configs" not in results:
        raise ConfigError(
            f"{path}: was written by a version that did not record the runs' configs; where the "
            "runs are, write it again with --report-only"
        )
    own = json.loads(json.dumps(description(study)))  # tuples become lists
    changed = [key for key, value in own.items() if results.get(key) != value]
    if changed:
        raise ConfigError(f"{path}: belongs to another study (different: {', '.join(changed)})")
    found = {(run["stage"], run["method"], run["seed"]): run for run in results["runs"]}
    taken = []
    for run in study.runs():
        result = found.get((run.stage, run.method, run.seed), {"state": "missing"})
        if result["state"] != "finished" or run.config.is_file():
            continue
        with run.locked():
            if not run.config.is_file():  # another process may have written it meanwhile
                _write(study, run, result)
                taken.append(run)
    return taken


def _portable_config(study: Study, run: Run) -> str:
    """Return a config as JSON, without ``data_root`` at the start of its paths."""
    try:
        cfg = study.config(run).to_dict()
    except ConfigError:  # the run fails, but its study has a report
        return ""
    plain = json.loads(json.dumps(cfg, default=str))  # keys of several types cannot be sorted
    text, root = json.dumps(plain, sort_keys=True), plain.get("data_root")
    return text.replace(json.dumps(root)[:-1], '"') if isinstance(root, str) else text


def _write(study: Study, run: Run, result: dict[str, Any]) -> None:
    """Write the folder of a run, so that :func:`~rfa_mmdet.studies.results.read_run` reads it."""
    lines = [{"step": step, "loss": loss} for step, loss in result["losses"]]
    lines += [{"step": epoch, study.metric: value} for epoch, value in result["curve"]]
    run.keep_scalars(lines)
    write_json(
        run.folder / "record.json",
        dict(train=dict(memory_mb=result["memory_mb"]), test=dict(metrics=result["metrics"])),
    )
    # Last: without it, the run is taken again.
    with written_whole(run.config) as part:
        study.config(run).dump(part)
