"""What is measured: each op of this package, RFAConv once for every backend that runs here."""

import importlib
import inspect
from collections.abc import Callable

import torch
from mmengine.registry import MODELS
from torch import nn

import rfa_mmdet.layers
from benchmarks.baselines import FORMULAS
from benchmarks.sizes import InputSize

OPS = tuple(FORMULAS)
CONVS = tuple(name for name in OPS if name.endswith("Conv"))
BACKENDS = ("reference", "cpu", "triton")
# As this package's configs have them.
OPTIONS = {"ConAM": dict(patch_size=4, hidden_channels=16)}


def is_plugin(op: str) -> bool:
    """Whether ``op`` keeps the shape of its input; a stride is not its matter then."""
    return op not in CONVS


def build(op: str, shape: InputSize, kind: Callable | None = None, **kwargs) -> nn.Module:
    """Build a layer for a shape, its norms away from their defaults, its gates alive.

    Args:
        op (str): Of ``OPS``.
        shape (InputSize): Of its input.
        kind (Callable | None): Another class with the arguments of that op. None: the registered.
        **kwargs: More arguments of it.

    Returns:
        nn.Module: With the same parameters for the same arguments.
    """
    kind = kind or getattr(rfa_mmdet.layers, op)
    torch.manual_seed(0)
    if is_plugin(op):
        layer = kind(shape.channels, **OPTIONS.get(op, {}), **kwargs)
    else:
        window = dict(stride=shape.stride, padding=shape.kernel_size // 2, bias=False)
        layer = kind(shape.channels, shape.channels, shape.kernel_size, **window, **kwargs)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in ("feature", "conv"):
            # Inputs are not negative: behind a mean of them, no ReLU is dead, no sigmoid saturates.
            fan_in = module.weight[0].numel()
            module.weight.data.uniform_(-1, 1).mul_(fan_in**-0.5).add_(1 / fan_in)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return layer


def builders(
    op: str, others: dict[str, str], device: torch.device
) -> tuple[dict[str, Callable[[InputSize], nn.Module]], dict[str, str]]:
    """Find what can compute an op here.

    Args:
        op (str): Of ``OPS``.
        others (dict[str, str]): Implementations by the op's name, as 'module:class'.
        device (torch.device): Where it is to run.

    Returns:
        tuple[dict, dict]: A builder by the name of each candidate; and why others are not here.
    """
    found, missing = {}, {}
    if op == "RFAConv" and "backend" in inspect.signature(MODELS.get(op)).parameters:
        probe = InputSize(1, 8, 5, 5)
        for backend in BACKENDS:
            name = f"{op}[{backend}]"
            try:
                build(op, probe, backend=backend).to(device)(torch.rand(1, 8, 5, 5, device=device))
            except Exception as error:  # of a backend whose kind of failure is its own
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                found[name] = lambda shape, backend=backend: build(op, shape, backend=backend)
    else:
        found[op] = lambda shape: build(op, shape)
    if op in others:
        module, _, attribute = others[op].partition(":")
        kind = getattr(importlib.import_module(module), attribute)
        found[f"{op}[{others[op]}]"] = lambda shape: build(op, shape, kind)
    return found, missing
