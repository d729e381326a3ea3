"""ResNets with new layers from RFAResNet and Retrofit, and plain ones for their checkpoints."""

import functools

import torch
from mmdet.models.backbones.resnet import ResNet
from mmdet.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.models import RFAResNet
from tests.helpers.norms import randomise_norms

RFA = dict(type="RFAConv")
COORD = dict(type="CoordAtt")  # a plug-in with a BN in it
KINDS = ("RFAResNet", "Retrofit")


def replaced(depth: int) -> str:
    return "conv1" if depth < 50 else "conv2"


def edited_resnet(
    kind: str, depth: int = 18, plugins: bool = True, rfa: dict = RFA, **kwargs
) -> nn.Module:
    """Return a ResNet with RFAConv in every block, and a plug-in depending on the kind."""
    kwargs = dict(base_channels=8, **kwargs)
    if kind == "RFAResNet":
        plugins = [dict(cfg=COORD, position="after_conv2")] if plugins else None
        return RFAResNet(depth, rfa=rfa, plugins=plugins, **kwargs)
    edits = [dict(where=rf"layer\d\.\d+\.{replaced(depth)}", conv=rfa)]
    edits += [dict(after=r"layer\d\.\d+", plugin=COORD)] if plugins else []
    strict = {k: kwargs.pop(k) for k in ("strict_start",) if k in kwargs}
    module = dict(type="ResNet", depth=depth, **kwargs)
    return MODELS.build(dict(type="Retrofit", module=module, edits=edits, **strict))


@functools.cache
def plain_net(depth: int) -> nn.Module:
    torch.manual_seed(1)
    return randomise_norms(ResNet(depth, base_channels=8))


@functools.cache
def own_state(kind: str, depth: int) -> dict[str, Tensor]:
    return edited_resnet(kind, depth).state_dict()


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))
