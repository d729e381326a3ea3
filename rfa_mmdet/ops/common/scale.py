"""A constant factor, which is most often 1 and then costs nothing."""

from torch import Tensor


def scaled(x: Tensor, scale: float) -> Tensor:
    """Return a tensor times a constant; the tensor itself where that is 1.

    Args:
        x (Tensor): Any shape.
        scale (float): The constant.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> scaled(x, 1) is x, scaled(x, 4.0)
        (True, tensor([4., 4.]))
    """
    return x if scale == 1 else x * scale
