"""Convolution of few channels, whose gradient a CPU finds in a fraction of torch's time."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import no_autocast
from rfa_mmdet.ops.common.recompute import recomputes
from rfa_mmdet.ops.common.torch_versions import autocast_dtype_on


def same_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve with an odd square kernel, keeping the size.

    Not differentiable twice on a CPU, unless a graph is recorded
    (see :mod:`~rfa_mmdet.ops.common.recompute`).

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (O, C, k, k), k odd.
        bias (Tensor | None): (O,).

    Returns:
        Tensor: (B, O, H, W).

    Example:
        >>> same_conv(torch.rand(1, 2, 5, 4), torch.rand(3, 2, 7, 7)).shape
        torch.Size([1, 3, 5, 4])
    """
    device = x.device.type
    if device == "cpu" and recomputes():
        if (dtype := autocast_dtype_on(device)) is not None:  # as it would do for a convolution
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        out: Tensor = _SameConv.apply(x, weight, bias)
        return out
    return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2,) * 2)


def same_conv_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of :func:`same_conv`.

    Args:
        grad_y (Tensor): (B, O, H, W).
        x, weight (Tensor): Its arguments.
        needed (tuple[bool, bool, bool]): Which to find: of x, of weight, of bias.

    Returns:
        tuple: Those gradients; None for one that is not needed.

    Example:
        >>> x, weight = torch.rand(1, 2, 5, 4), torch.rand(3, 2, 7, 7)
        >>> found = same_conv_gradients(torch.rand(1, 3, 5, 4), x, weight, (True, True, False))
        >>> [gradient if gradient is None else tuple(gradient.shape) for gradient in found]
        [(1, 2, 5, 4), (3, 2, 7, 7), None]
    """
    padding = weight.shape[2] // 2
    with no_autocast(x):
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            *(grad_y, x, weight, weight.shape[:1]),
            *((1, 1), (padding, padding), (1, 1), False, (0, 0), 1),
            (False, *needed[1:]),
        )
        if not needed[0]:
            return None, of_weight, of_bias
        # As a forward convolution: with two channels, oneDNN's own takes 2 to 13 times as long.
        of_x = F.conv2d(grad_y, weight.flip(2, 3).transpose(0, 1), padding=padding)
    return of_x, of_weight, of_bias


class _SameConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2,) * 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return same_conv_gradients(grad_y, x, weight, ctx.needs_input_grad)
