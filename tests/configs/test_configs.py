"""Every shipped config: its name, its model, and that it differs from its base where it should."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from rfa_mmdet.engine.config_check import check_config
from rfa_mmdet.layers import EMA, ConAM, RFAConv

ROOT = Path(__file__).resolve().parents[2]
# Those of ablation say which runs to compare; tests/tools/test_ablate.py reads them.
CONFIGS = sorted(
    path for path in ROOT.glob("configs/*/*.py") if path.parent.name not in ("_base_", "ablation")
)
METHODS = {"rfaconv": RFAConv, "ema": EMA, "conam": ConAM}
# {model}_{backbone}-{method}_{neck}_{schedule}_{data set}
NAME = re.compile(
    r"(retinanet|faster-rcnn)_(r\d+)-(\w+)_(fpn)_(\d+[xe])_(coco|voc0712|shapes|custom-(coco|voc))"
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
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
