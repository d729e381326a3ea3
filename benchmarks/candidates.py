"""What to measure: each op of this package, and RFAConv with every available backend."""

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
# As in this package's configs.
OPTIONS = {"ConAM": dict(patch_size=4, hidden_channels=16)}


def is_plugin(op: str) -> bool:
    """Return whether ``op`` keeps the shape of its input, so has no stride."""
    return op not in CONVS


def build(op: str, shape: InputSize, kind: Callable | None = None, **kwargs) -> nn.Module:
    """Build a layer for an input size, with non-default norms and gates that depend on the input.

    Args:
        op (str): One of ``OPS``.
        shape (InputSize): Size of the input.
        kind (Callable | None): Another class with the op's arguments; by default our own.
        **kwargs: More arguments for the class.

    Returns:
        nn.Module: The layer; equal arguments give equal parameters.
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
            # Inputs are not negative, so after a mean no ReLU is dead and no sigmoid saturates.
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
    """Find the available implementations of an op.

    Args:
        op (str): One of ``OPS``.
        others (dict[str, str]): Op -> another implementation, as 'module:class'.
        device (torch.device): Device to run on.

    Returns:
        tuple[dict, dict]: Candidate -> its builder, and candidate -> why it is not available.
    """
    found, missing = {}, {}
    if op == "RFAConv" and "backend" in inspect.signature(MODELS.get(op)).parameters:
        probe = InputSize(1, 8, 5, 5)
        for backend in BACKENDS:
            name = f"{op}[{backend}]"
            try:
                build(op, probe, backend=backend).to(device)(torch.rand(1, 8, 5, 5, device=device))
            except Exception as error:  # backends may raise anything
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
