"""Which modules a layer need not call, because it computes from their weights what they would.

That would miss what tools have done to a module: hooks, a weight recomputed in every call, another
module in its place. Modules that tools have touched are called.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rfa_mmdet.ops.common.precision import compute_dtype
from rfa_mmdet.ops.common.torch_versions import COMPILES_OPERATORS, has_global_hooks, is_compiling

_CALL = nn.Module.__call__


def must_be_called(module: nn.Module) -> bool:
    """Whether a module has hooks, or a ``forward`` of its own, that else would not run.

    Example:
        >>> must_be_called(nn.ReLU())
        False
    """
    if is_compiling() and not COMPILES_OPERATORS:  # nor compiles what looks into a module
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
    """Whether modules are of this very class, with plain weights, and need not be called.

    A parametrised module has another class, as has a quantised or a wrapped one; pruning and the
    older weight norm leave a hook.

    Example:
        >>> conv = nn.Conv2d(2, 4, 3)
        >>> are_plain(nn.Conv2d, conv)
        True
        >>> are_plain(nn.Conv2d, nn.utils.parametrizations.weight_norm(conv))
        False
    """
    if not is_compiling() and kind.__call__ is not _CALL:  # as torchstat patches classes
        return False
    for module in modules:
        if type(module) is not kind or must_be_called(module):
            return False
        # A subclass of Tensor, as of quantised weights, knows modules only.
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
    """Whether a module is a plain convolution with these arguments, and need not be called.

    Args:
        conv (nn.Module): The module.
        kernel_size, stride, padding, dilation, groups, padding_mode: Of the convolution.
        bias (bool): Whether it may have one.

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
    """Return the type that a module computes in, or that of sums of ``x`` where none shows.

    Example:
        >>> dtype_of(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, dtype=torch.float16))
        torch.float32
    """
    if is_compiling() and not COMPILES_OPERATORS:
        return next(module.parameters()).dtype  # all that it compiles
    weight: Tensor | None = module._parameters.get("weight")  # in less time than parameters()
    if weight is None:
        # An adapter's scale may have another type.
        weight = next((p for p in module.parameters() if p.dim() > 1), None)
    if weight is None:  # a replica of DataParallel, or a quantised module, has no parameters
        of_inner = (inner.__dict__.get("weight") for inner in module.modules())
        weight = next((w for w in of_inner if isinstance(w, Tensor)), None)
    if weight is None or not weight.is_floating_point():
        return compute_dtype(x.dtype)
    return weight.dtype
