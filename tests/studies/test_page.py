"""The report in a browser: without network, sorted by a click, with its pictures."""

import csv
import html
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from rfa_mmdet.studies.plots import save_differences, save_gains, save_stage_curves
from rfa_mmdet.studies.report import page, write_report
from rfa_mmdet.studies.study import load_study
from rfa_mmdet.studies.summary import summarise
from tests.helpers.processes import PATIENCE
from tests.helpers.results_of import results_of, run_result

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VALUES = {
    "plain": [0.41, 0.43, 0.42],
    "ours": [0.45, 0.46, 0.47],
    "<b>&x": [0.30, 0.31, 0.33],
    "failed": [None, None, None],
    "ten": [0.10, 0.09, 0.11],
}
# Simulates a reader, and writes the results to an attribute.
LOOK = """
<script>
const seen = {errors: window.failures, orders: {}};
const names = () => [...document.querySelectorAll("table.sortable tbody tr")]
  .map(row => row.cells[0].textContent);
seen.orders.start = names();
const buttons = Object.fromEntries(
  [...document.querySelectorAll("table.sortable th button")].map(b => [b.textContent, b]));
for (const title of ["test", "test", "method", "parameters"]) {
  buttons[title].click();
  const sort = buttons[title].closest("th").getAttribute("aria-sort");
  seen.orders[title + " " + sort] = names();
}
seen.sorted = document.querySelectorAll("th[aria-sort]").length;
window.addEventListener("load", () => {
  seen.images = [...document.images].map(i => [i.alt, i.naturalWidth, i.naturalHeight]);
  seen.loaded = performance.getEntriesByType("resource").map(e => e.name.slice(0, 5));
  seen.wide = document.documentElement.scrollWidth <= window.innerWidth;
  seen.clipped = [...document.querySelectorAll(".scroll")]
    .filter(e => e.scrollWidth > e.clientWidth).length;
  document.body.dataset.seen = JSON.stringify(seen);
});
</script>
"""
WATCH = "<script>window.failures = []; window.onerror = m => window.failures.push(m)</script>"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return a page with plots and samples, and the sizes of its pictures."""
    folder = tmp_path_factory.mktemp("report")
    costs = dict(
        machine=dict(cpu="Some CPU", cores=2, simd="AVX2", gpu=None),
        versions=dict(torch="2"),
        threads=1,
        image_size=[64, 64],
        train_batch=4,
        methods={
            name: dict(
                parameters=37_968_692 - i,
                flops=10**8 * (i + 1),
                image_seconds=0.01 * (i + 1),
                iteration_seconds=0.1 * (i + 1),
            )
            for i, name in enumerate(VALUES)
            if name != "failed"
        },
    )
    results = results_of(VALUES, costs)
    results["runs"][9].update(state="failed", error="error: <script>alert(1)</script>")
    rows = [["0_truth.jpg", "0_plain.jpg"]]
    results["samples"] = dict(stage="all", seed=0, score=0.3, columns=["truth", "plain"], rows=rows)
    summary = summarise(results)
    plots = curves, differences, gains = [
        folder / f"{name}.png" for name in ("curves", "differences", "gains")
    ]
    assert save_stage_curves(results, "all", curves)
    assert save_differences(results, summary, differences)
    assert save_gains(results, summary, gains)
    samples = [folder / name for name in rows[0]]
    for sample in samples:
        cv2.imwrite(str(sample), np.full((48, 64, 3), 90, np.uint8))
    text = page(results, summary, {"all": plots}, folder)
    sizes = [cv2.imread(str(path)).shape[1::-1] for path in (*plots, *samples)]
    return text, sizes


def test_page_is_self_contained_and_escapes_its_content(report):
    text, _ = report
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)[^"'\s>]*[:/]""", text)
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert 'data-value="&lt;b&gt;&amp;x">&lt;b&gt;&amp;x</td>' in text
    words = " ".join(text.split())
    assert "a training iteration has 4 images" in words
    assert "Some CPU, 2 cores, 1 thread (torch 2)" in words
    assert "ours has the highest mean, 0.4600 ± 0.0100, +0.040 from the baseline" in words


def test_names_with_any_characters_in_every_file(tmp_path):
    (tmp_path / "base.py").write_text("model = dict()")
    (tmp_path / "$x$.py").write_text(
        "base = 'base.py'; metric = 'a'; methods = {'_plain': {}, '+1+1': {}, '-猫': {}}"
    )
    study = load_study(tmp_path / "$x$.py", tmp_path / "out")
    costs = dict.fromkeys(("parameters", "flops"), 10**6) | dict(
        image_seconds=0.1, iteration_seconds=0.2
    )
    results = results_of({"_plain": [0.3, 0.2], "+1+1": [0.1, 0.2], "-猫": [0.1, 0.2]})
    results["costs"] = dict(
        machine=dict(cpu="<b>", cores=1, simd="", gpu=None),
        **dict(versions={}, threads=1, image_size=[64, 64], train_batch=1),
        methods=dict.fromkeys(results["methods"], costs),
    )
    results.update(name="$x$", metric="m|$x$/<b>_\n# [c](d)")
    for run in results["runs"]:
        run.update(losses=[(1, 2.0), (2, 1.0)], curve=[(1, 0.1)])
    results["runs"][-1].update(state="failed", error="=1 \x1b[31m \udcff <script>")
    study.work_dir.mkdir()
    (study.work_dir / "results.json").write_text(json.dumps(results))
    write_report(study)
    with open(study.work_dir / "table.csv", newline="", encoding="utf-8") as file:
        plain, plus, minus = csv.DictReader(file)
    assert [row["method"] for row in (plain, plus, minus)] == ["_plain", "'+1+1", "'-猫"]
    assert float(plus["difference"]) < 0
    lines = (study.work_dir / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == r"## all: m\|\$x\$/\<b\>\_\\n# \[c\](d)"
    assert lines[4].startswith(r"| \_plain (baseline) |")
    text = (study.work_dir / "report.html").read_text(encoding="utf-8")
    assert "m|$x$/&lt;b&gt;_" in text
    assert r"\udcff &lt;script&gt;" in text
    # Two seeds: no differences to plot.
    assert not (study.work_dir / "differences_all.png").exists()
    for name in ("curves_all", "gains_all"):
        assert cv2.imread(str(study.work_dir / f"{name}.png")).std() > 10


def test_page_of_an_unfinished_study(tmp_path):
    results = results_of(dict(plain=[None, None], ours=[0.2, 0.3]))
    results["stages"].append(
        dict(
            **dict(name="later", methods=["ours"], seeds=[0], options={}),
            **dict(load_from="all", load_method="baseline"),
        )
    )
    results["runs"].append(run_result("ours", 0, None, stage="later"))
    words = " ".join(page(results, summarise(results), dict(all=[], later=[]), tmp_path).split())
    assert "2 of 5 runs finished" in words
    assert "ours has the highest mean, 0.2500 ± 0.0707; the baseline is not finished." in words
    assert "Stage later: started from plain of stage all" in words
    assert "No run of this stage is finished." in words
    assert '<td class="text">later</td><td class="text">ours</td><td>missing</td><td></td>' in words
    assert "GFLOPs (" not in words
    assert "<img" not in words


@pytest.mark.parametrize(
    ("ours", "sentence"),
    [
        ([0.3, 0.1], "plain has the highest mean, 0.3500 ± 0.0707: it is the baseline."),
        ([0.4, 0.6], "+0.150 from the baseline, which cannot be tested with fewer than 3 seeds "),
    ],
)
def test_sentence_about_the_best_method(ours, sentence, tmp_path):
    results = results_of(dict(plain=[0.3, 0.4], ours=ours))
    assert sentence in " ".join(page(results, summarise(results), dict(all=[]), tmp_path).split())


@pytest.mark.skipif(BROWSER is None, reason="no chromium (apt-get install chromium)")
def test_report_in_a_browser(report, tmp_path):
    text, sizes = report
    file = tmp_path / "report.html"
    file.write_text(text.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{LOOK}</body>"))
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        # No host name can be resolved.
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--window-size=1300,900", "--virtual-time-budget=5000", "--dump-dom", f"file://{file}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["errors"] == []
    assert [tuple(image[1:]) for image in seen["images"]] == sizes
    assert set(seen["loaded"]) <= {"data:"}
    assert seen["wide"]
    assert seen["clipped"] == 0
    orders = seen["orders"]
    plain = "plain (baseline)"
    assert orders["start"] == [plain, "ours", "<b>&x", "failed", "ten"]
    # Sorted as numbers; unknown values last in both directions.
    assert orders["test ascending"] == ["ten", "<b>&x", plain, "ours", "failed"]
    assert orders["test descending"] == ["ours", plain, "<b>&x", "ten", "failed"]
    assert orders["method ascending"] == ["<b>&x", "failed", "ours", plain, "ten"]
    assert orders["parameters ascending"] == ["ten", "<b>&x", "ours", plain, "failed"]
    assert seen["sorted"] == 1
