"""Schemas and Meta kernels of the operators in ``torch.ops.rfa_mmdet``.

The other kernels: CPU in ``csrc/bindings.cpp``, CUDA in ``triton/operators.py``, all other devices
in ``plain.py``, Autograd in ``autograd.py``. Meta kernels tell fake tensors, and so torch.compile,
the shapes and strides of the results: contiguous, except that maps and gradients have the layout of
the input that they belong to, see :func:`layout_like`. ``x`` is (B, C, H, W), a window has
K = kh * kw positions, and the output size is (h, w).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rfa_mmdet.ops.common.precision import compute_dtype
from rfa_mmdet.ops.common.torch_versions import register_fake
from rfa_mmdet.ops.common.windows import Pair, Window

NAMESPACE = "rfa_mmdet"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
OPERATORS: list[str] = []

_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
_FEATURES = "Tensor x, Tensor feature, Tensor shift, bool relu"


_Meta = TypeVar("_Meta", bound=Callable[..., Any])


def _define(arguments: str, returns: str) -> Callable[[_Meta], _Meta]:
    """Define an operator named after the decorated function, its Meta kernel."""

    def register(meta: _Meta) -> _Meta:
        name = meta.__name__
        LIBRARY.define(f"{name}({arguments}) -> {returns}")
        register_fake(LIBRARY, name, meta)
        OPERATORS.append(name)
        return meta

    return register


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def own_format(tensor: Tensor) -> torch.memory_format:
    """Return channels_last if a tensor has that layout, and not also NCHW; otherwise contiguous."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    alone = channels_last and not tensor.is_contiguous()  # with one channel, it has both
    return torch.channels_last if alone else torch.contiguous_format


def layout_like(tensor: Tensor) -> torch.memory_format:
    """Return the layout of results that belong to a tensor.

    It is the tensor's own on a GPU, and contiguous on a CPU, whose kernels process channels one by
    one.
    """
    return torch.contiguous_format if tensor.device.type == "cpu" else own_format(tensor)


def gradient_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Allocate the gradient of a tensor."""
    dtype, layout = dtype or tensor.dtype, layout_like(tensor)
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device, memory_format=layout)


def _gradient_of(need: bool, like: Tensor) -> Tensor:
    """Return memory for the gradient of a tensor, or an empty tensor if it is not needed."""
    return gradient_like(like) if need else _empty(like, (0,))


def empty_output(
    x: Tensor, weight: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Allocate the output of a convolution.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (O, ...).
        kernel_size, stride, padding, dilation (tuple[int, int]): Of the windows.

    Returns:
        Tensor: (B, O, h, w), with the layout of :func:`layout_like`.

    Example:
        >>> empty_output(torch.ones(1, 4, 9, 12), torch.ones(6, 4, 3, 3), *Window((3, 3))).shape
        torch.Size([1, 6, 7, 10])
    """
    height, width = Window(kernel_size, stride, padding, dilation).output_size(x.shape[2:])
    shape = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_like(x))


@_define(f"Tensor x, {_WINDOW}", "(Tensor mean, Tensor covariance)")
def window_moments(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Return mean (C, K) and covariance (C, K, K) of the windows' values, by channel.

    Taken over all B * h * w windows including zero padding, in at least float32.
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
    """Return grad + fold(constant + slope @ window).

    The second term is the gradient through the moments; slope (C, K, K) is symmetric, constant is
    (C, K). grad is the rest of x's gradient; None means 0.
    """
    return gradient_like(x)


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
    """Return the convolution (B, O, h, w) of the features, weighted by RFAConv's attention.

    Features (B, C, K, h, w) are act(feature @ window + shift), where act is ReLU or the identity;
    their weights are softmax(attention * mean of window). Parameters have the shapes of
    convolutions: feature (C * K, 1, kh, kw), shift (C * K,), attention (C * K, 1, 1, 1),
    weight (O, C / groups, kh, kw), bias (O,).
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
    """Return the gradients of ``rfa_conv``, each in the dtype of its input; empty if not needed.

    ``needs`` has a flag for each of: x; attention, feature and shift; weight; bias.
    """
    need_x, need_features, need_weight, need_bias = needs
    return (
        _gradient_of(need_x, x),
        *(_gradient_of(need_features, t) for t in (attention, feature, shift)),
        _gradient_of(need_weight, weight),
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

    If ``indexed``, also return the first channel with the maximum, (B, K, h, w), as floating point.
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
    """Return the gradients of ``pool_channels``; ``needs``: x; feature and shift."""
    return _gradient_of(needs[0], x), _gradient_of(needs[1], feature), _gradient_of(needs[1], shift)


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
    """Return row means, (B, C, kh, h), and column means, (B, C, kw, w), of the features.

    These are of the windows laid out side by side: row y * kh + i is [..., i, y].
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
    """Return the gradients of ``pool_coordinates``; ``needs``: x; feature and shift."""
    return _gradient_of(needs[0], x), _gradient_of(needs[1], feature), _gradient_of(needs[1], shift)


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

    Gates are for channels (B, C) and positions (B, K, h, w), or for rows (B, C, kh, h) and columns
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
    """Return the gradients of ``gated_conv``, each in the dtype of its input; empty if not needed.

    ``needs`` has a flag for each of: x; feature and shift; weight; bias. Gates always get one.
    """
    need_x, need_features, need_weight, need_bias = needs
    return (
        _gradient_of(need_x, x),
        *(_gradient_of(need_features, t) for t in (feature, shift)),
        *(_empty(t, t.shape) for t in (first, second)),
        _gradient_of(need_weight, weight),
        _empty(weight, (weight.shape[0] if need_bias else 0,)),
    )
