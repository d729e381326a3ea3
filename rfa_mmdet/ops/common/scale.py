"""Multiply by a constant that is usually 1, at no cost in that case."""

from torch import Tensor


def scaled(x: Tensor, scale: float) -> Tensor:
    """Return a tensor times a constant, or the tensor itself if the constant is 1.

    Args:
        x (Tensor): A tensor of any shape.
        scale (float): The constant.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> scaled(x, 1) is x, scaled(x, 4.0)
        (True, tensor([4., 4.]))
    """
    return x if scale == 1 else x * scale
