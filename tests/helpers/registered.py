"""All layers that this package registers, built as mmcv does.

They are found in MMEngine's registry, so new ones are included automatically.
"""

import inspect

import torch
from mmcv.cnn import build_conv_layer, build_plugin_layer
from mmdet.models.backbones.resnet import Bottleneck, ResNet
from mmengine.registry import MODELS
from torch import Tensor, nn

import rfa_mmdet.layers
from rfa_mmdet.layers.conv.attended_conv import AttendedConv
from rfa_mmdet.layers.conv.receptive_field import ReceptiveFieldConv
from tests.helpers.norms import randomise_norms

CHANNELS = 32
# Values of arguments without a default, by name.
REQUIRED = {"patch_size": 3, "hidden_channels": 8}


def registered(package: str) -> list[str]:
    """Return the names that the modules of a package have registered."""
    prefix = f"{rfa_mmdet.layers.__name__}.{package}."
    return sorted(n for n, c in MODELS.module_dict.items() if c.__module__.startswith(prefix))


CONVS, PLUGINS = registered("conv"), registered("attention")
RECEPTIVE = [n for n in CONVS if issubclass(MODELS.get(n), ReceptiveFieldConv)]
ATTENDED = [n for n in CONVS if issubclass(MODELS.get(n), AttendedConv)]


def accepts(name: str, argument: str) -> bool:
    return argument in inspect.signature(MODELS.get(name)).parameters


def required(name: str) -> dict:
    parameters = inspect.signature(MODELS.get(name)).parameters
    return {k: v for k, v in REQUIRED.items() if k in parameters}


def conv(name: str, *args, seed: int = 0, **kwargs) -> nn.Module:
    """Return a convolution built as mmcv does, with norms not at their defaults."""
    torch.manual_seed(seed)
    layer = build_conv_layer(dict(type=name), *args, **kwargs)
    return randomise_norms(layer)


def plugin(name: str, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    cfg = dict(type=name, **required(name), **kwargs)
    return randomise_norms(build_plugin_layer(cfg, in_channels=CHANNELS)[1])


def build(name: str, **kwargs) -> nn.Module:
    if name in CONVS:
        return conv(name, CHANNELS, 16, 3, stride=2, padding=1, **kwargs)
    return plugin(name, **kwargs)


def feature_map(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, CHANNELS, 9, 7, generator=generator)


def changes(a: nn.Module, b: nn.Module, x: Tensor | None = None) -> bool:
    """Return whether two layers with the same shared weights have different outputs."""
    x = feature_map() if x is None else x
    same = {k: v for k, v in a.state_dict().items() if v.shape == b.state_dict().get(k, x).shape}
    b.load_state_dict(same, strict=False)
    ya, yb = a.eval()(x), b.eval()(x)
    return ya.shape != yb.shape or not torch.allclose(ya, yb, rtol=1e-3, atol=1e-4)


def ones_in_last_norm(net: ResNet) -> None:
    """Undo zero_init_residual: with zeros, nothing in a block has a gradient."""
    for module in net.modules():
        if isinstance(module, Bottleneck):
            module.norm3.weight.data.fill_(1)


def assert_gradients(out: tuple[Tensor, ...], layers: list[nn.Module], upstream: list) -> None:
    """Check that all gradients are finite, and each name is nonzero in at least one of them."""
    named = [(key, p) for layer in layers for key, p in layer.named_parameters()]
    gradients = torch.autograd.grad(out, [p for _, p in named], upstream)
    assert all(g.isfinite().all() for g in gradients)
    alive = {key for (key, _), g in zip(named, gradients, strict=True) if g.any()}
    assert alive == {key for key, _ in named}


def build_randomly(cfg: dict, *args, **kwargs) -> nn.Module:
    """Return the layer with random values: a start must set every value that it relies on."""
    layer = build_conv_layer({**cfg, **kwargs}, *args)
    with torch.no_grad():
        for value in layer.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return layer


def plain_state(*, bias: bool = True, channels: int = 4) -> dict[str, Tensor]:
    return nn.Conv2d(channels, 6, 3, bias=bias).state_dict()
