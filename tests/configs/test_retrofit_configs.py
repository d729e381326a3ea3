"""Configs with Retrofit only differ in the backbone, with the same outputs as mmdet's."""

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict

from rfa_mmdet.checkpoints.retrofit import compare
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.layers import RFAConv
from tests.helpers.paths import ROOT
from tests.helpers.shipped import unscoped

CONFIGS = sorted((ROOT / "configs/rfaconv").glob("*.py"))
# Base name with "-rfaconv" after the backbone: mmdet's folder, model, names of its stages.
RETROFITTED = {
    "mask-rcnn_r50-rfaconv_fpn_1x_coco": ("mask_rcnn", "MaskRCNN", "layer"),
    "fcos_r50-caffe-rfaconv_fpn_gn-head_1x_coco": ("fcos", "FCOS", "layer"),
    "atss_r50-rfaconv_fpn_1x_coco": ("atss", "ATSS", "layer"),
    "rtmdet_s-rfaconv_8xb32-300e_coco": ("rtmdet", "RTMDet", "stage"),
    "yolox_s-rfaconv_8xb8-300e_coco": ("yolox", "YOLOX", "stage"),
}
BY_RETROFIT = [path for path in CONFIGS if path.stem in RETROFITTED]


@pytest.mark.parametrize("path", BY_RETROFIT, ids=lambda path: path.stem)
def test_configs_with_retrofit(path):
    from mmdet.registry import MODELS

    folder, model_name, stage = RETROFITTED[path.stem]
    assert path.parent.name == "rfaconv"
    cfg = Config.fromfile(path)
    cfg.launcher = "none"
    check_config(cfg)
    base = get_config(f"mmdet::{folder}/{path.stem.replace('-rfaconv', '')}.py")
    backbone = cfg.model.backbone
    assert set(backbone) == {"type", "module", "edits"}
    assert backbone.type == "Retrofit"
    # The base's backbone, including its pretrained weights.
    assert backbone.module == base.model.backbone
    assert backbone.module.get("init_cfg") == base.model.backbone.get("init_cfg")
    assert ("init_cfg" in backbone.module) == (model_name != "YOLOX")  # trains from scratch
    # Nothing else differs, except for the lines that name this package.
    own, theirs = unscoped(cfg.to_dict()), unscoped(base.to_dict())
    own["model"]["backbone"] = theirs["model"]["backbone"]
    assert own.pop("custom_imports") == dict(imports=["rfa_mmdet"])
    own.pop("launcher")
    hooks = [dict(type="EpochSeedHook"), dict(type="SyncBuffersHook")]  # from _base_/repeatable.py
    assert own.pop("custom_hooks") == theirs.pop("custom_hooks", []) + hooks
    assert own == theirs
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
        plain = MODELS.build(base.model)
    assert type(model).__name__ == model_name == type(plain).__name__
    assert type(model.backbone) is type(plain.backbone)
    layers = [name for name, m in model.named_modules() if isinstance(m, RFAConv)]
    assert {name.split(".")[1] for name in layers} == {f"{stage}{i}" for i in (2, 3, 4)}
    assert all(name.startswith("backbone.") for name in layers)
    assert set(model.backbone.new_layers.layers) == {n.removeprefix("backbone.") for n in layers}


def test_every_config_is_tested():
    assert {path.stem for path in BY_RETROFIT} == set(RETROFITTED)


@pytest.mark.slow
@pytest.mark.parametrize("path", BY_RETROFIT, ids=lambda path: path.stem)
def test_plain_checkpoint_gives_the_plain_outputs(path):
    from mmdet.registry import MODELS

    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    plain, net = (revert_sync_batchnorm(MODELS.build(c.model)) for c in (plain_base(cfg), cfg))
    load_state_dict(net, plain.state_dict(), strict=True)
    assert all(m.start.plain for m in net.modules() if isinstance(m, RFAConv))
    image = 255 * torch.rand(3, 256, 320)
    found = compare(plain, net, image)
    assert not found.changing
    parts = {"maps", "rpn_head", "roi_head"} if "mask-rcnn" in path.stem else {"maps", "bbox_head"}
    assert found.outputs.keys() == parts
    assert found.largest <= 1e-4
    # The outputs depend on the new layers.
    last = [m for m in net.modules() if isinstance(m, RFAConv)][-1]
    torch.nn.init.normal_(last.conv.weight)
    assert compare(plain, net, image).largest > 1e-3
