"""The operators in plain torch, for every device that has no kernels of its own.

The features of a few rows of windows at a time are made, used in one matrix product, and dropped;
backward passes make them again. So they need a small part of the memory of the formula, which makes
the features of the whole map and keeps them.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import compute_dtype, no_autocast
from rfa_mmdet.ops.common.recompute import gradients_of_gates
from rfa_mmdet.ops.receptive_field.schema import LIBRARY, empty_output
from rfa_mmdet.ops.receptive_field.slices import Slice, Slices

KERNELS: list[Callable[..., Any]] = []


def _register(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def run(*args: Any) -> Any:
        with no_autocast(args[0]):
            return kernel(*args)

    LIBRARY.impl(kernel.__name__, run, "CompositeExplicitAutograd")
    KERNELS.append(run)
    return run


class _Features:
    """Features act(feature @ window + shift) of slices, (n, C, K, rows * w), and their gradients."""

    def __init__(
        self, slices: Slices, feature: Tensor, shift: Tensor, relu: bool, needs: Sequence[bool]
    ) -> None:
        positions = slices.window.positions
        self.slices, self.relu, self.shapes = slices, relu, (feature.shape, shift.shape)
        self.need_x, self.need_features = needs
        self.kernels = feature.reshape(-1, positions, positions)  # (C, K, K)
        self.shift = shift.reshape(-1, positions, 1)  # (C, K, 1)
        self.of_x = slices.empty_gradient(self.need_x)
        self.of_kernels = torch.zeros_like(self.kernels)
        self.of_shift = torch.zeros_like(self.shift)

    def of(self, part: Slice) -> Tensor:
        features = torch.matmul(self.kernels, part.windows).add_(self.shift)
        return features.relu_() if self.relu else features

    def add(self, part: Slice, features: Tensor, grad: Tensor, extra: Tensor | None = None) -> None:
        """Add up gradients, given that of the features; ``extra`` goes to all values of a window.

        Overwrites ``grad``.
        """
        if self.relu:
            grad.masked_fill_(features <= 0, 0)
        if self.need_features:
            self.of_kernels += torch.matmul(grad, part.windows.mT).sum(0)
            self.of_shift += grad.sum((0, 3)).unsqueeze(2)
        if self.need_x:
            of_windows = torch.matmul(self.kernels.mT, grad)
            if extra is not None:
                of_windows += extra
            self.slices.add_to(self.of_x, part, of_windows)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return those of x, feature and shift, empty where they are not needed."""
        feature, shift = self.of_kernels.view(self.shapes[0]), self.of_shift.view(self.shapes[1])
        if not self.need_features:
            feature, shift = feature.new_empty(0), shift.new_empty(0)
        return self.of_x.to(self.slices.x.dtype), feature, shift


class _Product:
    """The convolution of weighed features, (n, C, K, rows * w), and its gradients."""

    def __init__(self, x: Tensor, weight: Tensor, groups: int) -> None:
        self.weight, self.groups, self.dtype = weight, groups, x.dtype
        self.pointwise = weight.flatten(1)[:, :, None, None]  # (O, C / G * K, 1, 1)
        self.of_weight = torch.zeros_like(weight, dtype=compute_dtype(x.dtype))

    def _maps(self, weighed: Tensor, part: Slice) -> Tensor:
        """Return (n, C * K, rows, w)."""
        rows = part.rows.stop - part.rows.start
        return weighed.to(self.dtype).flatten(1, 2).unflatten(2, (rows, -1))

    def write(self, y: Tensor, part: Slice, weighed: Tensor, bias: Tensor | None) -> None:
        maps = self._maps(weighed, part)
        part.of(y).copy_(F.conv2d(maps, self.pointwise, bias, groups=self.groups))

    def add(self, part: Slice, weighed: Tensor, grad_y: Tensor, needs: Sequence[bool]) -> Tensor:
        """Add up the gradient of the weight, and return that of the weighed features."""
        of_weighed, of_weight, _ = torch.ops.aten.convolution_backward(
            *(part.of(grad_y), self._maps(weighed, part), self.pointwise, None),
            *((1, 1), (0, 0), (1, 1), False, (0, 0), self.groups),
            (needs[0] or needs[1], needs[2], False),
        )
        if of_weight is not None:
            self.of_weight += of_weight.view_as(self.weight)
        return of_weighed if of_weighed is None else of_weighed.to(weighed.dtype).view_as(weighed)

    def gradients(self, grad_y: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return those of weight and bias, empty where they are not needed."""
        weight = self.of_weight if needs[2] else self.weight.new_empty(0)
        dtype = self.of_weight.dtype
        bias = grad_y.sum((0, 2, 3), dtype=dtype) if needs[3] else weight.new_empty(0)
        return weight.to(self.dtype), bias.to(self.dtype)


class _Attention:
    """RFAConv's attention over the positions of each window, (n, C, K, rows * w)."""

    def __init__(self, attention: Tensor, slices: Slices) -> None:
        self.attention, self.positions = attention, slices.window.positions
        self.weight = attention.reshape(-1, self.positions, 1).to(slices.dtype)  # (C, K, 1)
        self.of_weight = torch.zeros_like(self.weight)

    def of(self, part: Slice) -> Tensor:
        return torch.softmax(self.weight * part.windows.mean(2, keepdim=True), 2)

    def add(self, part: Slice, attention: Tensor, products: Tensor) -> Tensor:
        """Add up the gradient of the weight, and return that of all values of a window.

        ``products``, of the attention and its gradient, are overwritten.
        """
        of_logits = products.sub_(attention * products.sum(2, keepdim=True))
        mean = part.windows.mean(2, keepdim=True)
        self.of_weight += torch.matmul(of_logits, mean.mT).sum(0)
        return torch.matmul(self.weight.mT, of_logits).div_(self.positions)

    def gradient(self, needed: bool) -> Tensor:
        of_weight = self.of_weight.view_as(self.attention) if needed else self.weight.new_empty(0)
        return of_weight.to(self.attention.dtype)


@_register
def window_moments(x: Tensor, *window: Any) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    slices = Slices(x, window)
    count = slices.window.count(x)
    # Squares of values far from zero would lose the variance.
    centre = x.mean((0, 2, 3), dtype=slices.dtype).view(-1, 1, 1)
    positions = slices.window.positions
    first = centre.new_zeros(x.shape[1], positions, 1)
    second = centre.new_zeros(x.shape[1], positions, positions)
    for part in slices:
        values = part.windows - centre
        first += values.sum((0, 3)).unsqueeze(2)
        second += torch.matmul(values, values.mT).sum(0)
    first, second = first / count, second / count
    return (first + centre).squeeze(2), second - first * first.mT


@_register
def window_moments_backward(x: Tensor, slope: Tensor, constant: Tensor, *window: Any) -> Tensor:
    """See schema.py."""
    slices = Slices(x, window)
    of_x = slices.empty_gradient(True)
    for part in slices:
        slices.add_to(of_x, part, torch.matmul(slope, part.windows).add_(constant.unsqueeze(2)))
    return of_x.to(x.dtype)


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
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, (False, False))
    attend, product = _Attention(attention, slices), _Product(x, weight, groups)
    y = empty_output(x, weight, *slices.window)
    for part in slices:
        product.write(y, part, features.of(part).mul_(attend.of(part)), bias)
    return y


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
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, needs[:2])
    attend, product = _Attention(attention, slices), _Product(x, weight, groups)
    for part in slices:
        made, weights = features.of(part), attend.of(part)
        grad = product.add(part, made * weights, grad_y, needs)
        if needs[0] or needs[1]:
            grad *= weights
            features.add(part, made, grad, attend.add(part, weights, grad * made))
    of_x, *of_features = features.gradients()
    return of_x, attend.gradient(needs[1]), *of_features, *product.gradients(grad_y, needs)


class _Gates:
    """Two gates, as views of slices, to be broadcast to (n, C, kh, kw, rows, w)."""

    def __init__(self, first: Tensor, second: Tensor, slices: Slices) -> None:
        self.tensors = first, second
        self.kernel_size = slices.window.kernel_size

    def of(self, part: Slice) -> tuple[Tensor, Tensor]:
        first, second = (t[part.images] for t in self.tensors)
        if first.dim() == 2:  # of channels and positions
            second = second[..., part.rows, :].unflatten(1, self.kernel_size)
            return first[:, :, None, None, None, None], second.unsqueeze(1)
        return first[..., part.rows][:, :, :, None, :, None], second[:, :, None, :, None, :]

    def laid_out(self, values: Tensor, part: Slice) -> Tensor:
        """Return values (n, C, K, rows * w) as what the gates are broadcast to."""
        rows = part.rows.stop - part.rows.start
        return values.view(*values.shape[:2], *self.kernel_size, rows, -1)

    def weigh(self, values: Tensor, part: Slice) -> Tensor:
        first, second = self.of(part)
        return (self.laid_out(values, part) * first).mul_(second).view_as(values)


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
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, (False, False))
    gates, product = _Gates(first, second, slices), _Product(x, weight, groups)
    y = empty_output(x, weight, *slices.window)
    for part in slices:
        product.write(y, part, gates.weigh(features.of(part), part), bias)
    return y


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
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, needs[:2])
    gates, product = _Gates(first, second, slices), _Product(x, weight, groups)
    of_first, of_second = (torch.zeros_like(t, dtype=slices.dtype) for t in (first, second))
    of_gates = _Gates(of_first, of_second, slices)
    for part in slices:
        made = features.of(part)
        grad = product.add(part, gates.weigh(made, part), grad_y, (True, True, needs[2]))
        products = gates.laid_out(grad * made, part)
        found = gradients_of_gates(products, *(t.to(slices.dtype) for t in gates.of(part)))
        for total, own in zip(of_gates.of(part), found, strict=True):
            total += own
        features.add(part, made, gates.weigh(grad, part))
    return (
        *features.gradients(),
        *(of_first.to(first.dtype), of_second.to(second.dtype)),
        *product.gradients(grad_y, needs),
    )


@_register
def pool_channels(
    x: Tensor, feature: Tensor, shift: Tensor, relu: bool, indexed: bool, *window: Any
) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, (False, False))
    maps = (slices.window.positions, *slices.size)
    pooled = x.new_empty((x.shape[0], 2, *maps), dtype=slices.dtype)
    largest = x.new_empty((x.shape[0], *maps) if indexed else (0,), dtype=slices.dtype)
    for part in slices:
        made, of_part = features.of(part), part.of(pooled)
        of_part[:, 0] = made.amax(1).view_as(of_part[:, 0])
        of_part[:, 1] = made.mean(1).view_as(of_part[:, 1])
        if indexed:
            part.of(largest).copy_(made.argmax(1).view_as(of_part[:, 0]))
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
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, needs)
    for part in slices:
        made = features.of(part)
        of_largest, of_mean = part.of(grad).flatten(3).to(slices.dtype).split(1, 1)
        of_features = (of_mean / x.shape[1]).repeat(1, x.shape[1], 1, 1)
        index = part.of(largest).flatten(2).long().unsqueeze(1)
        features.add(part, made, of_features.scatter_add_(1, index, of_largest))
    return features.gradients()


@_register
def pool_coordinates(
    x: Tensor, feature: Tensor, shift: Tensor, relu: bool, *window: Any
) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    slices = Slices(x, window)
    features = _Features(slices, feature, shift, relu, (False, False))
    (kh, kw), (height, width) = slices.window.kernel_size, slices.size
    rows = x.new_zeros((*x.shape[:2], kh, height), dtype=slices.dtype)
    columns = x.new_zeros((*x.shape[:2], kw, width), dtype=slices.dtype)
    means = _Gates(rows, columns, slices)
    for part in slices:
        made = means.laid_out(features.of(part), part)
        for total in means.of(part):
            total += made.sum_to_size(total.shape)
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
    for part in slices:
        made = features.of(part)
        of_rows, of_columns = grads.of(part)
        features.add(part, made, (of_rows + of_columns).reshape(made.shape).to(slices.dtype))
    return features.gradients()
