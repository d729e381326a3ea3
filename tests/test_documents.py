"""Numbers in README.md and docs/ are those of the committed results."""

import json
import re
from pathlib import Path
from statistics import geometric_mean

import pytest

from benchmarks import report
from rfa_mmdet.studies.summary import summarise
from rfa_mmdet.studies.tables import markdown
from tests.helpers.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
ABLATIONS = sorted((RESULTS / "ablation").glob("*.json"))
BENCHMARKS = sorted(RESULTS.glob("*.json"))
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_tables_of_the_ablations(path):
    results = read(path)
    assert all(run["state"] == "finished" for run in results["runs"])
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    tables = markdown(summarise(results), results["metric"])
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    assert len(rows) == sum(2 + len(stage["methods"]) for stage in results["stages"])
    for line in rows:
        assert line in document


def test_no_table_of_an_ablation_is_without_its_results():
    document = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    known = "".join(
        markdown(summarise(results), results["metric"]) for results in map(read, ABLATIONS)
    )
    rows = [line for line in document.splitlines() if line.startswith("| ") and " ± " in line]
    assert rows
    for line in rows:
        assert line in known.splitlines()


def test_tables_of_the_benchmark():
    contents = [read(path) for path in BENCHMARKS]
    targets = report.targets_table([run for content in contents for run in report.runs_of(content)])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(targets) in readme
    lines = report.tables(contents)
    assert (ROOT / "benchmarks" / "table.md").read_text(encoding="utf-8") == "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_pictures_are_there(name):
    document = ROOT / name
    pictures = PICTURE.findall(document.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        assert (document.parent / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_times_of_the_gated_convolutions():
    results = read(RESULTS / "cpu.json")["results"]
    ratios = [
        f"{geometric_mean(row[mode]['ratios'][op]['plain']['median'] for row in rows):.2f}"
        for mode in ("inference", "training")
        for op in ("RFCBAMConv", "RFCAConv")
        for rows in [[row for row in results if row["op"] == op]]
    ]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    wording = (
        "RFCBAMConv and RFCAConv take {} and {} times the plain convolution's time in inference, "
        "{} and {} times forward and backward"
    )
    assert wording.format(*ratios) in readme
