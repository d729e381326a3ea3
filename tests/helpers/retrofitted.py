"""Thin detectors, plain and with RFAConv via Retrofit, and plain checkpoints of them."""

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from rfa_mmdet.config.plain import plain_base
from tests.helpers.norms import randomise_norms

# On top of the demo's thin RetinaNet, with mmdet's own ResNet.
RETINANET = """
_base_ = "{tiny}"
model = dict(backbone=dict(
    _delete_=True, type="ResNet", depth=18, base_channels=8, num_stages=4,
    out_indices=(0, 1, 2, 3), norm_cfg=dict(type="BN"), norm_eval=True))
"""
FASTER_RCNN = """
_base_ = "mmdet::_base_/models/faster-rcnn_r50_fpn.py"
custom_imports = dict(imports=["rfa_mmdet"])
default_scope = "mmdet"
model = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=3)),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20)))
"""
RETROFIT = """
_base_ = "{plain}"
model = dict(backbone=dict(
    _delete_=True, type="Retrofit", module={{{{_base_.model.backbone}}}},
    edits=[dict(where=r"layer[234]\\.\\d\\.conv1", conv=dict(type="{conv}")){more}]))
"""


def write_configs(folder, name: str, text: str, conv: str = "RFAConv", more: str = "") -> tuple:
    """Write the plain detector's config and the retrofitted one's; return both paths."""
    plain = folder / f"{name}.py"
    plain.write_text(text)
    path = folder / f"{name}-{conv.lower()}.py"
    path.write_text(RETROFIT.format(plain=plain, conv=conv, more=more))
    return plain, path


def build_plain(config) -> nn.Module:
    """Return the plain detector, with values that give detections of every score."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    randomise_norms(model)
    head = getattr(model, "bbox_head", None)
    if head is not None:  # RetinaNet's scores all start at 0.01
        nn.init.normal_(head.retina_cls.weight, std=0.2)
        nn.init.normal_(head.retina_reg.weight, std=0.05)
    return model.eval()


def save_plain(config, path):
    """Save the plain detector's checkpoint as in training; return the path."""
    classes = ("circle", "square", "triangle", "star")
    meta = dict(epoch=3, dataset_meta=dict(classes=classes))
    torch.save(dict(meta=meta, state_dict=build_plain(config).state_dict()), path)
    return path


def save_plain_detector(config, path) -> None:
    """Save the untrained thin detector without this package's layers."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    plain = MODELS.build(plain_base(Config.fromfile(config)).model)
    plain.init_weights()
    # ResNet starts its last norms at 0, which would stop the gradients.
    randomise_norms(plain)
    torch.save(dict(state_dict=plain.state_dict(), meta={}), path)
