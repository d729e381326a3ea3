"""results.json, tables, plots and the page, from what the runs have left."""

import os
import sys
from pathlib import Path

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.costs import method_costs
from rfa_mmdet.studies.folders import Folder
from rfa_mmdet.studies.page import page
from rfa_mmdet.studies.plots import save_gains, save_stage_curves
from rfa_mmdet.studies.results import collect, stored
from rfa_mmdet.studies.samples import draw_samples, stored_samples
from rfa_mmdet.studies.spec import Spec
from rfa_mmdet.studies.summary import Row, summarise
from rfa_mmdet.studies.tables import comma_separated, markdown


def write_report(spec: Spec, work_dir: str | os.PathLike) -> list[Row]:
    """Write the report of what is finished.

    Where the runs' folders are gone, of the results.json that they were gathered in.

    Args:
        spec (Spec): What is compared.
        work_dir (str | os.PathLike): Of the comparison.

    Returns:
        list[Row]: The summary.

    Raises:
        UserError: Nothing has been started there.
    """
    work_dir = Path(work_dir)
    if any(Folder(work_dir, run).path.is_dir() for run in spec.runs()):
        try:
            costs = method_costs(spec, work_dir)
            samples = draw_samples(spec, work_dir)
        except (OSError, UserError) as error:  # the data or checkpoints are not here any more
            print(f"warning: no new costs and samples: {error}", file=sys.stderr)
            costs, samples = {}, stored_samples(work_dir)
        results = collect(spec, work_dir, costs)
    else:
        results, samples = stored(work_dir), stored_samples(work_dir)
    rows = summarise(results)
    pictures = {}
    for stage in results["stages"]:
        name = stage["name"]
        mine = [row for row in rows if row.stage == name]
        curves, gains = work_dir / f"curves_{name}.png", work_dir / f"gains_{name}.png"
        pictures[name] = [
            path
            for path, done in (
                (curves, save_stage_curves(results, name, curves)),
                (gains, save_gains(results, mine, gains)),
            )
            if done
        ]
    columns, files = samples.get("columns", []), samples.get("rows", [])
    shown = [[work_dir / "samples" / name for name in names] for names in files]
    caption = ""
    if samples:
        caption = (
            f"{samples['stage']}, seed {samples['seed']}; "
            f"detections with a score of at least {samples['score']}."
        )
    for name, text in (
        ("table.md", markdown(rows, results["metric"])),
        ("table.csv", comma_separated(rows)),
        ("report.html", page(results, rows, pictures, columns, shown, caption)),
    ):
        with written_whole(work_dir / name) as part:
            part.write_text(text, encoding="utf-8")
    return rows
