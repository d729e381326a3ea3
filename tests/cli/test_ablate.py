"""tools/ablate.py with real trainings: failures do not stop others, nothing runs twice."""

import csv
import json
import runpy
import shutil
import signal
import subprocess
import sys

import cv2
import pytest
import torch
from mmdet.registry import MODELS

from rfa_mmdet.errors import UserError
from rfa_mmdet.studies import load_study, write_report
from rfa_mmdet.studies.results import collect
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE, wait_until

# Records the images of every batch and whether they were flipped. The training whose folder is in
# the environment waits in its second epoch, to be interrupted there.
WATCH = """
import json
import os
import signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WatchBatchesHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        seen = [[s.img_id, bool(s.flip)] for s in data_batch["data_samples"]]
        with open(runner.work_dir + "/batches.txt", "a") as file:
            file.write(json.dumps(seen) + chr(10))
        if runner.epoch == 1 and runner.work_dir == os.environ.get("HELD"):
            signal.pause()
"""
SPEC = """
base = {tiny!r}
metric = "coco/bbox_mAP_50"
options = {{
    "train_cfg.max_epochs": {epochs},
    "custom_imports": dict(imports=["rfa_mmdet", "watch_batches"]),
    "custom_hooks": [dict(type="EpochSeedHook"), dict(type="WatchBatchesHook")],
    "test_cfg.type": "TestLoop",
}}
samples = 2
plain = {{"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}}
"""
TWO_AND_A_WRONG_ONE = """
methods = dict(plain=plain, rfaconv={}, wrong={"model.bbox_head.num_classes": 9})
seeds = (0,)
"""
TWO_SEEDS = """
methods = dict(plain=plain, rfaconv={})
seeds = (0, 1)
stages = dict(scratch=dict(), warm_start=dict(load_from="scratch", methods=["rfaconv"], seeds=[1]))
"""


@pytest.fixture(scope="module")
def ablate(run_tool, tiny_config, tmp_path_factory):
    """Write a spec and run the tool on it; the result has its work dir."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "watch_batches.py").write_text(WATCH)

    def run(name, text, *arguments, epochs=1, **variables):
        spec = folder / f"{name}.py"
        spec.write_text(SPEC.format(tiny=str(tiny_config), epochs=epochs) + text)
        done = run_tool(
            *(sys.executable, "tools/ablate.py", spec, "--work-dir", folder / name, *arguments),
            **{"PYTHONPATH": str(folder), **variables},
        )
        done.work_dir = folder / name
        done.spec = spec
        return done

    return run


@pytest.fixture(scope="module")
def first(ablate):
    """Compare two methods that train and one that fails."""
    return ablate("first", TWO_AND_A_WRONG_ONE, "--jobs", "2")


def batches(work_dir, method, seed=0, stage="all"):
    path = work_dir / f"runs/{stage}/{method}/seed{seed}/train/batches.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_failed_run_is_reported_and_the_others_continue(first):
    assert first.returncode == 1, first.stdout
    assert "1 of 3 runs failed" in first.stdout
    assert "all/wrong/seed0: train failed with exit code 1: error: model.bbox_head" in (
        first.stdout
    )
    results = json.loads((first.work_dir / "results.json").read_text())
    runs = {run["method"]: run for run in results["runs"]}
    assert {m: run["state"] for m, run in runs.items()} == dict(
        plain="finished", rfaconv="finished", wrong="failed"
    )
    for method in ("plain", "rfaconv"):
        run, folder = runs[method], first.work_dir / f"runs/all/{method}/seed0"
        # The test of the last checkpoint matches the last validation.
        tested = json.loads(next((folder / "test").glob("*/*.json")).read_text())
        assert run["test"] == tested["coco/bbox_mAP_50"] == run["val"]
        assert run["curve"] == [[1, run["val"]]]
        assert len(run["losses"]) == 3
        assert 100 < run["memory_mb"] < 5000
    costs = results["costs"]
    assert costs["image_size"] == [160, 160]
    plain, ours = (costs["methods"][m] for m in ("plain", "rfaconv"))
    assert 0 < plain["parameters"] < ours["parameters"]
    assert 0 < plain["flops"] < ours["flops"]
    assert plain["image_seconds"] > 0
    assert plain["iteration_seconds"] > 0
    assert costs["train_batch"] == 4
    assert costs["machine"]["cores"] >= 1
    assert costs["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_report_contents(first):
    names = ("table.md", "table.csv", "curves_all.png", "gains_all.png", "report.html")
    for name in names:
        assert (first.work_dir / name).stat().st_size > 100
    rows = list(csv.DictReader((first.work_dir / "table.csv").open()))
    assert [row["method"] for row in rows] == ["plain", "rfaconv", "wrong"]
    assert rows[1]["verdict"] == "cannot be tested"
    page = (first.work_dir / "report.html").read_text()
    assert "train failed with exit code 1" in page
    assert page.count("data:image/jpeg;base64,") == 2 * 3  # ground truth and both methods
    picture = cv2.imread(str(first.work_dir / "samples" / "0_truth.jpg"))
    assert picture.shape == (512, 512, 3)
    assert not list(first.work_dir.rglob("*.part*"))


@pytest.mark.slow
def test_all_methods_see_the_same_images_in_the_same_order(first):
    seen = batches(first.work_dir, "plain")
    assert seen == batches(first.work_dir, "rfaconv")
    images = [one for line in seen.splitlines() for one in json.loads(line)]
    assert len({number for number, _ in images}) == 12
    assert {flipped for _, flipped in images} == {True, False}


@pytest.mark.slow
def test_another_config_in_the_same_folder_raises(first, fails, tiny_config, monkeypatch):
    monkeypatch.syspath_prepend(first.spec.parent)
    spec = first.spec.with_name("changed.py")
    spec.write_text(SPEC.format(tiny=str(tiny_config), epochs=2) + TWO_AND_A_WRONG_ONE)
    logs = [path.read_bytes() for path in sorted(first.work_dir.rglob("log.txt"))]
    message = fails("ablate", spec, "--work-dir", first.work_dir)
    assert "contains a run with another config (different: train_cfg)" in message
    assert logs == [path.read_bytes() for path in sorted(first.work_dir.rglob("log.txt"))]


@pytest.mark.slow
def test_report_from_results_json_only(first, shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    study = load_study(first.spec, tmp_path)
    with pytest.raises(UserError, match="no run of this spec has been started in this folder"):
        write_report(study)
    shutil.copy(first.work_dir / "results.json", tmp_path)
    write_report(study)
    for name in ("table.csv", "table.md"):
        assert (tmp_path / name).read_text() == (first.work_dir / name).read_text()


@pytest.mark.slow
def test_interrupted_and_resumed_study_equals_an_uninterrupted_one(ablate, environment, run_tool):
    arguments = ("--jobs", "1")
    listed = ablate("broken", TWO_SEEDS, "--list", epochs=2)
    work_dir = listed.work_dir
    command = [sys.executable, "tools/ablate.py", listed.spec, "--work-dir", work_dir, *arguments]
    train = work_dir / "runs/scratch/rfaconv/seed0/train"
    variables = {**environment, "PYTHONPATH": f"{listed.spec.parent}:{ROOT}", "HELD": str(train)}
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=variables)
    try:
        # Three batches per epoch, and the first of the second epoch.
        wait_until(lambda: batches(work_dir, "rfaconv", stage="scratch").count("\n") == 4, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) != 0
    finally:
        process.kill()
    record = json.loads((work_dir / "runs/scratch/rfaconv/seed0/record.json").read_text())
    assert record == dict(error=None)
    plain = work_dir / "runs/scratch/plain/seed0/record.json"
    before = plain.stat().st_mtime_ns
    # The stopped training is gone: its lock is free.
    done = ablate("broken", TWO_SEEDS, "--jobs", "2", epochs=2)
    assert done.returncode == 0, done.stdout
    assert "scratch/plain/seed0: already finished" in done.stdout
    assert plain.stat().st_mtime_ns == before
    log = (work_dir / "runs/scratch/rfaconv/seed0/log.txt").read_text()
    assert "--resume " in log
    # Run 1 was interrupted.
    whole = ablate("whole", TWO_SEEDS, "--run", "1", epochs=2)
    assert whole.returncode == 0, whole.stdout
    ours, theirs = (
        torch.load(folder / "runs/scratch/rfaconv/seed0/train/epoch_2.pth", weights_only=False)[
            "state_dict"
        ]
        for folder in (work_dir, whole.work_dir)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    results = json.loads((work_dir / "results.json").read_text())
    assert all(run["state"] == "finished" for run in results["runs"])
    # Seeds differ, and the warm start used the plain detector of the same seed.
    seeds = [batches(work_dir, "plain", seed, "scratch") for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    warm = (work_dir / "runs/warm_start/rfaconv/seed1/config.py").read_text()
    assert "runs/scratch/plain/seed1/train/epoch_2.pth" in warm


@pytest.mark.slow
def test_a_detector_that_finds_nothing_has_an_ap_of_zero(ablate):
    done = ablate("blind", 'methods = dict(plain={"model.test_cfg.score_thr": 1.1})\nseeds = (0,)')
    assert done.returncode == 0, done.stdout
    (run,) = json.loads((done.work_dir / "results.json").read_text())["runs"]
    assert (run["state"], run["test"]) == ("finished", 0.0)


def test_list_of_runs(tiny_config, shapes, tmp_path, monkeypatch, capsys):
    spec = tmp_path / "spec.py"
    spec.write_text(SPEC.format(tiny=str(tiny_config), epochs=1) + TWO_AND_A_WRONG_ONE)
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    monkeypatch.setattr(sys, "argv", ["ablate.py", str(spec), "--list"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(f"{ROOT}/tools/ablate.py", run_name="__main__")
    assert not stop.value.code
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[-3:]] == [
        ["0", "all/plain/seed0", "missing"],
        ["1", "all/rfaconv/seed0", "missing"],
        ["2", "all/wrong/seed0", "missing"],
    ]


def test_take(run_tool, fails, tiny_config, tmp_path, monkeypatch):
    spec = tmp_path / "spec.py"
    spec.write_text(SPEC.format(tiny=str(tiny_config), epochs=1) + TWO_AND_A_WRONG_ONE)
    monkeypatch.setenv("DATA_ROOT", "data/here")
    study = load_study(spec, tmp_path / "here")
    study.runs()[0].update(train=dict(memory_mb=1), test=dict(metrics={study.metric: 0.5}))
    collect(study, {}, {})
    results = tmp_path / "here" / "results.json"
    arguments = (spec, "--work-dir", tmp_path / "there", "--take", results, "--list")
    done = run_tool(sys.executable, "tools/ablate.py", *arguments, DATA_ROOT="data/there")
    assert done.returncode == 0
    told, *listed = done.stdout.splitlines()[-4:]
    assert told == f"finished runs taken from {results}: 1"
    assert [line.split() for line in listed] == [
        ["0", "all/plain/seed0", "finished"],
        ["1", "all/rfaconv/seed0", "missing"],
        ["2", "all/wrong/seed0", "missing"],
    ]
    spec.write_text(spec.read_text() + "methods['plain'] = {'model.backbone.depth': 34}")
    error = fails("ablate", *arguments)
    told = f"error: {results}: no finished run in it has a config of the study spec"
    assert error.strip() == told


def test_bad_input(fails, tiny_config, tmp_path):
    assert "no such file; did you mean shapes.py" in fails("ablate", "configs/ablation/shape.py")
    spec = tmp_path / "spec.py"
    spec.write_text(SPEC.format(tiny=str(tiny_config), epochs=1) + "methods = dict(plain=plain)")
    assert "--run 3: must be between 0 and 2" in fails("ablate", spec, "--run", "3")
    spec.write_text(spec.read_text() + "\nbase = 'none.py'")
    assert "base='none.py': no such file" in fails("ablate", spec)


def test_shipped_plugin_spec_has_both_starts():
    study = load_study(ROOT / "configs" / "ablation" / "shapes_plugins.py")
    starts = {}
    for run in study.runs("warm_start")[: len(study.methods)]:
        assert str(study.source(run)) == f"scratch/plain/seed{run.seed}"
        with torch.device("meta"):
            model = MODELS.build(study.config(run).model)
        layers = [m for m in model.modules() if hasattr(m, "output_scale")]
        starts[run.method] = {f"{type(m).__name__}-{m.start}" for m in layers}
    assert starts.pop("plain") == set()
    kinds = [f"{kind}-{s}" for kind in ("EMA", "CBAM", "SE") for s in ("paper", "identity")]
    assert starts == {kind: {kind} for kind in kinds}


@pytest.mark.parametrize(
    ("name", "methods", "classes"),
    [
        *(("shapes", 6, 4), ("bccd", 19, 3), ("bccd_small", 16, 3), ("bccd_small_why", 9, 3)),
        ("cards_small", 16, 6),
    ],
)
def test_shipped_specs_build(name, methods, classes, monkeypatch):
    for variable in ("DATA_ROOT", "CLASSES", "TEST_SET"):
        monkeypatch.setenv(variable, "")  # so it is removed afterwards
        monkeypatch.delenv(variable)
    study = load_study(ROOT / "configs" / "ablation" / f"{name}.py")
    assert study.baseline == "plain"
    assert len(study.methods) == methods
    for run in study.runs():
        if run.seed != 0:
            continue
        cfg = study.config(run)
        with torch.device("meta"):
            model = MODELS.build(cfg.model)
        assert model.bbox_head.num_classes == classes
        kinds = {type(m).__name__ for m in model.modules() if hasattr(m, "attention_map")}
        # Changes to RFAConv are named after the change.
        kind = "RFAConv" if name.endswith("_why") else run.method.removesuffix("-identity")
        assert kinds == set() if run.method == "plain" else kind in kinds
