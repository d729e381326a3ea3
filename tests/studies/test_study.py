"""Valid specs, and errors for invalid ones."""

from functools import partial

import pytest

from rfa_mmdet.errors import ConfigError
from rfa_mmdet.studies.execute import run_config
from rfa_mmdet.studies.run import Run
from rfa_mmdet.studies.study import load_study

BASE = """
model = dict(type="A", backbone=dict(depth=18, rfa=dict(type="RFAConv")), plugins=[1, 2])
randomness = dict(seed=7, deterministic=True)
work_dir = "elsewhere"
root = "{{$ABLATION_TEST_ROOT:none}}"
"""
SPEC = """
base = "base.py"
metric = "ap"
methods = dict(
    plain={"model.backbone.rfa": None},
    ours=dict(model=dict(backbone=dict(depth=34))),
)
"""


@pytest.fixture
def spec(tmp_path):
    """Write a spec, read it."""
    (tmp_path / "base.py").write_text(BASE)

    def read(more=""):
        (tmp_path / "spec.py").write_text(SPEC + more)
        return load_study(tmp_path / "spec.py")

    return read


def test_methods_change_the_base(spec):
    found = spec("options = {'model.plugins': [3]}\nseeds = [4, 5]")
    assert [str(one) for one in found.runs()] == [
        f"all/{method}/seed{seed}" for seed in (4, 5) for method in ("plain", "ours")
    ]
    assert found.baseline == "plain"
    run = partial(Run, found.work_dir)
    plain, ours = (found.config(run("all", method, 5)) for method in ("plain", "ours"))
    assert plain.model.to_dict() == dict(type="A", backbone=dict(depth=18, rfa=None), plugins=[3])
    assert ours.model.backbone.to_dict() == dict(depth=34, rfa=dict(type="RFAConv"))
    assert plain.randomness == dict(seed=5, deterministic=True)
    assert "work_dir" not in plain
    # Runs have independent configs: another run has not changed the base.
    assert found.config(run("all", "ours", 4)).randomness.seed == 4


def test_stages_start_from_the_baselines_run_with_the_same_or_first_seed(spec):
    found = spec(
        "stages = dict(first=dict(seeds=[0, 1], methods=['plain']),"
        " next=dict(load_from='first', options={'model.backbone.depth': 50}))"
    )
    run = partial(Run, found.work_dir)
    assert found.source(run("first", "plain", 0)) is None
    assert found.source(run("next", "ours", 1)) == run("first", "plain", 1)
    assert found.source(run("next", "ours", 2)) == run("first", "plain", 0)
    assert len(found.runs()) == 2 + 6
    assert found.config(run("first", "plain", 0)).model.backbone.depth == 18
    assert found.config(run("next", "plain", 0)).model.backbone.depth == 50
    # The method's own change comes after the stage's.
    assert found.config(run("next", "ours", 0)).model.backbone.depth == 34


def test_finished_runs_of_another_start_are_refused(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # has the work dir
    stages = "stages = dict(a=dict(), b=dict(load_from='a'{}))"
    found = spec(stages.format(""))
    run = Run(found.work_dir, "b", "ours", 0)
    cfg = found.config(run)
    # Its work dir has moved since.
    cfg.load_from = str(tmp_path / "moved/runs/a/plain/seed0/train/best_ap_epoch_3.pth")
    run.folder.mkdir(parents=True)
    cfg.dump(run.config)
    run_config(found, run)
    with pytest.raises(ConfigError, match=r"another config \(different: load_from\)"):
        run_config(spec(stages.format(", load_method='own'")), run)


def test_runs_from_an_earlier_training_or_with_another_test_are_refused(
    spec, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # has the work dir
    found = spec("stages = dict(a=dict(), b=dict(load_from='a'))")
    source, run = (Run(found.work_dir, stage, "plain", 0) for stage in "ab")
    source.update(train=dict(id="1"))
    run.folder.mkdir(parents=True)
    found.config(run).dump(run.config)
    run.update(train=dict(id="2", source="1"), test=dict(checkpoint="last"))
    run_config(found, run)
    source.update(train=dict(id="3"))
    with pytest.raises(ConfigError, match="was started from an earlier training of a/plain/seed0"):
        run_config(found, run)
    source.update(train={})  # by an earlier version, which recorded no ids
    run_config(found, run)
    best = spec("stages = dict(a=dict(), b=dict(load_from='a'))\ncheckpoint = 'best'")
    with pytest.raises(
        ConfigError, match="tested the last checkpoint, but the spec has checkpoint='best'"
    ):
        run_config(best, run)


def test_stage_continues_the_runs_of_its_own_methods(spec):
    stages = "stages = dict(first=dict(seeds=[0, 1]), next=dict(load_from='first'{}))"
    run = partial(Run, spec().work_dir)
    for more, method in (("", "plain"), (", load_method='own'", "ours")):
        found = spec(stages.format(more))
        assert found.source(run("next", "ours", 1)) == run("first", method, 1)
        assert found.source(run("next", "ours", 2)) == run("first", method, 0)
        assert found.source(run("next", "plain", 1)) == run("first", "plain", 1)


def test_environment_defaults_are_set(spec, monkeypatch):
    monkeypatch.setenv("ABLATION_TEST_ROOT", "mine")
    text = "environment = dict(ABLATION_TEST_ROOT='theirs')"
    assert spec(text).base.root == "mine"
    monkeypatch.delenv("ABLATION_TEST_ROOT")
    assert spec(text).base.root == "theirs"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("method = dict()", "unknown key 'method'; did you mean methods?"),
        ("base = 'none.py'", "base='none.py': no such file"),
        ("base = 'mmdet::none.py'", "base='mmdet::none.py'"),
        ("del metric", "missing metric"),
        ("methods = dict()", "methods={}: must be a non-empty dict"),
        ("methods = dict(a=1)", "methods.a=1: must be a dict of changes"),
        ("methods = {'a/b': dict()}", "methods: 'a/b' names a folder"),
        ("methods = {201 * 'a': dict()}", "is too long to name a folder"),
        ("methods = dict(truth=dict())", "methods: 'truth' is reserved"),
        ("stages = dict(report=dict())", "stages: 'report' is reserved"),
        ("methods = dict(a={'model.type.x': 1})", "methods.a: does not fit the base config"),
        (
            "methods = dict(a={'modle.type': 1})",
            "methods.a: modle.type=...: unknown config key 'modle'; did you mean model",
        ),
        ("options = {'root': 1}", "options: root=...: root is a variable of the config file"),
        ("options = [1]", "options=[1]: must be a dict of dotted keys"),
        ("options = {1: 2}", "options={1: 2}: must be a dict of dotted keys"),
        (
            "stages = dict(a=dict(options={'optim_wraper.lr': 1}))",
            "stages.a.options: optim_wraper.lr=...: unknown config key",
        ),
        ("environment = ['A']", "environment=['A']: must be a dict"),
        ("baseline = 'none'", "baseline='none': must be one of ['plain', 'ours']"),
        ("seeds = []", "seeds=[]: must be a list of ints"),
        ("seeds = [1, 1]", "seeds must be unique"),
        ("seeds = [True]", "must be a list of ints"),
        ("checkpoint = 'first'", "checkpoint='first': must be 'last' or 'best'"),
        ("samples = -1", "samples=-1: must be an int"),
        (
            "stages = dict(a=dict(load='b'))",
            "stages.a: unknown key 'load'; choose from methods, seeds",
        ),
        (
            "stages = dict(a=dict(load_from='b'))",
            "stages.a.load_from='b': must be an earlier stage",
        ),
        ("stages = dict(a=dict(methods=['x']))", "stages.a.methods: 'x' is not one of"),
        (
            "stages = dict(a=dict(methods=['ours']), b=dict(load_from='a'))",
            "stages.b.load_from='a': does not train 'plain'",
        ),
        (
            "stages = dict(a=dict(methods=['plain']), b=dict(load_from='a', load_method='own'))",
            "stages.b.load_from='a': does not train 'ours'",
        ),
        (
            "stages = dict(a=dict(), b=dict(load_from='a', load_method='ours'))",
            "stages.b.load_method='ours': must be 'baseline' or 'own'",
        ),
        ("stages = dict(a=dict(load_method='own'))", "stages.a.load_method='own': needs load_from"),
        ("x = (", "spec="),
    ],
)
def test_bad_specs(spec, more, message):
    def build():
        found = spec(more)
        return [found.config(run) for run in found.runs()]

    with pytest.raises(ConfigError) as error:
        build()
    assert message in str(error.value)
