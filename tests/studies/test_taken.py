"""Runs taken from a results.json give the results that they had."""

import json
from contextlib import contextmanager

import pytest

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.studies import Run, load_study, take_runs
from rfa_mmdet.studies.execute import RunFailed, execute
from rfa_mmdet.studies.results import collect
from rfa_mmdet.studies.taken import fingerprint
from tests.helpers.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "ablation"
BASE = """
data_root = "{{$DATA_ROOT:data/here}}/"
model = dict(plugins=None)
train_cfg = dict(y=0)
train_dataloader = dict(dataset=dict(ann_file=data_root + "train.json"))
test_dataloader = dict()
"""
SPEC = """
base = "base.py"
metric = "coco/bbox_mAP"
seeds = (0,)
methods = dict(plain={}, other={"model.plugins": [1]})
stages = dict(scratch=dict(), warm_start=dict(load_from="scratch", options={"train_cfg.y": (1, 2)}))
"""


@pytest.fixture
def study(tmp_path):
    """Load the spec with another work dir, and maybe more lines."""
    (tmp_path / "base.py").write_text(BASE)

    def load(name, more=""):
        (tmp_path / "spec.py").write_text(SPEC + more)
        return load_study(tmp_path / "spec.py", tmp_path / name)

    return load


@pytest.fixture
def results(study):
    """The results.json of a study with a finished and an interrupted run."""
    here = study("here")
    for run, done in zip(here.runs(), (True, False), strict=False):
        run.folder.mkdir(parents=True)
        here.config(run).dump(run.config)
        run.keep_scalars(
            [{"step": n, "loss": 1 / n} for n in (10, 20)]
            + [{"step": n, "coco/bbox_mAP": n / 10} for n in (1, 2)]
        )
        if done:
            test = dict(metrics={"coco/bbox_mAP": 0.25, "coco/bbox_mAP_50": 0.5})
            run.update(train=dict(memory_mb=7), test=test)
    collect(here, {}, {})
    return here.work_dir / "results.json"


def test_taken_runs_have_the_same_results(study, results):
    there = study("there")
    assert [str(run) for run in take_runs(there, results)] == ["scratch/plain/seed0"]
    before = json.loads(results.read_text())["runs"]
    after = collect(there, {}, {})["runs"]
    assert json.loads(json.dumps(after[0])) == before[0]
    assert before[1]["state"] == "started"
    assert after[1]["state"] == "missing"
    execute(there, there.runs()[0])  # nothing is left to do
    assert take_runs(there, results) == []


def test_runs_that_exist_are_kept(study, results):
    there = study("there")
    run = there.runs()[0]
    run.folder.mkdir(parents=True)
    there.config(run).dump(run.config)
    assert take_runs(there, results) == []
    assert not run.finished


def test_runs_cannot_start_from_taken_ones(study, results):
    there = study("there")
    take_runs(there, results)
    with pytest.raises(RunFailed, match="scratch/plain/seed0, which has no checkpoint in"):
        execute(there, there.runs("warm_start")[0])


def test_interrupted_take_is_repeated(study, results, monkeypatch):
    there = study("there")
    with monkeypatch.context() as patch:
        patch.setattr("rfa_mmdet.studies.taken.write_json", lambda path, content: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take_runs(there, results)
    assert take_runs(there, results) == there.runs()[:1]
    assert there.runs()[0].finished


@pytest.mark.parametrize("act", [take_runs, lambda study, results: execute(study, study.runs()[0])])
def test_runs_taken_by_another_process_meanwhile(study, results, monkeypatch, act):
    there, locked = study("there"), Run.locked

    @contextmanager
    def locked_after_another(run):
        monkeypatch.setattr(Run, "locked", locked)
        assert take_runs(there, results) == [run]
        with run.locked() as lock:
            yield lock

    monkeypatch.setattr(Run, "locked", locked_after_another)
    assert not act(there, results)
    assert there.runs()[0].finished


def test_data_may_be_elsewhere(study, results, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/else/where")
    there = study("there")
    assert there.base.train_dataloader.dataset.ann_file == "/else/where/train.json"
    assert len(take_runs(there, results)) == 1


@pytest.mark.parametrize("name", ["bccd_small", "bccd_small_why", "cards_small", "shapes"])
def test_committed_results_are_those_of_the_shipped_specs(name, tmp_path, monkeypatch):
    for variable in ("DATA_ROOT", "CLASSES", "TEST_SET"):
        monkeypatch.setenv(variable, "")  # so it is removed afterwards
        monkeypatch.delenv(variable)
    study = load_study(ROOT / "configs" / "ablation" / f"{name}.py", tmp_path)
    results = json.loads((RESULTS / f"{name}.json").read_text())
    found = {(r["stage"], r["method"], r["seed"]): r["fingerprint"] for r in results["runs"]}
    assert found == {(r.stage, r.method, r.seed): fingerprint(study, r) for r in study.runs()}


@pytest.mark.parametrize(
    "more",
    [
        "metric = 'coco/bbox_mAP_50'",
        "checkpoint = 'best'",
        "options = {'train_cfg.z': 1}",
        "methods['plain'] = {'model.plugins': [2]}",
        "seeds = (1,)",
    ],
)
def test_results_of_other_configs(study, results, more):
    with pytest.raises(ConfigError, match="no finished run in it has a config of the study spec"):
        take_runs(study("there", more), results)


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("seeds = (1, 0)", ["scratch/plain/seed0"]),
        ("methods = dict(base={}, third={'train_cfg.y': 3})", ["scratch/base/seed0"]),
        ("stages = dict(first=dict())", ["first/plain/seed0"]),
        ("methods['plain_again'] = {}", ["scratch/plain/seed0", "scratch/plain_again/seed0"]),
    ],
)
def test_another_study_takes_runs_of_the_same_config(study, results, more, names):
    there = study("there", more)
    assert [str(run) for run in take_runs(there, results)] == names


def test_runs_of_a_warm_start_depend_on_the_first_training(study):
    here, there = study("here"), study("there", "methods['plain'] = {'train_cfg.y': 5}")
    ours, theirs = (one.runs("warm_start")[1] for one in (here, there))
    assert here.config(ours).to_dict() == there.config(theirs).to_dict()
    assert fingerprint(here, ours) != fingerprint(there, theirs)


def test_results_without_fingerprints(study, results):
    content = json.loads(results.read_text())
    del content["runs"][0]["fingerprint"]
    results.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="did not record the runs' configs"):
        take_runs(study("there"), results)


def test_results_of_a_study_with_a_method_that_does_not_fit(study):
    there = study("there", "methods['other'] = {'data_root.x': 1}")
    runs = collect(there, {}, {})["runs"]
    assert [run["state"] for run in runs] == ["missing"] * 4
    assert [bool(run["fingerprint"]) for run in runs] == [True, False] * 2


def test_results_of_runs_with_another_config_do_not_count(study, results):
    changed = collect(study("here", "methods['plain'] = {'train_cfg.y': 5}"), {}, {})["runs"]
    assert (changed[0]["state"], changed[0]["fingerprint"]) == ("failed", None)
    assert "contains a run with another config (different: train_cfg)" in changed[0]["error"]
    with pytest.raises(ConfigError, match="no finished run in it"):
        take_runs(study("there", "methods['plain'] = {'train_cfg.y': 5}"), results)


def test_damaged_and_missing_files(study, tmp_path):
    (tmp_path / "damaged.json").write_text('{"runs": [')
    for name in ("damaged.json", "missing.json"):
        with pytest.raises(UserError, match=r"must be a results\.json of tools/ablate\.py"):
            take_runs(study("there"), tmp_path / name)
