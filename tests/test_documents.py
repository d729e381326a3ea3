"""Numbers in README.md, README_zh-CN.md and docs/ are those of the committed results."""

import json
import re
from pathlib import Path

import pytest
from torch import nn

from benchmarks import documents, evidence, report
from rfa_mmdet.layers import RFAConv
from tests.helpers.paths import ROOT
from tests.helpers.shipped import METHODS, planned

RESULTS = ROOT / "benchmarks" / "results"
ABLATIONS = sorted((RESULTS / "ablation").glob("*.json"))
BENCHMARKS = sorted(RESULTS.glob("*.json"))
READMES = ("README.md", "README_zh-CN.md")
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)]+)\)")


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- results of trainings ------------------------------------------------------------------------


def test_page_of_results_is_rebuilt_from_them():
    text = text_of("docs/results.md")
    assert evidence.updated(text) == text, "stale: run python -m benchmarks.evidence"
    blocks = evidence.BLOCK.findall(text)
    stages = {
        (path.stem, stage["name"])
        for path in ABLATIONS
        for stage in read(path)["stages"]
        if len(stage["methods"]) > 1  # else it only makes checkpoints for the others
    }
    assert sorted(blocks) == sorted(stages)
    for name, stage in blocks:
        assert f"](images/ablation_{name}_{stage}.png)" in text
    # No numbers outside of these tables.
    rest = evidence.BLOCK.sub("", text)
    assert not [line for line in rest.splitlines() if line.startswith("| ") and " ± " in line]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_run_of_a_page_is_finished(path):
    left = sum(run["state"] != "finished" for run in read(path)["runs"])
    # One processor was not available to the end. The table of its study counts the seeds.
    assert left == (7 if path.stem == "bccd_small_avx2" else 0)


# --- parts that benchmarks.documents writes ------------------------------------------------------


@pytest.mark.parametrize("page", documents.PAGES)
def test_pages_hold_the_numbers_of_the_results(page):
    text = text_of(page)
    assert documents.filled(text, documents.words_of(page)) == text, (
        "stale: run python -m benchmarks.documents"
    )


def test_every_page_has_its_parts():
    found = {
        page: [part[2] for part in documents.BLOCK.finditer(text_of(page))]
        for page in documents.PAGES
    }
    of_readme = ["methods", "speed", "evidence", "durations"]
    assert found["README.md"] == found["README_zh-CN.md"] == of_readme
    assert found["docs/performance.md"] == [
        *("speed", "targets", "layers", "gated", "slower", "on_gpu", "modelled")
    ]
    assert {*documents.BLOCKS} == {name for names in found.values() for name in names}
    for page, names in found.items():
        assert text_of(page).count("<!-- numbers: ") == len(names)


def test_an_unknown_part_is_an_error():
    with pytest.raises(KeyError, match="sped"):
        documents.filled("<!-- numbers: sped -->\n<!-- /numbers -->\n")


def test_a_part_is_rewritten():
    stale = "before\n<!-- numbers: durations -->\n1 min\n<!-- /numbers -->\nafter\n"
    lines = documents.filled(stale).splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "1 min" not in lines
    test = read(ROOT / "benchmarks" / "durations.json")["make test"]
    took = f"{test['seconds'] / 60:.0f} min, {test['tests']:,} tests"
    assert f"| `make test`, with the environment in place | {took} |" in lines


def test_tables_of_the_benchmark():
    contents = [read(path) for path in BENCHMARKS]
    targets = report.targets_table([run for content in contents for run in report.runs_of(content)])
    assert "\n".join(targets) in text_of("docs/performance.md")
    assert text_of("benchmarks/table.md") == "\n".join(report.tables(contents)) + "\n"


def test_statement_about_means():
    run = read(RESULTS / "cpu.json")
    assert "On average no layer is slower than its formula." in text_of("docs/performance.md")
    for name in report.candidates(run):
        own = report.of_op(run, name.split("[")[0])
        for mode in ("inference", "training"):
            assert report.mean_ratio(own, name, mode, "formula") <= 1, name
    rfa = report.of_op(run, "RFAConv")
    assert "less than 8 times the plain convolution's time" in text_of("docs/performance.md")
    assert report.mean_ratio(rfa, "formula", "inference", "plain") < 8
    assert "Inductor makes the formula slower" in text_of("docs/performance.md")
    assert report.mean_ratio(rfa, "compiled formula", "inference", "formula") > 1


def test_costs_are_those_of_the_configs(tmp_path):
    """benchmarks/systems.md is what complexity.py --systems prints."""
    rows = re.findall(r"(?m)^\| `?(\w+)`? \| (\S+) \| (\S+) \|$", text_of("benchmarks/systems.md"))
    (nothing, plain_parameters, plain_gflops), *systems = rows
    assert nothing == "nothing"
    plain = build('_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"', tmp_path)
    assert f"{sum(p.numel() for p in plain.parameters()):,}" == plain_parameters
    assert {name for name, *_ in systems} == {kind.__name__ for kind in METHODS.values()}
    for name, more_parameters, more_gflops in systems:
        config = f"retinanet_r50-{name.lower()}_fpn_1x_coco"
        readme = text_of(f"configs/{name.lower()}/README.md")
        parameters, gflops = re.search(
            rf"\[{config}\]\S+ \| COCO \| (\S+) \| (\S+) \|", readme
        ).groups()
        assert number(parameters) - number(plain_parameters) == number(more_parameters)
        assert float(gflops) - float(plain_gflops) == pytest.approx(float(more_gflops), abs=0.011)


def number(text: str) -> int:
    return int(text.replace(",", ""))


# --- the READMEs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READMES)
def test_readme_is_short(name):
    assert len(text_of(name).splitlines()) <= 200


@pytest.mark.parametrize("name", [*READMES, "docs/results.md", "docs/performance.md"])
def test_pictures_are_there(name):
    document = ROOT / name
    pictures = PICTURE.findall(document.read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        assert (document.parent / picture).read_bytes().startswith(b"\x89PNG"), picture


def build(text: str, folder: Path) -> nn.Module:
    """Build the model of a config's text, without memory for its weights."""
    path = folder / "my_config.py"
    path.write_text(text)
    return planned.__wrapped__(path)


@pytest.mark.parametrize("kind", ["RFAResNet", "Retrofit"])
def test_configs_of_the_readme_are_six_lines_and_build(kind, tmp_path):
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", text_of("README.md"))
    (text,) = [block for block in blocks if f'type="{kind}"' in block]
    assert len([line for line in text.splitlines() if line.strip()]) == 6
    assert 'custom_imports = dict(imports=["rfa_mmdet"])' in text
    modules = build(text, tmp_path).named_modules()
    found = {name for name, module in modules if isinstance(module, RFAConv)}
    assert found == {
        f"backbone.layer{stage}.{block}.conv2"
        for stage, blocks in ((2, 4), (3, 6), (4, 3))
        for block in range(blocks)
    }


@pytest.mark.parametrize("name", READMES)
@pytest.mark.parametrize("stack", ["current", "prebuilt", "onedl"])
def test_versions_are_those_that_the_setup_installs(stack, name):
    (row,) = re.findall(rf"(?m)^\| `{stack}`.* \|$", text_of(name))
    torch, openmmlab = [cell.strip() for cell in row.strip("|").split("|")][2:4]
    pins = pins_of(stack)
    names = ("mmcv", "mmdet", "mmengine")
    if stack == "onedl":
        names = ("onedl-mmcv", "onedl-mmdetection", "onedl-mmengine")
    assert [torch, *re.split("[,、] ?", openmmlab)] == [pins[name] for name in ("torch", *names)]


def pins_of(stack: str) -> dict[str, str]:
    text = text_of(f"requirements/{stack}.txt")
    found = dict(re.findall(r"(?m)^([\w-]+)==([\w.]+)", text))
    for other in re.findall(r"(?m)^-r (\w+)\.txt", text):
        found = pins_of(other) | found
    return found


def test_versions_of_triton_are_those_that_are_tested():
    text = text_of("docs/performance.md")
    versions = re.findall(r"(?m)^triton==([\d.]+)", text_of("requirements/triton.txt"))
    for version in {*versions, pins_of("current")["triton"]}:
        assert version in text
