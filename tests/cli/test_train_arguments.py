"""Arguments of tools/train.py applied to configs of every style."""

from argparse import Namespace

import pytest
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.visualization import TensorboardVisBackend

from rfa_mmdet.cli import test
from rfa_mmdet.cli.train import apply_args
from rfa_mmdet.errors import ConfigError
from tests.helpers.paths import ROOT

ARGS = dict(amp=False, auto_scale_lr=False, resume=None, tensorboard=False)


def applied(cfg, launcher="none", **args):
    cfg = Config({"launcher": launcher, "train_dataloader": {}, **cfg})
    apply_args(cfg, Namespace(**{**ARGS, **args}))
    return cfg


@pytest.mark.parametrize("kind", [OptimWrapper, "OptimWrapper", "mmengine.OptimWrapper", None])
def test_amp_replaces_the_plain_wrapper(kind):
    given = dict(type=kind) if kind else {}
    wrapper = applied(dict(optim_wrapper=given), amp=True).optim_wrapper
    assert wrapper == dict(type="AmpOptimWrapper", loss_scale="dynamic")


def test_amp_is_kept_and_other_wrappers_raise():
    given = dict(type=AmpOptimWrapper, loss_scale=2.0)
    assert applied(dict(optim_wrapper=given), amp=True).optim_wrapper.loss_scale == 2.0
    with pytest.raises(ConfigError, match=r"optim_wrapper\.type='CheckpointHook' is not supp"):
        applied(dict(optim_wrapper=dict(type=CheckpointHook)), amp=True)


def test_tensorboard_given_as_a_class_is_not_added_again():
    backends = [dict(type=TensorboardVisBackend)]
    visualizer = dict(type=DetLocalVisualizer, vis_backends=backends)
    assert applied(dict(visualizer=visualizer), tensorboard=True).visualizer == visualizer


def test_learning_rate_is_scaled_once():
    hooks = [dict(type="EMAHook")]
    cfg = applied(dict(custom_hooks=hooks, custom_imports=dict(imports="other")))
    assert cfg.custom_hooks == hooks
    assert cfg.custom_imports == dict(imports="other")
    assert cfg.train_dataloader == {}


def test_third_party_checkpoint_hooks_are_left_alone():
    evaluator = dict(type="CocoMetric")
    for kind, expected in ((CheckpointHook, "auto"), ("CheckpointHook", "auto"), ("Mine", None)):
        hooks = dict(checkpoint=dict(type=kind))
        cfg = applied(dict(val_evaluator=evaluator, default_hooks=hooks))
        assert cfg.default_hooks.checkpoint.get("save_best") == expected


def test_other_runner_types_raise():
    cfg = Config(dict(runner_type="FlexibleRunner"))
    with pytest.raises(
        ConfigError, match=r"^runner_type='FlexibleRunner': this tool only supports"
    ):
        apply_args(cfg, Namespace(**ARGS))


def test_resuming_without_a_checkpoint_starts_from_load_from(tmp_path):
    """A warm start that was killed before its first checkpoint is still a warm start."""
    given = dict(work_dir=str(tmp_path), load_from="plain.pth")
    cfg = applied(given, resume="auto")
    assert (cfg.resume, cfg.load_from) == (False, "plain.pth")
    (tmp_path / "epoch_1.pth").touch()
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    cfg = applied(given, resume="auto")
    assert (cfg.resume, cfg.load_from) == (True, None)
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_2.pth"))
    with pytest.raises(ConfigError, match=r"epoch_2\.pth', which does not exist; pass another"):
        applied(given, resume="auto")


def test_a_test_with_the_config_of_a_resumed_training_does_not_resume(tmp_path):
    (tmp_path / "a.pth").touch()
    cfg = Config(dict(resume=True, load_from=None))
    args = Namespace(checkpoint=str(tmp_path / "a.pth"), out=None, tta=False, show_dir=None)
    test.apply_args(cfg, args)
    assert (cfg.resume, cfg.load_from) == (False, args.checkpoint)


def test_augmented_pipeline_packs_what_the_original_one_does(monkeypatch):
    for name, value in dict(DATA_ROOT="data", CLASSES="a,b").items():
        monkeypatch.setenv(name, value)
    cfg = Config.fromfile(ROOT / "configs/custom/retinanet_r18-rfaconv_fpn_50e_custom-voc.py")
    pack = dict(type="PackDetInputs", meta_keys=("img_id", "flip"))
    transforms = [[dict(type="RandomFlip", prob=p) for p in (0.0, 1.0)], [pack]]
    cfg.tta_pipeline = [dict(type="TestTimeAug", transforms=transforms)]
    cfg.tta_model = dict(type="DetTTAModel")
    test.augment(cfg)
    (augmented,) = cfg.test_dataloader.dataset.pipeline
    keys = augmented.transforms[1][0].meta_keys
    assert keys[:2] == ("img_id", "flip")
    assert {"instances", "scale_factor"} < set(keys)
