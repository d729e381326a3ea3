"""Every shipped config: its name, its model, and that it differs from its base where it should."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict

from rfa_mmdet.engine.config_check import check_config
from rfa_mmdet.engine.plain_config import plain_base
from rfa_mmdet.engine.retrofit_checkpoint import compare
from rfa_mmdet.layers import EMA, ConAM, RFAConv

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(
    path for path in ROOT.glob("configs/*/*.py") if not path.is_relative_to(ROOT / "configs/_base_")
)
METHODS = {"rfaconv": RFAConv, "ema": EMA, "conam": ConAM}
# {model}_{backbone}-{method}_{neck}_{schedule}_{data set}
NAME = re.compile(
    r"(retinanet|faster-rcnn)_(r\d+)-(\w+)_(fpn)_(\d+[xe])_(coco|voc0712|shapes|custom-(coco|voc))"
)
# The base's name with "-rfaconv" behind the backbone: mmdet's folder, the model, its stages' name.
RETROFITTED = {
    "mask-rcnn_r50-rfaconv_fpn_1x_coco": ("mask_rcnn", "MaskRCNN", "layer"),
    "fcos_r50-caffe-rfaconv_fpn_gn-head_1x_coco": ("fcos", "FCOS", "layer"),
    "atss_r50-rfaconv_fpn_1x_coco": ("atss", "ATSS", "layer"),
    "rtmdet_s-rfaconv_8xb32-300e_coco": ("rtmdet", "RTMDet", "stage"),
    "yolox_s-rfaconv_8xb8-300e_coco": ("yolox", "YOLOX", "stage"),
}
BY_RETROFIT = [path for path in CONFIGS if path.stem in RETROFITTED]


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path not in BY_RETROFIT], ids=lambda path: path.stem
)
def test_config(path):
    from mmdet.registry import MODELS

    match = NAME.fullmatch(path.stem)
    assert match, "name is not by OpenMMLab's rule"
    model_name, backbone, method, _, schedule, data = match.groups()[:6]
    assert path.parent.name in (method, "demo", "custom")
    cfg = Config.fromfile(path)
    cfg.launcher = "none"
    check_config(cfg)
    if cfg.model.backbone.get("init_cfg"):
        assert cfg.model.backbone.init_cfg.checkpoint == f"torchvision://resnet{backbone[1:]}"
    epochs = {"1x": 4 if data == "voc0712" else 12}.get(schedule) or int(schedule[:-1])
    assert cfg.train_cfg.max_epochs == epochs
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert (
        type(model).__name__ == {"retinanet": "RetinaNet", "faster-rcnn": "FasterRCNN"}[model_name]
    )
    assert model.backbone.depth == int(backbone[1:])
    head = model.bbox_head if model_name == "retinanet" else model.roi_head.bbox_head
    classes = {"coco": 80, "voc0712": 20, "shapes": 4}.get(data, 1)
    assert head.num_classes == classes
    layers = [name for name, m in model.named_modules() if isinstance(m, METHODS[method])]
    stages = {name.split(".")[1] for name in layers}
    assert stages == {"layer2", "layer3", "layer4"}
    assert all(name.startswith("backbone.") for name in layers)


def unscoped(node):
    """A config without the scope that MMEngine notes in what comes from mmdet's own files."""
    if isinstance(node, dict):
        return {key: unscoped(value) for key, value in node.items() if key != "_scope_"}
    return [unscoped(value) for value in node] if isinstance(node, (list, tuple)) else node


@pytest.mark.parametrize("path", BY_RETROFIT, ids=lambda path: path.stem)
def test_config_by_retrofit(path):
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
    # The base's own, its pretrained weights with it.
    assert backbone.module == base.model.backbone
    assert backbone.module.get("init_cfg") == base.model.backbone.get("init_cfg")
    assert ("init_cfg" in backbone.module) == (model_name != "YOLOX")  # which starts from scratch
    # Nothing else differs, but for the lines that name this package.
    own, theirs = unscoped(cfg.to_dict()), unscoped(base.to_dict())
    own["model"]["backbone"] = theirs["model"]["backbone"]
    assert own.pop("custom_imports") == dict(imports=["rfa_mmdet"])
    own.pop("launcher")
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
def test_from_the_plain_checkpoint_it_computes_what_the_plain_detector_does(path):
    from mmdet.registry import MODELS

    cfg = Config.fromfile(path)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    plain, net = (revert_sync_batchnorm(MODELS.build(c.model)) for c in (plain_base(cfg), cfg))
    load_state_dict(net, plain.state_dict(), strict=True)
    assert all(m.start.plain for m in net.modules() if isinstance(m, RFAConv))
    image = 255 * torch.rand(3, 256, 320)
    found = compare(plain, net, image)
    assert not found.plugins
    parts = {"maps", "rpn_head", "roi_head"} if "mask-rcnn" in path.stem else {"maps", "bbox_head"}
    assert found.outputs.keys() == parts
    assert found.largest <= 1e-4
    # And it is they that compute it.
    last = [m for m in net.modules() if isinstance(m, RFAConv)][-1]
    torch.nn.init.normal_(last.conv.weight)
    assert compare(plain, net, image).largest > 1e-3


def test_every_method_has_both_detectors_on_both_data_sets():
    names = {path.stem for path in CONFIGS}
    wanted = {
        f"{model}_r50-{method}_fpn_1x_{data}"
        for model in ("retinanet", "faster-rcnn")
        for method in METHODS
        for data in ("coco", "voc0712")
    }
    assert wanted <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_a_few_lines_over_a_base(path):
    if path.parent.name != "demo":
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= 16
    assert "_base_" in path.read_text()


def test_custom_template_takes_root_and_classes_from_the_environment(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/some/where")
    monkeypatch.setenv("CLASSES", "traffic light, car")
    for data in ("coco", "voc"):
        cfg = Config.fromfile(
            ROOT / f"configs/custom/retinanet_r18-rfaconv_fpn_50e_custom-{data}.py"
        )
        assert cfg.model.bbox_head.num_classes == 2
        for split in ("train", "val", "test"):
            dataset = cfg[f"{split}_dataloader"].dataset
            assert dataset.metainfo.classes == ("traffic light", "car")
            assert dataset.data_root == "/some/where/"
