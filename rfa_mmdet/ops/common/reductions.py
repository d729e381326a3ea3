"""Maximum and mean of a map, with gradients much faster than autograd's."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rfa_mmdet.ops.common.precision import compute_dtype
from rfa_mmdet.ops.common.recompute import recomputes


def max_and_mean(
    x: Tensor, dim: int | tuple[int, ...], dtype: torch.dtype, keepdim: bool = True
) -> tuple[Tensor, Tensor]:
    """Return maximum and mean; equal maxima share the gradient evenly.

    Not twice differentiable, unless a graph is being recorded (see recompute.py).

    Args:
        x (Tensor): A tensor of any shape.
        dim (int | tuple[int, ...]): Dimensions to reduce.
        dtype (torch.dtype): Dtype of the result.
        keepdim (bool): Whether to keep the reduced dimensions with size 1. Defaults to True.

    Returns:
        tuple[Tensor, Tensor]: Maximum and mean.

    Example:
        >>> max_and_mean(torch.tensor([[0., 1., 5.]]), 1, torch.float32)
        (tensor([[5.]]), tensor([[2.]]))
    """
    if recomputes():
        maxima, means = _MaxAndMean.apply(x, dim, dtype)
    else:
        maxima, means = x.amax(dim, keepdim=True).to(dtype), x.mean(dim, keepdim=True, dtype=dtype)
    return (maxima, means) if keepdim else (maxima.squeeze(dim), means.squeeze(dim))


def mean(x: Tensor, dim: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the mean, with a gradient that needs no division per element.

    Args:
        x (Tensor): A tensor of any shape.
        dim (int | tuple[int, ...]): Dimensions to reduce.
        dtype (torch.dtype): Dtype of the result.

    Returns:
        Tensor: The mean, without the reduced dimensions.

    Example:
        >>> mean(torch.tensor([[0., 1., 5.]]), 1, torch.float32)
        tensor([2.])
    """
    if not recomputes():
        return x.mean(dim, dtype=dtype)
    # The gradient of a sum is one expanded value, and the division comes before the expansion.
    total = x.sum(dim, dtype=compute_dtype(dtype))  # may exceed half precision
    return (total / _cells(x, dim)).to(dtype)


def _cells(x: Tensor, dim: int | tuple[int, ...]) -> int:
    return math.prod(x.shape[i] for i in ([dim] if isinstance(dim, int) else dim))


def shares_of_maximum(x: Tensor, maxima: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Locate the maxima of a map and split the gradient among ties; overwrites the map.

    Args:
        x (Tensor): The map.
        maxima (Tensor): Its maxima, with its dtype and broadcastable to it.
        gradient (Tensor): Gradient of the maxima, with their shape.

    Returns:
        tuple[Tensor, Tensor]: A map that is 1 at the maxima and 0 elsewhere, and the gradient of
        each maximum, divided by the number of its positions. Both have x's dtype; their product is
        the gradient of x.

    Example:
        >>> x = torch.tensor([[1., 2., 2.]])
        >>> shares_of_maximum(x, torch.tensor([[2.]]), torch.tensor([[3.]]))
        (tensor([[0., 1., 1.]]), tensor([[1.5000]]))
    """
    # A boolean mask takes ten times longer on a CPU.
    hits = x.eq_(maxima)
    dims = [i for i, size in enumerate(maxima.shape) if size != x.shape[i]]
    dtype = compute_dtype(x.dtype)  # float16 cannot count beyond 2048
    count = hits.sum(dims, keepdim=True, dtype=dtype) if dims else hits
    return hits, (gradient / count).to(x.dtype)


class _MaxAndMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int | tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        maxima = x.amax(dim, keepdim=True)
        ctx.save_for_backward(x, maxima)
        ctx.cells = _cells(x, dim)
        return maxima.to(dtype), x.mean(dim, keepdim=True, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_maxima: Tensor, grad_means: Tensor) -> tuple[Tensor | None, ...]:
        x, maxima = ctx.saved_tensors
        hits, share = shares_of_maximum(x.clone(), maxima, grad_maxima)
        return hits.mul_(share).add_((grad_means / ctx.cells).to(x.dtype)), None, None
