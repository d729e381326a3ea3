"""Decide whether a layer may compute with a module's weights instead of calling the module.

It may not if a tool has modified the module: with hooks, a weight recomputed in every call, or by
replacing the module. Such modules must be called.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rfa_mmdet.ops.common.precision import compute_dtype
from rfa_mmdet.ops.common.torch_versions import COMPILES_OPERATORS, has_global_hooks, is_compiling

_CALL = nn.Module.__call__


def must_be_called(module: nn.Module) -> bool:
    """Return whether a module has hooks or its own ``forward``, which would not run otherwise.

    Example:
        >>> must_be_called(nn.ReLU())
        False
    """
    if is_compiling() and not COMPILES_OPERATORS:  # cannot compile this inspection either
        return True
    own = module.__dict__
    return bool(
        has_global_hooks()
        or "forward" in own
        or "_conv_forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def are_plain(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Return whether modules are of exactly this class, with plain weights, and need not be called.

    Parametrised, quantised and wrapped modules have another class; pruning and the older weight
    norm leave a hook.

    Example:
        >>> conv = nn.Conv2d(2, 4, 3)
        >>> are_plain(nn.Conv2d, conv)
        True
        >>> are_plain(nn.Conv2d, nn.utils.parametrizations.weight_norm(conv))
        False
    """
    if not is_compiling() and kind.__call__ is not _CALL:  # e.g. torchstat patches classes
        return False
    for module in modules:
        if type(module) is not kind or must_be_called(module):
            return False
        # A subclass of Tensor, e.g. for quantised weights, only works inside its module.
        if not is_compiling():
            for weight in module._parameters.values():
                if not (weight is None or type(weight) in (nn.Parameter, Tensor)):
                    return False
    return True


def is_plain_conv(
    conv: Any,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = False,
) -> bool:
    """Return whether a module is a plain convolution with these arguments and need not be called.

    Args:
        conv (nn.Module): The module.
        kernel_size, stride, padding, dilation, groups, padding_mode: Required arguments of the
            convolution.
        bias (bool): Whether a bias is allowed. Defaults to False.

    Example:
        >>> conv = nn.Conv2d(2, 4, 3)
        >>> is_plain_conv(conv, (3, 3), bias=True), is_plain_conv(conv, (3, 3))
        (True, False)
    """
    return bool(
        are_plain(nn.Conv2d, conv)
        and conv.kernel_size == kernel_size
        and conv.stride == stride
        and conv.padding == padding
        and conv.dilation == dilation
        and conv.groups == groups
        and conv.padding_mode == padding_mode
        and (bias or conv.bias is None)
    )


def dtype_of(module: nn.Module, x: Tensor) -> torch.dtype:
    """Return the dtype that a module computes in, or that of sums of ``x`` if it is unknown.

    Example:
        >>> dtype_of(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, dtype=torch.float16))
        torch.float32
    """
    if is_compiling() and not COMPILES_OPERATORS:
        return next(module.parameters()).dtype  # the only variant that compiles
    weight: Tensor | None = module._parameters.get("weight")  # faster than parameters()
    if weight is None:
        # An adapter's scale may have another dtype.
        weight = next((p for p in module.parameters() if p.dim() > 1), None)
    if weight is None:  # replicas of DataParallel and quantised modules have no parameters
        weights = (inner.__dict__.get("weight") for inner in module.modules())
        weight = next((w for w in weights if isinstance(w, Tensor)), None)
    if weight is None or not weight.is_floating_point():
        return compute_dtype(x.dtype)
    return weight.dtype
