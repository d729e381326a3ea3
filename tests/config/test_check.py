"""Configs that the check rejects, and configs that it must accept."""

import re

import pytest
from mmdet.models import ResNet, RetinaNet
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.optim import AmpOptimWrapper
from torch import nn

from rfa_mmdet.config.check import check_config, check_run
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.layers import RFAConv
from rfa_mmdet.models.retrofit import retrofit

RETINANET = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
MASK_RCNN = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"


def changed(changes, base=RETINANET, **more):
    """Return a config of mmdet with changed entries."""
    cfg = get_config(base)
    cfg.launcher = "none"
    cfg.merge_from_dict({**changes, **more})
    return cfg


def albu(name):
    blur = dict(type="OneOf", transforms=[dict(type=name, p=1.0)])
    return dict(type="Albu", transforms=[blur], bbox_params=dict(type="BboxParams"))


class Strangers(nn.Module):
    """A class from a user's module, whose arguments are not checked."""


@pytest.mark.parametrize(
    "cfg",
    [
        changed({"train_dataloader.dataset.pipeline": [albu("MedianBlur")]}),
        changed({"model": dict(type=Strangers, part=dict(type="NotRegistered"))}),
        changed({"model.backbone": dict(type=ResNet, norm_cfg=dict(type=nn.BatchNorm2d))}),
        changed({"model.backbone": dict(type="ConvNeXt", _scope_="mmpretrain")}),
        changed({"train_dataloader.collate_fn": dict(type=len)}),
        changed({"model.backbone": dict(type=retrofit, module={}, edits=[])}),
        Config(dict(launcher="none", model=dict(type=RetinaNet), custom_hooks=[])),
    ],
)
def test_valid_configs_pass(cfg):
    check_config(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.neck.type": "FPNN"},
            r"neck\.type='FPNN' is not registered; did you mean FPN",
        ),
        (
            {"train_dataloader.dataset.pipeline": [dict(type="Albo", transforms=[])]},
            r"pipeline\[0\]\.type='Albo' is not registered; did you mean Albu",
        ),
        (
            {"optim_wrapper.type": AmpOptimWrapper},
            "type='AmpOptimWrapper'.*needs CUDA",
        ),
        ({"model": "RetinaNet"}, "model='RetinaNet': model must be a dict"),
        ({"model": dict(_delete_=True, backbone={})}, "model must be a dict with the 'type'"),
    ],
)
def test_invalid_configs_raise(changes, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        check_config(changed(changes))


def test_configs_of_old_mmdetection():
    old = dict(
        model=dict(type="RetinaNet"),
        data=dict(samples_per_gpu=2, train=dict(type="CocoDataset")),
        optimizer=dict(type="SGD", lr=0.01),
        evaluation=dict(interval=1),
        runner=dict(type="EpochBasedRunner", max_epochs=12),
    )
    with pytest.raises(ConfigError, match=r"2\.x: it has data, runner, optimizer.*migration"):
        check_config(Config(old))
    # In addition to keys of 3.x, it has no effect, which gives a warning.
    warnings = check_run(changed({"optimizer": dict(type="SGD", lr=9.0)}), ("train", "val"))
    assert warnings == ["optimizer: MMDetection 3.x ignores this key; use optim_wrapper"]
    optimizer = dict(type="SGD", lr=9.0)
    used = changed({"optimizer": optimizer, "data": dict(data_root="x")})
    used.optim_wrapper.optimizer = optimizer
    assert check_run(used, ("train", "val")) == []


LONGER = {"train_cfg.max_epochs": 13}
ITERATIONS = {"train_cfg": dict(_delete_=True, type="IterBasedTrainLoop", max_iters=900)}
COSINE = dict(type="CosineAnnealingLR", begin=2, T_max=10)
WARM_UP = dict(type="LinearLR", start_factor=0.001, begin=0, end=5)
STEPS = dict(type="MultiStepLR", milestones=[8, 11])


@pytest.mark.parametrize(
    ("schedule", "changes", "warning"),
    [
        (None, {"train_cfg.max_epochs": 24}, "max_epochs=24, but param_scheduler ends at 12: max_"),
        (None, {"train_cfg.max_epochs": 6}, "max_epochs=6, but param_scheduler ends at 12"),
        ([WARM_UP, COSINE], LONGER, "ends at 12"),
        (dict(a=[WARM_UP, COSINE], b=dict(type="StepLR", step_size=3)), {}, None),
        (dict(a=[WARM_UP], b=COSINE), LONGER, "ends at 12"),
        (COSINE, LONGER, "ends at 12"),
        ([dict(type="OneCycleLR", eta_max=1, total_steps=24)], {}, "ends at 24"),
        ([dict(WARM_UP, end=24)], {}, "ends at 24"),
        ([STEPS], {"train_cfg.max_epochs": 11}, r"has the milestones \[11\]: max_epochs does not"),
        ([dict(STEPS, begin=4)], {}, r"has the milestones \[8, 11\]"),
        (
            [dict(type="PolyLR", by_epoch=False, end=800)],
            ITERATIONS,
            "max_iters=900, but param_scheduler ends at 800: max_iters does not",
        ),
        ([WARM_UP, COSINE], {}, None),
        ([dict(COSINE, begin=0, end=10), dict(type="ConstantLR", begin=10)], {}, None),
        ([dict(type="StepLR", step_size=2, end=3), dict(type="ExponentialLR", begin=3)], {}, None),
        ([STEPS, dict(type="LinearMomentum", end=5)], {}, None),
        ([dict(STEPS, end=10**9)], {}, None),
        ([dict(WARM_UP, by_epoch=False, end=500)], ITERATIONS, None),
        ([WARM_UP], LONGER, None),
        ([], LONGER, None),
    ],
)
def test_schedule_of_another_length(schedule, changes, warning):
    cfg = changed(changes)
    if schedule is not None:
        cfg.param_scheduler = schedule
    found = check_run(cfg, ("train", "val"))
    assert len(found) == (warning is not None)
    assert warning is None or re.search(warning, found[0])
    assert check_run(cfg, ("test",)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_dataloader": None}, "has val_cfg and val_evaluator, but no val_dataloader"),
        ({"test_cfg": None}, "has test_dataloader and test_evaluator, but no test_cfg"),
        ({"train_dataloader": None, "optim_wrapper": None}, "no train_dataloader and no optim_wr"),
        ({"default_scope": None}, "add default_scope = 'mmdet'"),
        ({"val_evaluator.metric": ["bbox", "segm"]}, r"val_evaluator\.metric=.*'RetinaNet' has no"),
        (
            {"model.bbox_head": dict(type="Retrofit", module=dict(type="RetinaHead"), edits=[])}
            | {"val_evaluator.metric": "segm"},
            "masks",
        ),
    ],
)
def test_incomplete_runner_configs_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_run(changed(changes), ("train", "val"))


@pytest.mark.parametrize(
    "base", [MASK_RCNN, "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py"]
)
def test_masks_must_be_loaded_for_a_mask_head(base):
    cfg = changed({"train_dataloader.dataset.pipeline.1.with_mask": False}, base)
    with pytest.raises(
        ConfigError, match=r"^train_dataloader.dataset: the pipeline loads no masks"
    ):
        check_run(cfg, ("train", "val"))
    assert check_run(cfg, ("test",)) == []
    without = {"model.roi_head.mask_head": None, "model.roi_head.mask_roi_extractor": None}
    cfg.merge_from_dict({**without, "val_evaluator.metric": "bbox"})
    assert check_run(cfg, ("train", "val")) == []


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (MASK_RCNN, {}),
        ("mmdet::rtmdet/rtmdet-ins_s_8xb32-300e_coco.py", {}),
        ("mmdet::solo/solo_r50_fpn_1x_coco.py", {}),
        ("mmdet::yolact/yolact_r50_1xb8-55e_coco.py", {}),
        ("mmdet::queryinst/queryinst_r50_fpn_1x_coco.py", {}),
        ("mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", {}),
        (
            MASK_RCNN,
            {"model.roi_head": dict(_delete_=True, type="Retrofit", module=dict(mask_head={}))},
        ),
        (RETINANET, dict(val_dataloader=None, val_cfg=None, val_evaluator=None)),
    ],
)
def test_complete_runner_configs_pass(base, changes):
    assert check_run(changed(changes, base), ("train", "val")) == []


@pytest.mark.parametrize("kind", ["Retrofit", "mmdet.Retrofit", retrofit])
def test_plain_base_of_types_given_by_name_or_function(kind):
    conv = dict(type="RFAConv")
    backbone = dict(type=kind, module=dict(type=ResNet), edits=[dict(where="x", conv=conv)])
    head = dict(type="X", conv_cfg=dict(type=RFAConv))
    plain = plain_base(Config(dict(model=dict(type=RetinaNet, backbone=backbone, bbox_head=head))))
    assert plain.model.backbone == dict(type=ResNet)
    assert plain.model.bbox_head == dict(type="X")
