"""The operators of ``torch.ops.rfa_mmdet``: one schema each, and the shapes of what they return.

One kernel is registered for each dispatch key: CPU in ``csrc/bindings.cpp``, CUDA in
``triton/launch.py``, Autograd in ``autograd.py``. Meta is here, so that fake tensors, and with them
torch.compile, know the shapes. ``x`` is (B, C, H, W), a window has K = kh * kw positions, and the
output's size is (h, w).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rfa_mmdet.ops.common.precision import compute_dtype
from rfa_mmdet.ops.common.windows import Pair, Window

NAMESPACE = "rfa_mmdet"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPERATORS: list[str] = []

_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
_FEATURES = "Tensor x, Tensor feature, Tensor shift, bool relu"


_Meta = TypeVar("_Meta", bound=Callable[..., Any])


def _define(arguments: str, returns: str) -> Callable[[_Meta], _Meta]:
    """Define an operator of the name and with the Meta kernel of the function below."""

    def register(meta: _Meta) -> _Meta:
        name = meta.__name__
        LIBRARY.define(f"{name}({arguments}) -> {returns}")
        LIBRARY.impl(name, meta, "Meta")
        OPERATORS.append(name)
        return meta

    return register


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _wanted(need: bool, like: Tensor) -> Tensor:
    """Return the gradient of a tensor, or an empty one in its place."""
    return _empty(like, like.shape if need else (0,))


def empty_output(
    x: Tensor, weight: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return new memory for a convolution's output.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (O, ...).
        kernel_size, stride, padding, dilation (tuple[int, int]): Of the windows.

    Returns:
        Tensor: (B, O, h, w), in x's memory format on a GPU; contiguous on a CPU, whose kernels go
        through the channels one by one.

    Example:
        >>> empty_output(torch.ones(1, 4, 9, 12), torch.ones(6, 4, 3, 3), *Window((3, 3))).shape
        torch.Size([1, 6, 7, 10])
    """
    height, width = Window(kernel_size, stride, padding, dilation).output_size(x.shape[2:])
    # Of one channel, both formats hold.
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.contiguous_format
    if channels_last and x.device.type != "cpu":
        layout = torch.channels_last
    shape = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


@_define(f"Tensor x, {_WINDOW}", "(Tensor mean, Tensor covariance)")
def window_moments(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Return mean (C, K) and covariance (C, K, K) of the windows' values, by channel.

    Over all B * h * w windows; the padding's zeros count. In the type computed in.
    """
    channels, positions = x.shape[1], kernel_size[0] * kernel_size[1]
    dtype = compute_dtype(x.dtype)
    return (
        _empty(x, (channels, positions), dtype),
        _empty(x, (channels, positions, positions), dtype),
    )


@_define(f"Tensor x, Tensor slope, Tensor constant, Tensor? grad, {_WINDOW}", "Tensor")
def window_moments_backward(
    x: Tensor,
    slope: Tensor,
    constant: Tensor,
    grad: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Return grad + fold(constant + slope @ window), whose second part goes through the moments.

    slope (C, K, K) is symmetric, constant (C, K); grad, of x otherwise, is 0 if it is None.
    """
    return _empty(x, x.shape)


@_define(
    "Tensor x, Tensor attention, Tensor feature, Tensor shift, bool relu, Tensor weight, "
    f"Tensor? bias, {_WINDOW}, int groups",
    "Tensor",
)
def rfa_conv(
    x: Tensor,
    attention: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Return the convolution (B, O, h, w) of the features, weighed by RFAConv's attention.

    Features (B, C, K, h, w) are act(feature @ window + shift), act being ReLU or nothing.
    Parameters have the shapes of convolutions: feature (C * K, 1, kh, kw), shift (C * K,),
    attention (C * K, 1, 1, 1), weight (O, C / groups, kh, kw), bias (O,). The features are weighed
    by softmax(attention * mean of window).
    """
    return empty_output(x, weight, kernel_size, stride, padding, dilation)


@_define(
    "Tensor grad_y, Tensor x, Tensor attention, Tensor feature, Tensor shift, bool relu, "
    f"Tensor weight, bool[4] needs, {_WINDOW}, int groups",
    "(Tensor x, Tensor attention, Tensor feature, Tensor shift, Tensor weight, Tensor bias)",
)
def rfa_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    attention: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    weight: Tensor,
    needs: Sequence[bool],
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``rfa_conv``, each in the type of what it is of.

    needs: of x; of attention, feature and shift; of weight; of bias. Empty where not needed.
    """
    need_x, need_features, need_weight, need_bias = needs
    return (
        _wanted(need_x, x),
        *(_wanted(need_features, t) for t in (attention, feature, shift)),
        _wanted(need_weight, weight),
        _empty(weight, (weight.shape[0] if need_bias else 0,)),
    )


@_define(f"{_FEATURES}, bool indexed, {_WINDOW}", "(Tensor pooled, Tensor largest)")
def pool_channels(
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    indexed: bool,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor]:
    """Return maximum and mean of the features over the channels, (B, 2, K, h, w).

    And, if indexed, the first channel that has the maximum, (B, K, h, w), as floating point.
    """
    window = Window(kernel_size, stride, padding, dilation)
    size = window.output_size(x.shape[2:])
    maps, dtype = (window.positions, *size), compute_dtype(x.dtype)
    return (
        _empty(x, (x.shape[0], 2, *maps), dtype),
        _empty(x, (x.shape[0], *maps) if indexed else (0,), dtype),
    )


@_define(
    f"Tensor grad, {_FEATURES}, Tensor largest, bool[2] needs, {_WINDOW}",
    "(Tensor x, Tensor feature, Tensor shift)",
)
def pool_channels_backward(
    grad: Tensor,
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    largest: Tensor,
    needs: Sequence[bool],
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``pool_channels``; needs: of x; of feature and shift."""
    return _wanted(needs[0], x), _wanted(needs[1], feature), _wanted(needs[1], shift)


@_define(f"{_FEATURES}, {_WINDOW}", "(Tensor rows, Tensor columns)")
def pool_coordinates(
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, Tensor]:
    """Return means of the features over rows, (B, C, kh, h), and columns, (B, C, kw, w).

    Of the windows laid side by side: row y * kh + i is [..., i, y].
    """
    window = Window(kernel_size, stride, padding, dilation)
    height, width = window.output_size(x.shape[2:])
    dtype = compute_dtype(x.dtype)
    return (
        _empty(x, (x.shape[0], x.shape[1], kernel_size[0], height), dtype),
        _empty(x, (x.shape[0], x.shape[1], kernel_size[1], width), dtype),
    )


@_define(
    f"Tensor grad_rows, Tensor grad_columns, {_FEATURES}, bool[2] needs, {_WINDOW}",
    "(Tensor x, Tensor feature, Tensor shift)",
)
def pool_coordinates_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    needs: Sequence[bool],
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``pool_coordinates``; needs: of x; of feature and shift."""
    return _wanted(needs[0], x), _wanted(needs[1], feature), _wanted(needs[1], shift)


@_define(
    f"{_FEATURES}, Tensor first, Tensor second, Tensor weight, Tensor? bias, {_WINDOW}, int groups",
    "Tensor",
)
def gated_conv(
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Return the convolution (B, O, h, w) of the features, multiplied by two gates.

    Gates of channels (B, C) and positions (B, K, h, w), or of rows (B, C, kh, h) and columns
    (B, C, kw, w).
    """
    return empty_output(x, weight, kernel_size, stride, padding, dilation)


@_define(
    f"Tensor grad_y, {_FEATURES}, Tensor first, Tensor second, Tensor weight, bool[4] needs, "
    f"{_WINDOW}, int groups",
    "(Tensor x, Tensor feature, Tensor shift, Tensor first, Tensor second, Tensor weight, "
    "Tensor bias)",
)
def gated_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``gated_conv``, each in the type of what it is of.

    needs: of x; of feature and shift; of weight; of bias. Empty where not needed.
    """
    need_x, need_features, need_weight, need_bias = needs
    return (
        _wanted(need_x, x),
        *(_wanted(need_features, t) for t in (feature, shift)),
        *(_empty(t, t.shape) for t in (first, second)),
        _wanted(need_weight, weight),
        _empty(weight, (weight.shape[0] if need_bias else 0,)),
    )
