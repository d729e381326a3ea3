"""Modifications by third-party tools that do not change a layer's outputs."""

import warnings
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

WEIGHED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def inner(layer: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """Return the modules in a layer, of these kinds or all."""
    return [m for m in layer.modules() if m is not layer and isinstance(m, kinds or nn.Module)]


def replace(layer: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace each module that has a weight, in its parent."""
    for parent in list(layer.modules()):
        for name, child in parent.named_children():
            if type(child) in WEIGHED:
                setattr(parent, name, make(child))


def hooked(register: str, layer: nn.Module, **kwargs: bool) -> None:
    for module in inner(layer):
        getattr(module, register)(lambda *_: None, **kwargs)


def custom_forward(layer: nn.Module) -> None:
    for module in inner(layer):  # as accelerate does
        module.forward = MethodType(type(module).forward, module)


def convolves_in_its_own_way(layer: nn.Module) -> None:
    for conv in inner(layer, nn.Conv2d):  # as tools for tileable images do
        conv._conv_forward = MethodType(type(conv)._conv_forward, conv)


def subclassed(layer: nn.Module) -> None:
    for module in inner(layer):
        kind = type(module)
        module.__class__ = type(f"My{kind.__name__}", (kind,), {})


def weight_normed(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarning: deprecated
        for module in inner(layer, *WEIGHED):
            nn.utils.weight_norm(module)


class Doubled(nn.Module):
    def forward(self, half: Tensor) -> Tensor:
        return 2 * half

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrised(layer: nn.Module) -> None:
    for module in inner(layer, *WEIGHED, nn.BatchNorm2d, nn.GroupNorm):
        parametrize.register_parametrization(module, "weight", Doubled())


class Wrapped(nn.Module):
    """Like an untrained adapter, without a visible weight."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.base(x)


def pruned(layer: nn.Module) -> None:
    for module in inner(layer, *WEIGHED):
        prune.identity(module, "weight")


TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": partial(hooked, "register_forward_hook"),
    "forward pre-hook": partial(hooked, "register_forward_pre_hook"),
    "hook with kwargs": lambda layer: hooked("register_forward_hook", layer, with_kwargs=True),
    "pre-hook with kwargs": lambda layer: hooked(
        "register_forward_pre_hook", layer, with_kwargs=True
    ),
    "always called": lambda layer: hooked("register_forward_hook", layer, always_call=True),
    "full backward hook": partial(hooked, "register_full_backward_hook"),
    "full backward pre-hook": partial(hooked, "register_full_backward_pre_hook"),
    "custom forward": custom_forward,
    "own convolution": convolves_in_its_own_way,
    "subclass": subclassed,
    "pruned": pruned,
    "weight norm": weight_normed,
    "parametrised": parametrised,
    "wrapped": lambda layer: replace(layer, Wrapped),
}
