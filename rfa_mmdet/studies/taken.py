"""Take finished runs of a results.json, so that a study can resume on another machine."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.execute import run_config
from rfa_mmdet.studies.run import Run, read_json, write_json
from rfa_mmdet.studies.study import Study


def fingerprint(study: Study, run: Run) -> str | None:
    """Return a digest of what determines the results of a run.

    None if its config is invalid, or if its folder contains a run with another config.

    It includes the config, the run that it starts from, the tested checkpoint and the metric. It
    does not depend on names, or on the folder of the data, ``data_root``.
    """
    try:
        parts = [study.metric, study.checkpoint, _portable_config(study, run)]
    except ConfigError:
        return None
    source = study.source(run)
    if source is not None:
        start = fingerprint(study, source)
        if start is None:
            return None
        parts.append(start)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def take_runs(study: Study, path: str | Path) -> list[Run]:
    """Take the finished runs of a results.json that have a config of this study.

    They may be of another study. Runs that have a folder here are left alone. The checkpoints stay
    where they were, so no other run can start from the taken ones.

    Args:
        study (Study): The study.
        path (str | Path): A results.json.

    Returns:
        list[Run]: The runs that were taken.

    Raises:
        UserError: There is no such file, or it is damaged.
        ConfigError: No finished run in it has a config of this study, or it does not say which
            configs its runs had.
    """
    results = read_json(Path(path))
    if not isinstance(results, dict) or "runs" not in results:
        raise UserError(f"{path}: must be a results.json of tools/ablate.py")
    if any("fingerprint" not in result for result in results["runs"]):
        raise ConfigError(
            f"{path}: was written by a version that did not record the runs' configs; where the "
            "runs are, write it again with --report-only"
        )
    finished = {
        result["fingerprint"]: result
        for result in results["runs"]
        if result["state"] == "finished" and result["fingerprint"]
    }
    found = [(run, finished.get(fingerprint(study, run))) for run in study.runs()]
    if not any(result for _, result in found):
        raise ConfigError(f"{path}: no finished run in it has a config of the study {study.name}")
    taken = []
    for run, result in found:
        if result is None or run.config.is_file():
            continue
        with run.locked():
            if not run.config.is_file():  # another process may have written it meanwhile
                _write(study, run, result)
                taken.append(run)
    return taken


def _portable_config(study: Study, run: Run) -> str:
    """Return a config as JSON, without ``data_root`` at the start of its paths."""
    cfg = run_config(study, run).to_dict()
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
        dict(
            train=dict(memory_mb=result["memory_mb"]),
            test=dict(metrics=result["metrics"], checkpoint=study.checkpoint),
        ),
    )
    # Last: without it, the run is taken again.
    with written_whole(run.config) as part:
        study.config(run).dump(part)
