"""Results of finished runs, and costs that are measured once."""

import math

import pytest
from mmengine.config import Config

from rfa_mmdet.errors import UserError
from rfa_mmdet.studies.costs import _digest, method_costs
from rfa_mmdet.studies.report import write_report
from rfa_mmdet.studies.results import collect
from rfa_mmdet.studies.run import Run
from rfa_mmdet.studies.study import load_study
from rfa_mmdet.studies.summary import summarise

SPEC = """
base = "base.py"
metric = "ap"
checkpoint = "best"
seeds = (0, 1, 2, 3)
methods = dict(plain={}, ours={"model.depth": 2})
"""
BASE = """
model = dict(type="A", depth=1)
train_dataloader = dict(batch_size=2)
test_dataloader = dict(batch_size=1)
"""


@pytest.fixture
def study(tmp_path):
    """A study whose runs are all finished; plain has 0.1 and the other method 0.2."""
    (tmp_path / "base.py").write_text(BASE)
    (tmp_path / "spec.py").write_text(SPEC)
    found = load_study(tmp_path / "spec.py", tmp_path / "work")
    for run in found.runs():
        finish(found, run, 0.1 if run.method == "plain" else 0.2)
    return found


def finish(study, run: Run, value: float) -> None:
    run.keep_scalars([{"step": step, "ap": step / 10} for step in (1, 2, 3)])
    (run.folder / "train" / "best_other_epoch_2.pth").touch()
    study.config(run).dump(run.config)
    run.update(train=dict(memory_mb=1), test=dict(metrics=dict(ap=value)))


def test_validation_is_that_of_the_tested_checkpoint(study):
    assert {run["val"] for run in collect(study, {}, {})["runs"]} == {0.2}
    for run in study.runs():
        (run.folder / "train" / "best_other_epoch_2.pth").unlink()
    assert {run["val"] for run in collect(study, {}, {})["runs"]} == {0.3}  # as in taken runs


@pytest.mark.parametrize("value", [math.nan, math.inf, "none"])
def test_metric_that_is_not_a_number_counts_as_a_failure(study, value):
    results = collect(study, {}, {})
    assert summarise(results)["verdict"].tolist() == ["", "better"]
    study.runs()[-1].update(test=dict(metrics=dict(ap=value)))
    results = collect(study, {}, {})
    assert results["runs"][-1]["state"] == "failed"
    assert results["runs"][-1]["error"] == f"metric='ap' is {value!r}, not a number"
    assert summarise(results)["verdict"].tolist() == ["", "cannot be tested"]


def test_costs_of_other_configs_are_measured_again(study, capsys):
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        method_costs(study, {})
    write_report(study)  # without costs
    assert "warning: costs not updated: " in capsys.readouterr().err
    digests = {run.method: _digest(Config.fromfile(run.config)) for run in study.runs()}
    known = dict(methods={}, digests=digests)
    assert method_costs(study, known) is known
    with pytest.raises(UserError):
        method_costs(study, dict(known, digests=dict(digests, ours="another")))
