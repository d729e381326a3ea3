"""Update the tables and figures of docs/results.md from benchmarks/results/ablation.

The table for stage STAGE of NAME.json is between <!-- NAME STAGE --> and <!-- end -->. Its figure
is docs/images/ablation_NAME_STAGE.png.
"""

import re
from pathlib import Path

from rfa_mmdet.studies.plots import save_differences
from rfa_mmdet.studies.run import read_json
from rfa_mmdet.studies.summary import summarise
from rfa_mmdet.studies.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
BLOCK = re.compile(r"<!-- (\S+) (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def updated(text: str) -> str:
    """Return the page with updated tables.

    Raises:
        FileNotFoundError: If results are missing.
    """

    def block(match: re.Match) -> str:
        name, stage = match.groups()
        results, rows = stage_of(name, stage)
        table = markdown(rows, results["metric"]).split("\n\n", 1)[1]  # without its heading
        return f"<!-- {name} {stage} -->\n\n{table}\n<!-- end -->"

    return BLOCK.sub(block, text)


def stage_of(name: str, stage: str):
    """Return the results of a study, and the rows of a stage in their summary."""
    results = read_json(RESULTS / f"{name}.json")
    if results is None:
        raise FileNotFoundError(f"{RESULTS / name}.json: missing or not JSON")
    summary = summarise(results)
    return results, summary[summary["stage"] == stage]


def main() -> None:
    """Rewrite the page and its figures."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(updated(text), encoding="utf-8")
    for name, stage in BLOCK.findall(text):
        picture = ROOT / "docs" / "images" / f"ablation_{name}_{stage}.png"
        save_differences(*stage_of(name, stage), picture)


if __name__ == "__main__":
    main()
