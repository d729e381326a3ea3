"""The operators in plain torch, for devices without kernels.

The features of one block of windows at a time are computed, used in a matrix product and discarded;
backward passes recompute them. The formula, in contrast, keeps the features of the whole map.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import compute_dtype, no_autocast
from rfa_mmdet.ops.common.recompute import gradients_of_gates
from rfa_mmdet.ops.receptive_field import schema
from rfa_mmdet.ops.receptive_field.schema import (
    LIBRARY,
    empty_output,
    gradient_like,
    layout_like,
)
from rfa_mmdet.ops.receptive_field.slices import Block, Slices

KERNELS: list[Callable[..., Any]] = []


_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def _register(kernel: _Kernel) -> _Kernel:
    @wraps(kernel)
    def run(*args: Any) -> Any:
        with no_autocast(args[0]):
            return kernel(*args)

    LIBRARY.impl(kernel.__name__, run, "CompositeExplicitAutograd")
    KERNELS.append(run)
    return cast(_Kernel, run)


class _Features:
    """Features act(feature @ window + shift) of blocks, (C', K, P), and their gradients.

    With the weight of RFAConv's attention, also computes that attention, whose logits are another
    product with the window.
    """

    def __init__(
        self,
        slices: Slices,
        feature: Tensor,
        shift: Tensor,
        relu: bool,
        needs: Sequence[bool] = (False, False),
        attention: Tensor | None = None,
    ) -> None:
        positions = slices.window.positions
        self.slices, self.relu, self.positions = slices, relu, positions
        self.inputs, (self.need_x, self.need_features) = (feature, shift, attention), needs
        kernels = feature.reshape(-1, positions, positions)
        self.maps = torch.cat([kernels, shift.reshape(-1, positions, 1)], 2)  # (C, K, K + 1)
        if attention is not None:
            # Logits depend on the window's mean; the shift column is zero.
            logits = (attention.to(slices.dtype) / positions).reshape(-1, positions, 1)
            logits = F.pad(logits.expand_as(kernels), (0, 1))
            self.maps = torch.cat([self.maps, logits], 1)  # (C, 2 * K, K + 1)
        self.grad_x = slices.empty_gradient(self.need_x)
        self.grad_maps = torch.zeros_like(self.maps) if self.need_features else self.maps[:0]

    def of(self, block: Block) -> Tensor:
        features = self._responses("features", block, slice(self.positions))
        return features.relu_() if self.relu else features

    def attention(self, block: Block) -> Tensor:
        logits = self._responses("logits", block, slice(self.positions, None))
        return torch.softmax(logits, 1, out=self._scratch("attention", block))

    def _responses(self, name: str, block: Block, rows: slice) -> Tensor:
        maps = self.maps[block.channels, rows]
        return torch.bmm(maps, block.windows, out=self._scratch(name, block))

    def _scratch(self, name: str, block: Block, times: int = 1) -> Tensor:
        channels, _, count = block.windows.shape
        return self.slices.scratch(name, channels, times * self.positions, count)

    def apply(self, features: Tensor, weights: Tensor) -> Tensor:
        return torch.mul(features, weights, out=self.slices.scratch("weighted", *features.shape))

    def add(self, block: Block, features: Tensor, grad: Tensor) -> None:
        """Accumulate gradients from that of the features, which is overwritten."""
        self._add(block, features, grad, grad)

    def add_with_attention(
        self, block: Block, features: Tensor, attention: Tensor, weighted: Tensor, grad: Tensor
    ) -> None:
        """Accumulate gradients from that of the weighted features; overwrites both."""
        grads = self._scratch("grads", block, 2)
        grad_features, grad_logits = grads.chunk(2, 1)
        products = weighted.mul_(grad)
        total = products.sum(1, keepdim=True)
        torch.addcmul(products, attention, total, value=-1, out=grad_logits)
        torch.mul(grad, attention, out=grad_features)
        self._add(block, features, grad_features, grads)

    def _add(self, block: Block, features: Tensor, grad_features: Tensor, grads: Tensor) -> None:
        if self.relu:
            torch.ops.aten.threshold_backward.grad_input(
                grad_features, features, 0, grad_input=grad_features
            )
        if self.need_features:
            self.grad_maps[block.channels].baddbmm_(grads, block.windows.mT)
        if self.need_x:
            back = self.maps[block.channels, :, :-1].mT
            grad_windows = torch.bmm(back, grads, out=self._scratch("grad_windows", block))
            self.slices.add_to(self.grad_x, block, grad_windows)

    def gradients(self) -> tuple[Tensor, ...]:
        """Return the gradients of x, feature, shift and attention; empty if not needed."""
        grad_x = self.slices.as_gradient(self.grad_x)
        inputs = [t for t in self.inputs if t is not None]
        if not self.need_features:
            return grad_x, *(t.new_empty(0) for t in inputs)
        grad_features, *grad_logits = self.grad_maps.split(self.positions, 1)
        found = [grad_features[..., :-1], grad_features[..., -1]]
        found += [t[..., :-1].mean(2) for t in grad_logits]
        return grad_x, *(g.reshape(t.shape).to(t.dtype) for g, t in zip(found, inputs, strict=True))


class _Product:
    """The convolution of weighted features, (C', K, P), and its gradients."""

    def __init__(self, x: Tensor, weight: Tensor, groups: int) -> None:
        self.shape, self.layout = weight.shape, layout_like(weight)
        self.dtype, self.sums = x.dtype, compute_dtype(x.dtype)
        self.weight = weight.reshape(groups, len(weight) // groups, -1)  # (G, O / G, C / G * K)
        self.grad_weight = self.weight[:0]

    def convolve(
        self, slices: Slices, make: Callable[[Block], Tensor], bias: Tensor | None
    ) -> Tensor:
        y = empty_output(slices.x, self.weight.view(self.shape), *slices.window)
        for place in slices.places():
            out = place.of(y)
            shape = *self.weight.shape[:2], out[0].numel()
            total = self.weight.new_zeros(shape, dtype=self.sums)
            for block in slices.blocks(place):
                weighted = make(block)
                at = self._of(block.channels)
                _add_product(total[at[0]], self.weight[at], self._grouped(weighted, at))
            if bias is not None:
                total += bias.view(*shape[:2], 1)
            out.copy_(total.view(out.shape))
        return y

    def backwards(self, slices: Slices, grad_y: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Yield each block with the gradient (G, O / G, P) of the output at its place."""
        self.grad_weight = torch.zeros_like(self.weight, dtype=self.sums)
        for place in slices.places():
            grad_out = place.of(grad_y).reshape(*self.weight.shape[:2], -1)
            for block in slices.blocks(place):
                yield block, grad_out

    def gradient(
        self, block: Block, weighted: Tensor, grad_out: Tensor, need_weight: bool
    ) -> Tensor:
        """Return the gradient of weighted features, and accumulate that of the weight."""
        at = self._of(block.channels)
        grad_out = grad_out[at[0]]
        if need_weight:
            _add_product(self.grad_weight[at], grad_out, self._grouped(weighted, at).mT)
        return _product(self.weight[at].mT, grad_out).view_as(weighted).to(weighted.dtype)

    def gradients(self, grad_y: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias; empty if not needed."""
        weight = self.weight.new_empty(0)
        if needs[2]:
            weight = self.grad_weight.view(self.shape).contiguous(memory_format=self.layout)
        bias = grad_y.sum((0, 2, 3), dtype=self.sums) if needs[3] else weight.new_empty(0)
        return weight.to(self.dtype), bias.to(self.dtype)

    def _of(self, channels: slice) -> tuple[slice, slice, slice]:
        """Return the index of the weights of some channels."""
        group, positions = self.shape[1], self.shape[2] * self.shape[3]
        first, last = channels.start // group, -(-channels.stop // group)
        start = channels.start - first * group
        stop = start + min(channels.stop - channels.start, group)
        return slice(first, last), slice(None), slice(start * positions, stop * positions)

    def _grouped(self, weighted: Tensor, at: tuple[slice, slice, slice]) -> Tensor:
        return weighted.to(self.dtype).view(at[0].stop - at[0].start, -1, weighted.shape[2])


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype == torch.float32:
        # Convolutions and matrix products have separate TF32 settings, with different defaults.
        return as_convolution(a, b)
    if len(a) == 1:  # several times faster than bmm in bfloat16 on a CPU
        return torch.mm(a[0], b[0]).unsqueeze(0)
    return torch.bmm(a, b)


def as_convolution(a: Tensor, b: Tensor) -> Tensor:
    """Return the products a @ b of two batches of matrices, as a grouped convolution.

    Example:
        >>> a, b = torch.rand(2, 3, 4), torch.rand(2, 4, 5)
        >>> torch.allclose(as_convolution(a, b), a @ b)
        True
    """
    groups, rows, terms = a.shape
    maps = b.reshape(1, groups * terms, 1, -1)
    kernels = a.reshape(groups * rows, terms, 1, 1)
    return F.conv2d(maps, kernels, groups=groups).view(groups, rows, -1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype and not total.is_cuda:
        total.baddbmm_(a, b)
    else:
        total += _product(a, b)


@_register
def window_moments(x: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    if not len(x):  # a rank without data, whose statistics count for nothing
        mean, covariance = schema.window_moments(x, *window)
        return mean.zero_(), covariance.zero_()
    # Centre first: the variance would cancel if the mean is far from zero.
    centre = x.mean((0, 2, 3), dtype=compute_dtype(x.dtype)).view(-1, 1, 1)
    slices = Slices(x, window, centre=centre)
    size = slices.window.positions + 1
    sums = centre.new_zeros(x.shape[1], size, size)
    for place in slices.places():
        for block in slices.blocks(place):
            sums[block.channels].baddbmm_(block.windows, block.windows.mT)
    sums /= slices.window.count(x)
    first = sums[:, :-1, -1:]
    return (first + centre).squeeze(2), sums[:, :-1, :-1] - first * first.mT


@_register
def window_moments_backward(
    x: Tensor, slope: Tensor, constant: Tensor, grad: Tensor | None, *window: Any
) -> Tensor:
    """See schema.py."""
    slices = Slices(x, window)
    grad_x = slices.empty_gradient(True)
    if grad is not None:
        grad_x.copy_(grad)
    maps = torch.cat([slope, constant.unsqueeze(2)], 2)
    for place in slices.places():
        for block in slices.blocks(place):
            slices.add_to(grad_x, block, torch.bmm(maps[block.channels], block.windows))
    return slices.as_gradient(grad_x)


def add_window_moments_backward(
    grad: Tensor, x: Tensor, slope: Tensor, constant: Tensor, *window: Any
) -> None:
    """Add the gradient through the moments to a gradient of x, in place."""
    grad.copy_(window_moments_backward(x, slope, constant, grad, *window))


# The Triton kernel needs no second map.
LIBRARY.define(
    "add_window_moments_backward(Tensor(a!) grad, Tensor x, Tensor slope, Tensor constant, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> ()"
)
LIBRARY.impl(
    "add_window_moments_backward", add_window_moments_backward, "CompositeExplicitAutograd"
)


@_register
def rfa_conv(
    x: Tensor,
    attention: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    weight: Tensor,
    bias: Tensor | None,
    *window_and_groups: Any,
) -> Tensor:
    """See schema.py."""
    *window, groups = window_and_groups
    slices = Slices(x, window, groups)
    features = _Features(slices, feature, shift, relu, attention=attention)
    return _Product(x, weight, groups).convolve(
        slices, lambda block: features.of(block).mul_(features.attention(block)), bias
    )


@_register
def rfa_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    attention: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    weight: Tensor,
    needs: Sequence[bool],
    *window_and_groups: Any,
) -> tuple[Tensor, ...]:
    """See schema.py."""
    *window, groups = window_and_groups
    slices = Slices(x, window, groups)
    features = _Features(slices, feature, shift, relu, needs[:2], attention)
    product = _Product(x, weight, groups)
    for block, grad_out in product.backwards(slices, grad_y):
        values, weights = features.of(block), features.attention(block)
        weighted = features.apply(values, weights)
        grad = product.gradient(block, weighted, grad_out, needs[2])
        if needs[0] or needs[1]:
            features.add_with_attention(block, values, weights, weighted, grad)
    grad_x, grad_feature, grad_shift, grad_attention = features.gradients()
    return grad_x, grad_attention, grad_feature, grad_shift, *product.gradients(grad_y, needs)


class _Gates:
    """Views of two gates for blocks, broadcastable to (C', kh, kw, n, rows, w)."""

    def __init__(self, first: Tensor, second: Tensor, slices: Slices) -> None:
        self.tensors, self.slices = (first, second), slices

    def of(self, block: Block) -> tuple[Tensor, Tensor]:
        first, second = (t[block.place.images] for t in self.tensors)
        rows = block.place.rows
        if first.dim() == 2:  # channel and position gates
            second = second[..., rows, :].transpose(0, 1)
            second = second.unflatten(0, self.slices.window.kernel_size).unsqueeze(0)
            return first[:, block.channels].T[:, None, None, :, None, None], second
        first, second = first[:, block.channels, :, rows], second[:, block.channels]
        first, second = first.permute(1, 2, 0, 3), second.permute(1, 2, 0, 3)
        return first[:, :, None, :, :, None], second[:, None, :, :, None]

    def product(self, block: Block) -> Tensor:
        """Return (C', K, P)."""
        first, second = self.of(block)
        shape = self.slices.shape(block)
        out = self.slices.scratch("gates", *shape)
        torch.mul(*(t.to(out.dtype) for t in (first, second)), out=out)
        return out.view(shape[0], -1, shape[3] * shape[4] * shape[5])


@_register
def gated_conv(
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *window_and_groups: Any,
) -> Tensor:
    """See schema.py."""
    *window, groups = window_and_groups
    slices = Slices(x, window, groups)
    features, gates = _Features(slices, feature, shift, relu), _Gates(first, second, slices)
    return _Product(x, weight, groups).convolve(
        slices, lambda block: features.of(block).mul_(gates.product(block)), bias
    )


@_register
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
    *window_and_groups: Any,
) -> tuple[Tensor, ...]:
    """See schema.py."""
    *window, groups = window_and_groups
    slices = Slices(x, window, groups)
    features = _Features(slices, feature, shift, relu, needs[:2])
    gates, product = _Gates(first, second, slices), _Product(x, weight, groups)
    grad_first, grad_second = (gradient_like(t, slices.dtype).zero_() for t in (first, second))
    grad_gates = _Gates(grad_first, grad_second, slices)
    for block, grad_out in product.backwards(slices, grad_y):
        values, gate = features.of(block), gates.product(block)
        weighted = features.apply(values, gate)
        grad = product.gradient(block, weighted, grad_out, needs[2])
        products = torch.mul(values, grad, out=weighted).view(slices.shape(block))
        found = gradients_of_gates(products, *(t.to(slices.dtype) for t in gates.of(block)))
        for total, own in zip(grad_gates.of(block), found, strict=True):
            total += own
        features.add(block, values, grad.mul_(gate))
    return (
        *features.gradients(),
        *(grad_first.to(first.dtype), grad_second.to(second.dtype)),
        *product.gradients(grad_y, needs),
    )


@_register
def pool_channels(
    x: Tensor, feature: Tensor, shift: Tensor, relu: bool, indexed: bool, *window: Any
) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    slices = Slices(x, window, split=False)
    features = _Features(slices, feature, shift, relu)
    maps = (slices.window.positions, *slices.size)
    pooled = x.new_empty((x.shape[0], 2, *maps), dtype=slices.dtype)
    largest = x.new_empty((x.shape[0], *maps) if indexed else (0,), dtype=slices.dtype)
    for place in slices.places():
        out = place.of(pooled)
        for block in slices.blocks(place):
            values = features.of(block)
            out[0] = values.amax(0).view_as(out[0])
            out[1] = values.mean(0).view_as(out[1])
            if indexed:
                place.of(largest).copy_(values.argmax(0).view_as(out[0]))
    return pooled, largest


@_register
def pool_channels_backward(
    grad: Tensor,
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    largest: Tensor,
    needs: Sequence[bool],
    *window: Any,
) -> tuple[Tensor, ...]:
    """See schema.py."""
    slices = Slices(x, window, split=False)
    features = _Features(slices, feature, shift, relu, needs)
    for place in slices.places():
        grad_out, index = place.of(grad).to(slices.dtype), place.of(largest).long()
        for block in slices.blocks(place):
            values = features.of(block)
            grad_values = slices.scratch("grad_values", *values.shape)
            grad_largest, grad_mean = grad_out.reshape(2, *values.shape[1:])
            grad_values.copy_(grad_mean / len(values))
            grad_values.scatter_add_(
                0, index.reshape(1, *values.shape[1:]), grad_largest.unsqueeze(0)
            )
            features.add(block, values, grad_values)
    return features.gradients()


@_register
def pool_coordinates(
    x: Tensor, feature: Tensor, shift: Tensor, relu: bool, *window: Any
) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu)
    (kh, kw), (height, width) = slices.window.kernel_size, slices.size
    rows = x.new_zeros((*x.shape[:2], kh, height), dtype=slices.dtype)
    columns = x.new_zeros((*x.shape[:2], kw, width), dtype=slices.dtype)
    sums = _Gates(rows, columns, slices)
    for place in slices.places():
        for block in slices.blocks(place):
            values = features.of(block).view(slices.shape(block))
            for total in sums.of(block):
                total += values.sum_to_size(total.shape)
    return rows / (kw * width), columns / (kh * height)


@_register
def pool_coordinates_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    needs: Sequence[bool],
    *window: Any,
) -> tuple[Tensor, ...]:
    """See schema.py."""
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, needs)
    (kh, kw), (height, width) = slices.window.kernel_size, slices.size
    grads = _Gates(grad_rows / (kw * width), grad_columns / (kh * height), slices)
    for place in slices.places():
        for block in slices.blocks(place):
            values = features.of(block)
            row_part, column_part = (t.to(slices.dtype) for t in grads.of(block))
            grad_values = slices.scratch("grad_values", *slices.shape(block))
            torch.add(row_part, column_part, out=grad_values)
            features.add(block, values, grad_values.view(values.shape))
    return features.gradients()
