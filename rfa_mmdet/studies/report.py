"""Write the report: results.json, tables, plots, and a self-contained HTML file."""

import base64
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.costs import method_costs
from rfa_mmdet.studies.plots import save_differences, save_gains, save_stage_curves
from rfa_mmdet.studies.results import collect
from rfa_mmdet.studies.run import read_json
from rfa_mmdet.studies.samples import draw_samples
from rfa_mmdet.studies.study import Study
from rfa_mmdet.studies.summary import LEVEL, MIN_PAIRS, summarise
from rfa_mmdet.studies.tables import COLUMNS, gain, markdown, records, spread, what_was_needed
from rfa_mmdet.texts import cell

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def write_report(study: Study) -> pd.DataFrame:
    """Write the report of the finished runs.

    Args:
        study (Study): The study. If its work dir has a results.json but no longer any runs, the
            report is generated from that file.

    Returns:
        pd.DataFrame: The summary, see :func:`~rfa_mmdet.studies.summary.summarise`.

    Raises:
        UserError: No run has been started.
    """
    folder = study.work_dir
    results = read_json(folder / "results.json")
    if any(run.folder.is_dir() for run in study.runs()):
        costs, samples = ((results or {}).get(key, {}) for key in ("costs", "samples"))
        costs = _updated("costs", costs, lambda: method_costs(study, costs))
        samples = _updated("samples", samples, lambda: draw_samples(study))
        results = collect(study, costs, samples)
    elif results is None:
        raise UserError(f"{folder}: no run of this spec has been started in this folder")
    summary = summarise(results)
    plots = {}
    for stage, rows in summary.groupby("stage", sort=False):
        curves, differences, gains = (
            folder / f"{name}_{stage}.png" for name in ("curves", "differences", "gains")
        )
        drawn = {
            differences: save_differences(results, rows, differences),
            curves: save_stage_curves(results, stage, curves),
            gains: save_gains(results, rows, gains),
        }
        plots[stage] = [path for path, done in drawn.items() if done]
    for name, text in (
        ("table.md", markdown(summary, results["metric"])),
        ("table.csv", summary.map(cell).to_csv(index=False)),
        ("report.html", page(results, summary, plots, folder / "samples")),
    ):
        with written_whole(folder / name) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return summary


def _updated(what: str, known: dict[str, Any], update: Callable[[], dict[str, Any]]) -> dict:
    """Return an updated part of the results, or the known one if that fails.

    Any error is only a warning: the data or checkpoints may be gone, all models together may not
    fit in the GPU's memory, or one may need batches of another kind. The report of all the
    trainings does not need this part.
    """
    try:
        return update()
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(f"warning: {what} not updated: {kind}{error}", file=sys.stderr)
        return known


def page(
    results: dict[str, Any],
    summary: pd.DataFrame,
    plots: Mapping[str, Sequence[Path]],
    samples: Path,
) -> str:
    """Return the report as HTML.

    Args:
        results (dict): Returned by :func:`~rfa_mmdet.studies.results.collect`.
        summary (pd.DataFrame): Returned by :func:`~rfa_mmdet.studies.summary.summarise`.
        plots (Mapping[str, Sequence[Path]]): PNG files by stage.
        samples (Path): Folder of the files named in ``results["samples"]``.
    """
    runs = pd.DataFrame(results["runs"])
    finished = runs["state"] == "finished"
    texts = runs["test"].astype(float).map(lambda value: spread(value, None))
    runs["text"] = texts.where(finished & runs["test"].notna(), runs["state"])
    tests = runs.pivot(index=["stage", "method"], columns="seed", values="text").fillna("")
    return _TEMPLATES.get_template("report.html").render(
        results=results,
        columns=COLUMNS,
        rows={stage: records(rows) for stage, rows in summary.groupby("stage")},
        needed={stage: what_was_needed(rows) for stage, rows in summary.groupby("stage")},
        plots=plots,
        samples=results.get("samples", {}) if samples.is_dir() else {},
        folder=samples,
        finished=finished.sum(),
        failed=records(runs[runs["state"] == "failed"]),
        tests=tests.reindex(summary.set_index(["stage", "method"]).index),
        level=LEVEL,
        min_pairs=MIN_PAIRS,
        spread=spread,
        gain=gain,
        data_uri=_data_uri,
    )


def _data_uri(path: Path) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
