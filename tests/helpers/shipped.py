"""The shipped configs, and the meaning of their names."""

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from rfa_mmdet import layers
from tests.helpers.paths import ROOT

# Those of ablation are specs, tested in tests/cli/test_ablate.py; those of other packages have
# tests of their own.
ELSEWHERE = ("_base_", "ablation", "mmpretrain", "mmseg", "mmyolo")
CONFIGS = sorted(p for p in ROOT.glob("configs/*/*.py") if p.parent.name not in ELSEWHERE)
# File and folder name -> class of each method.
METHODS = {name.lower(): getattr(layers, name) for name in layers.__all__}
# Methods shipped for more than RetinaNet and Faster R-CNN on COCO.
MAIN = ("rfaconv", "ema", "conam")
# mmdet's class of each detector and its name without the backbone.
DETECTORS = {
    "retinanet": "RetinaNet",
    "faster-rcnn": "FasterRCNN",
    "mask-rcnn": "MaskRCNN",
    "cascade-rcnn": "CascadeRCNN",
    "fcos": "FCOS",
    "atss": "ATSS",
    "rtmdet": "RTMDet",
    "yolox": "YOLOX",
}
CLASS_COUNT = {"coco": 80, "voc0712": 20, "visdrone": 10, "shapes": 4}
# Blocks of stages 2 to 4; each has one layer.
BLOCKS = {"r18": 6, "r50": 13, "r101": 30, "rtmdet_s": 5, "yolox_s": 7}
# {model}_{backbone}-{method}_{neck}_{schedule}_{dataset}, after OpenMMLab
NAME = re.compile(
    rf"(?P<model>{'|'.join(DETECTORS)})"
    rf"_(?P<backbone>r\d+|s)(?P<style>-caffe)?-(?P<method>{'|'.join(METHODS)})"
    r"(?P<neck>_fpn)?(?P<head>_gn-head)?"
    r"_(?P<schedule>\dx|\d+e|8xb\d+-300e)"
    r"_(?P<data>coco|voc0712|visdrone|shapes|custom-coco|custom-voc|roboflow)"
)

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def parts_of(path: Path) -> dict[str, str]:
    match = NAME.fullmatch(path.stem)
    assert match, f"{path.stem} is not {{model}}_{{backbone}}-{{method}}_{{neck}}_{{schedule}}_..."
    return match.groupdict()


def method_layers(path: Path, model: nn.Module) -> dict[str, nn.Module]:
    method = METHODS[parts_of(path)["method"]]
    return {name: m for name, m in model.named_modules() if isinstance(m, method)}


def nodes(node: Any) -> Iterator[dict]:
    """Yield all dicts of a config."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from nodes(value)


def unscoped(node: Any) -> Any:
    """Return a config without the scope that MMEngine adds for the files of another package."""
    if isinstance(node, dict):
        return {key: unscoped(value) for key, value in node.items() if key != "_scope_"}
    return [unscoped(value) for value in node] if isinstance(node, (list, tuple)) else node


def build(cfg: dict) -> nn.Module:
    from mmdet.registry import MODELS

    init_default_scope("mmdet")
    return MODELS.build(cfg)


@cache
def read(path: Path) -> Config:
    """Read a config once for all tests that do not modify it."""
    return Config.fromfile(path)


@cache
def planned(path: Path) -> nn.Module:
    """Build a config's model without allocating its weights."""
    with torch.device("meta"):
        return build(copy.deepcopy(read(path).model))  # mmdet completes the heads' dicts
