"""Complexity of detectors for images with any number of channels."""

import pytest
from mmengine.hub import get_config
from torch import nn

from rfa_mmdet.analysis.complexity import detector_complexity
from rfa_mmdet.errors import ConfigError

SIDE = 64


class Backbone(nn.Module):
    """Two maps of eight channels; the stem is registered last."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.stem = stem

    def forward(self, x):
        x = self.stem(x)
        return x, self.down(x)


class Patches(nn.Module):
    """Pixels become channels without a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels * 16, 8)

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return self.linear(x).permute(0, 3, 1, 2)


STEMS = {
    "one channel": lambda: nn.Conv2d(1, 8, 3, 4, 1),
    "four channels": lambda: nn.Conv2d(4, 8, 3, 4, 1),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1, groups=3), nn.Conv2d(6, 8, 1)),
    "space to depth": lambda: nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 8, 1)),
    "one channel, to depth": lambda: nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16, 8, 1)),
    "no convolution": lambda: Patches(3),
    "no convolution, four": lambda: Patches(4),
    "more than a photograph": lambda: nn.Conv2d(13, 8, 3, 4, 1),
}


def config(stem):
    cfg = get_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    cfg.model.backbone = dict(type=Backbone, stem=stem)
    cfg.model.neck.update(in_channels=[8, 8], out_channels=8, start_level=0)
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8, stacked_convs=1, num_classes=2)
    return cfg


@pytest.mark.parametrize("stem", STEMS)
def test_inputs_take_their_channels_from_the_model(stem):
    made = STEMS[stem]()
    found = detector_complexity(config(made), (SIDE, SIDE))
    rest = detector_complexity(config(nn.Conv2d(1, 8, 1, 4)), (SIDE, SIDE))
    cells = (SIDE // 4) ** 2
    weights = sum(p.numel() for p in made.parameters() if p.dim() > 1)
    assert found.flops - rest.flops == cells * (weights - 8)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("swin/retinanet_swin-t-p4-w7_fpn_1x_coco", 2), ("yolox/yolox_tiny_8xb8-300e_coco", 4)],
)
def test_backbones_of_mmdetection(name, channels):
    cfg = get_config(f"mmdet::{name}.py")
    cfg.model.backbone.init_cfg = None
    plain = detector_complexity(cfg, (SIDE, SIDE))
    assert plain.flops > 0
    if "swin" in name:
        cfg.model.backbone.in_channels = channels
        fewer = detector_complexity(cfg, (SIDE, SIDE))
        assert plain.flops - fewer.flops == (SIDE // 4) ** 2 * 16 * 96


def test_model_that_fails_on_all_images_raises():
    with pytest.raises(
        ConfigError, match="fails on images of 64 x 64 pixels with any number of channels"
    ):
        detector_complexity(config(nn.Conv2d(17, 8, 3, 4, 1, dilation=99)), (SIDE, SIDE))
