"""Thin RFAResNets that run in milliseconds."""

import torch
from mmdet.models.backbones.resnet import ResNet
from torch import Tensor, nn

from rfa_mmdet.models import RFAResNet
from tests.helpers.norms import randomise_norms

RFA = dict(type="RFAConv")
EMA8 = dict(type="EMA", factor=8)
CONAM = dict(type="ConAM", patch_size=1, hidden_channels=4)
DEPTHS = (18, 34, 50, 101, 152)


def replaced_conv(depth: int) -> str:
    return "conv1" if depth < 50 else "conv2"


def blocks(net: ResNet, stage: int) -> nn.Module:
    return getattr(net, f"layer{stage}")


def thin(depth: int = 18, seed: int = 0, **kwargs) -> RFAResNet:
    """Return a net that runs in milliseconds, with random norms."""
    torch.manual_seed(seed)
    return randomise_norms(RFAResNet(depth, **{"base_channels": 8, **kwargs}))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
