"""Compute in float32 where half precision would overflow or lose accuracy."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, autocast, bfloat16, float16

from rfa_mmdet.ops.common.torch_versions import autocast_dtype_on


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it has half precision, else ``x`` itself.

    Args:
        x (Tensor): A floating-point tensor of any shape.

    Example:
        >>> import torch
        >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> at_least_float32(torch.ones(2, dtype=torch.float64)).dtype
        torch.float64
    """
    return x.float() if x.dtype in (float16, bfloat16) else x


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context that disables autocast on ``x``'s device.

    Args:
        x (Tensor): Any tensor on that device.

    Example:
        >>> import torch
        >>> a = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), no_autocast(a):
        ...     (a @ a).dtype
        torch.float32
    """
    # Disabling autocast raises on devices without it.
    if autocast_dtype_on(x.device.type) is None:
        return nullcontext()
    return autocast(x.device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of ``x`` would compute, considering autocast.

    Args:
        x (Tensor): Any tensor.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast_dtype(torch.ones(1)), autocast_dtype(torch.ones(1).double())
        (torch.bfloat16, torch.float64)
    """
    if x.dtype == torch.float64:
        return x.dtype
    return autocast_dtype_on(x.device.type) or x.dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums, softmax and statistics of values of this dtype.

    Example:
        >>> compute_dtype(torch.bfloat16), compute_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
