"""Receptive fields as windows: (B, C, K, h, w), with K = kh * kw positions per output position.

The papers lay the windows out side by side, (B, C, h * kh, w * kw), and convolve them with stride
k. A 1x1 convolution over C * K channels with the same weights gives the same result without moving
data.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import no_autocast
from rfa_mmdet.ops.common.recompute import gradients_of_gates, is_recorded, recomputes
from rfa_mmdet.ops.common.torch_versions import autocast_dtype_on

Pair = tuple[int, int]


class Window(NamedTuple):
    """Windows over a zero-padded map: the arguments of a convolution.

    Example:
        >>> window = Window((3, 3), (2, 2), (1, 1), (1, 1))
        >>> window.positions, window.output_size((9, 12))
        (9, (5, 6))
    """

    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def positions(self) -> int:
        """K = kh * kw."""
        return self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, size: Sequence[int]) -> Pair:
        """Return (h, w), the number of windows along each side of a map of size (H, W)."""
        height, width = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, *self)  # noqa: B905
        ]
        return height, width

    def count(self, x: Tensor) -> int:
        """Return the number of windows over a map (B, C, H, W): B * h * w."""
        height, width = self.output_size(x.shape[2:])
        return x.shape[0] * height * width


def lay_out(windows: Tensor, kernel_size: Pair) -> Tensor:
    """Lay windows out side by side.

    Args:
        windows (Tensor): (B, C, K, h, w).
        kernel_size (tuple[int, int]): (kh, kw), with kh * kw = K.

    Returns:
        Tensor: (B, C, h * kh, w * kw).

    Example:
        >>> import torch
        >>> windows = torch.arange(8.).reshape(1, 1, 4, 1, 2)
        >>> lay_out(windows, (2, 2))[0, 0]
        tensor([[0., 2., 1., 3.],
                [4., 6., 5., 7.]])
    """
    kh, kw = kernel_size
    batch, channels, _, height, width = windows.shape
    windows = windows.reshape(batch, channels, kh, kw, height, width)
    if not is_recorded():
        laid_out = windows.permute(0, 1, 4, 2, 5, 3)
        return laid_out.reshape(batch, channels, height * kh, width * kw)
    # One side at a time, at the end of the shape: a single reshape of both does not export with
    # dynamic sizes.
    windows = windows.permute(0, 1, 2, 4, 5, 3)
    windows = windows.reshape(batch, channels, kh, height, width * kw).permute(0, 1, 4, 3, 2)
    return windows.reshape(batch, channels, width * kw, height * kh).transpose(2, 3)


def take_apart(laid_out: Tensor, kernel_size: Pair) -> Tensor:
    """Undo :func:`lay_out`.

    Args:
        laid_out (Tensor): (B, C, h * kh, w * kw).
        kernel_size (tuple[int, int]): (kh, kw).

    Returns:
        Tensor: (B, C, kh * kw, h, w).

    Example:
        >>> import torch
        >>> windows = torch.rand(2, 3, 6, 4, 5)
        >>> torch.equal(take_apart(lay_out(windows, (2, 3)), (2, 3)), windows)
        True
    """
    kh, kw = kernel_size
    if not is_recorded():
        batch, channels, height, width = laid_out.shape
        windows = laid_out.reshape(batch, channels, height // kh, kh, width // kw, kw)
        return windows.permute(0, 1, 3, 5, 2, 4).flatten(2, 3)
    # Slices, because a reshape does not export with dynamic sizes; but in the backward pass, each
    # slice costs a full map.
    parts = [laid_out[:, :, i::kh, j::kw] for i in range(kh) for j in range(kw)]
    return torch.stack(parts, dim=2)


def convolve_windows(windows: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Convolve each window with the kernel, like a k x k convolution with stride k of the layout.

    Args:
        windows (Tensor): (B, C, K, h, w).
        weight (Tensor): (O, C / groups, kh, kw).
        bias (Tensor | None): (O,).
        groups (int): Groups of the convolution.

    Returns:
        Tensor: (B, O, h, w).

    Example:
        >>> import torch
        >>> convolve_windows(torch.rand(2, 3, 9, 4, 5), torch.rand(7, 3, 3, 3), None, 1).shape
        torch.Size([2, 7, 4, 5])
    """
    # Channel c * K + i is position i of channel c, as in the flattened kernel.
    return F.conv2d(windows.flatten(1, 2), weight.flatten(1)[:, :, None, None], bias, groups=groups)


def convolve_weighted_windows(
    windows: Tensor,
    gates: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    overwrite: bool = False,
) -> Tensor:
    """Multiply windows by two gates and convolve them, without saving the product for backward.

    Not twice differentiable, unless a graph is being recorded (see recompute.py).

    Args:
        windows (Tensor): (B, C, K, h, w) or (B, C, kh, kw, h, w).
        gates (tuple[Tensor, Tensor]): Gates, broadcastable to ``windows`` and with its dtype.
        weight (Tensor): (O, C / groups, kh, kw).
        bias (Tensor | None): (O,).
        groups (int): Groups of the convolution.
        overwrite (bool): Whether ``windows`` may be overwritten, which happens only without
            gradients. Defaults to False.

    Returns:
        Tensor: (B, O, h, w).

    Example:
        >>> gates = torch.rand(2, 3, 1, 1, 1), torch.rand(2, 1, 9, 4, 5)
        >>> windows, weight = torch.rand(2, 3, 9, 4, 5), torch.rand(7, 3, 3, 3)
        >>> convolve_weighted_windows(windows, gates, weight, None, 1).shape
        torch.Size([2, 7, 4, 5])
    """
    first, second = gates
    if not recomputes():
        if overwrite and not is_recorded():
            weighted = windows.mul_(first).mul_(second)
        else:
            weighted = (windows * first) * second
        return convolve_windows(weighted.flatten(2, -3), weight, bias, groups)
    dtype = autocast_dtype_on(windows.device.type)
    if dtype is not None:  # as for a convolution
        windows, first, second, weight = (t.to(dtype) for t in (windows, first, second, weight))
        bias = None if bias is None else bias.to(dtype)
    out: Tensor = _ConvolveWeighted.apply(windows, first, second, weight, bias, groups)
    return out


class _ConvolveWeighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        windows: Tensor,
        first: Tensor,
        second: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(windows, first, second, weight)
        ctx.bias_shape, ctx.groups = None if bias is None else bias.shape, groups
        weighted = (windows * first).mul_(second)
        with no_autocast(windows):
            return convolve_windows(weighted.flatten(2, -3), weight, bias, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        windows, first, second, weight = ctx.saved_tensors
        needs_values = any(ctx.needs_input_grad[:3])
        weighted = (windows * first).mul_(second)
        grad, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_y,
            weighted.flatten(2, -3).flatten(1, 2),
            weight.flatten(1)[:, :, None, None],
            ctx.bias_shape,
            *((1, 1), (0, 0), (1, 1), False, (0, 0), ctx.groups),
            (needs_values, ctx.needs_input_grad[3], ctx.bias_shape is not None),
        )
        del weighted
        if grad_weight is not None:
            grad_weight = grad_weight.reshape(weight.shape)
        if not needs_values:
            return None, None, None, grad_weight, grad_bias, None
        grad = grad.reshape(windows.shape)
        grad_gates = gradients_of_gates(grad * windows, first, second)
        return grad.mul_(first).mul_(second), *grad_gates, grad_weight, grad_bias, None
