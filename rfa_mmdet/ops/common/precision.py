"""Where half precision would overflow or lose the sum, the formulas compute in float32."""

from torch import Tensor, autocast, bfloat16, float16


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32 if it is in half precision, and ``x`` itself otherwise.

    Args:
        x (Tensor): Any shape, floating point.

    Example:
        >>> import torch
        >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> at_least_float32(torch.ones(2, dtype=torch.float64)).dtype
        torch.float64
    """
    return x.float() if x.dtype in (float16, bfloat16) else x


def no_autocast(x: Tensor) -> autocast:
    """Return a context in which autocast leaves the dtypes on ``x``'s device as they are.

    Args:
        x (Tensor): Any tensor on the device in question.

    Example:
        >>> import torch
        >>> a = torch.ones(2, 2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16), no_autocast(a):
        ...     (a @ a).dtype
        torch.float32
    """
    return autocast(x.device.type, enabled=False)
