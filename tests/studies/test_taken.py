"""Runs taken from a results.json give the results that they had."""

import json

import pytest

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.studies import load_study, take_runs
from rfa_mmdet.studies.execute import RunFailed, execute
from rfa_mmdet.studies.results import collect

SPEC = """
base = "base.py"
metric = "coco/bbox_mAP"
seeds = (0, 1)
methods = dict(plain={}, other={"model.plugins": [1]})
stages = dict(
    scratch=dict(), warm_start=dict(load_from="scratch", seeds=[1], options={"x.y": (1, 2)})
)
"""


@pytest.fixture
def study(tmp_path):
    """Load the spec with another work dir, and maybe more lines."""
    (tmp_path / "base.py").write_text(
        "model = dict(plugins=None)\nx = dict(y=0)\ntrain_dataloader = dict()\n"
        "test_dataloader = dict()\n"
    )

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
    (started,) = (run for run in there.runs("warm_start") if run.method == "plain")
    taken = there.runs()[0]
    for name in ("config.py", "record.json"):  # seed 1, as this stage starts from it
        source = there.source(started).folder
        source.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((taken.folder / name).read_bytes())
    there.config(there.source(started)).dump(source / "config.py")
    with pytest.raises(RunFailed, match="scratch/plain/seed1, which has no checkpoint in"):
        execute(there, started)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("metric = 'coco/bbox_mAP_50'", "metric"),
        ("checkpoint = 'best'", "checkpoint"),
        ("methods = dict(plain={})", "methods"),
        ("stages = dict(scratch=dict())", "stages"),
    ],
)
def test_results_of_another_study(study, results, more, what):
    with pytest.raises(ConfigError, match=rf"belongs to another study \(different: .*{what}"):
        take_runs(study("there", more), results)


def test_damaged_and_missing_files(study, tmp_path):
    (tmp_path / "damaged.json").write_text('{"runs": [')
    for name in ("damaged.json", "missing.json"):
        with pytest.raises(UserError, match=r"must be a results\.json of tools/ablate\.py"):
            take_runs(study("there"), tmp_path / name)
