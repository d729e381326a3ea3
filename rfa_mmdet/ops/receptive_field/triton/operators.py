"""CUDA kernels of the operators: Triton computes features by chunks, cuBLAS multiplies them.

Falls back to ``plain.py`` for unsupported arguments, such as windows with more than 9 positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rfa_mmdet.ops.common.torch_versions import products_as_convolutions
from rfa_mmdet.ops.common.windows import Pair, Window
from rfa_mmdet.ops.receptive_field import plain, statistics
from rfa_mmdet.ops.receptive_field.schema import NAMESPACE, own_format
from rfa_mmdet.ops.receptive_field.self_check import or_plain
from rfa_mmdet.ops.receptive_field.triton import launch
from rfa_mmdet.ops.receptive_field.triton.chunks import (
    POSITIONS,
    Products,
    chunks,
    maps_of,
    table_of,
    takes,
)
from rfa_mmdet.ops.receptive_field.triton.launch import (
    ATTENTION,
    BARE,
    CHANNELS,
    ROWS,
    Chunk,
    Gates,
    Maps,
)


def _window(pairs: Sequence[Pair]) -> Window:
    return Window(*((a, b) for a, b in pairs))  # the dispatcher passes lists


def window_moments(x: Tensor, *window: Pair) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    if not takes(x, None, _window(window)):
        return plain.window_moments(x, *window)
    return launch.moments(maps_of(x, _window(window)))


def window_moments_backward(
    x: Tensor, slope: Tensor, constant: Tensor, grad: Tensor | None, *window: Pair
) -> Tensor:
    """See schema.py."""
    if not takes(x, None, _window(window)):
        return plain.window_moments_backward(x, slope, constant, grad, *window)
    maps = maps_of(x, _window(window))
    if grad is not None:
        grad = grad.contiguous(memory_format=maps.layout)
    grad_x = torch.empty_like(maps.x)
    launch.moments_gradient(maps, slope, constant, grad, grad_x)
    return grad_x


def add_window_moments_backward(
    grad: Tensor, x: Tensor, slope: Tensor, constant: Tensor, *window: Pair
) -> None:
    """See plain.py."""
    maps = maps_of(x, _window(window)) if takes(x, None, _window(window)) else None
    if maps is None or not grad.is_contiguous(memory_format=maps.layout):
        plain.add_window_moments_backward(grad, x, slope, constant, *window)
    else:
        launch.moments_gradient(maps, slope, constant, grad, grad)


def _takes_moments(mean: Tensor) -> bool:
    return mean.dtype == torch.float32 and mean.numel() > 0 and mean.shape[1] <= POSITIONS


def fold_moments(
    mean: Tensor, covariance: Tensor, feature: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    """See statistics.py."""
    if not _takes_moments(mean):
        return statistics.fold_moments(mean, covariance, feature, *others)
    return launch.fold_moments(mean, covariance, feature.contiguous(), *others)


def fold_moments_backward(
    grad_feature: Tensor,
    grad_shift: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    """See statistics.py."""
    if not _takes_moments(mean):
        return statistics.fold_moments_backward(
            grad_feature, grad_shift, feature, weight, mean, *others
        )
    given = grad_feature.contiguous(), grad_shift.contiguous(), feature.contiguous()
    return launch.fold_moments_backward(*given, weight, mean, *others)


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
    if not takes(x, weight, _window(window), groups):
        return plain.rfa_conv(x, attention, feature, shift, relu, weight, bias, *window_and_groups)
    maps = maps_of(x, _window(window))
    table = table_of(maps, attention, shift, feature)
    return _convolve(maps, table, Gates(ATTENTION), relu, weight, bias)


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
    if not takes(x, weight, _window(window), groups):
        return plain.gated_conv(
            x, feature, shift, relu, first, second, weight, bias, *window_and_groups
        )
    maps = maps_of(x, _window(window))
    gates = _gates(maps, first, second)
    return _convolve(maps, _bare_table(maps, feature, shift), gates, relu, weight, bias)


def _gates(maps: Maps, first: Tensor, second: Tensor) -> Gates:
    kind = CHANNELS if first.dim() == 2 else ROWS
    if kind == ROWS and maps.channels_last:
        first, second = first.permute(0, 2, 3, 1), second.permute(0, 2, 3, 1)
    return Gates(kind, first.contiguous(), second.contiguous())


def _bare_table(maps: Maps, feature: Tensor, shift: Tensor) -> Tensor:
    """Return a table without attention: kernels do not read those rows."""
    return table_of(maps, shift, shift, feature)


def _convolve(
    maps: Maps, table: Tensor, gates: Gates, relu: bool, weight: Tensor, bias: Tensor | None
) -> Tensor:
    product, y = Products(maps, weight), maps.new_map(weight.shape[0], maps.size)
    units: Tensor | None = None
    with products_as_convolutions(y.dtype):
        for chunk in chunks(maps):
            units = product.buffer(product.units, chunk) if units is None else units
            launch.features(maps, table, gates, relu, units, chunk)
            product.write(y, units, bias, chunk)
    return y


class _Backward:
    """Buffers of a backward pass, and the steps that all operators perform for each chunk.

    Deterministic: nothing uses atomics.
    """

    def __init__(
        self, maps: Maps, table: Tensor, relu: bool, weight: Tensor | None, needs: Sequence[bool]
    ) -> None:
        self.maps, self.table, self.relu = maps, table, relu
        self.need_x, self.need_features = needs
        self.products = Products(maps, weight)
        self.none = maps.x.new_empty(0)
        self.grad_x = torch.empty_like(maps.x) if self.need_x else self.none
        self.sums: Tensor | None = None
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, chunk: Chunk, rows: int = 0) -> Tensor:
        """Return a buffer by name, with ``rows`` values per position, by default K * C."""
        if name not in self.buffers:  # the first chunk is the largest
            self.buffers[name] = self.products.buffer(rows or self.products.units, chunk)
        return self.buffers[name]

    def add(self, chunk: Chunk, kind: int, others: Tensor) -> None:
        """Accumulate the gradients of table and map from those in the buffer ``slopes``."""
        slopes = self.buffer("slopes", chunk)
        sums, add = self.partial_sums(chunk)
        launch.products(self.maps, self.table, kind, self.relu, slopes, others, sums, add, chunk)
        if self.need_x:
            launch.fold(self.maps, slopes, self.grad_x, chunk)

    def partial_sums(self, chunk: Chunk) -> tuple[Tensor, bool]:
        """Return the parts of the table's gradient, and whether to add to earlier chunks' parts."""
        channels = self.maps.x.shape[1]
        if self.sums is None:
            shape = (launch.parts(self.maps, chunk), self.table.numel() // channels, channels)
            self.sums = self.maps.x.new_empty(shape, dtype=torch.float32)
        return self.sums, chunk.image + chunk.row > 0

    def gradients(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x, attention, feature and shift."""
        if not self.need_features:
            return self.grad_x, *(self.none for _ in parameters)
        found = tuple(torch.empty_like(p) for p in parameters)
        assert self.sums is not None
        attention, feature, shift = found
        launch.add_up(self.maps, self.sums, attention, shift, feature)
        return self.grad_x, *found


def _conv_backward(
    grad_y: Tensor,
    run: _Backward,
    gates: Gates,
    weight: Tensor,
    needs: Sequence[bool],
    add_gate_gradients: Callable[[Tensor, Chunk], None] | None,
) -> tuple[Tensor, Tensor]:
    """Process all chunks of a convolution, and return the gradients of weight and bias.

    Calls ``add_gate_gradients`` with the gradient of the product of both gates.
    """
    maps, product = run.maps, run.products
    need_kernels = needs[0] or needs[1] or add_gate_gradients is not None
    all_chunks = [*chunks(maps)] if need_kernels or needs[2] else []
    for number, chunk in enumerate(all_chunks):
        grad, units = product.gradient(grad_y, chunk), run.buffer("units", chunk)
        if not need_kernels:
            launch.features(maps, run.table, gates, run.relu, units, chunk)
            product.add_weight_gradient(grad, units, chunk, number, len(all_chunks))
            continue
        product.units_gradient(grad, units, chunk)
        slopes = run.buffer("slopes", chunk)
        others = run.buffer("others", chunk, maps.x.shape[1] if add_gate_gradients is None else 0)
        launch.gradient(
            *(maps, run.table, gates, run.relu, units, slopes, others),
            *(*run.partial_sums(chunk), chunk),
        )
        if needs[2]:
            product.add_weight_gradient(grad, units, chunk, number, len(all_chunks))
        if add_gate_gradients is not None:
            add_gate_gradients(others, chunk)
        if needs[0] or needs[1]:
            run.add(chunk, gates.kind, others)
    grad_bias = run.none
    if needs[3]:
        grad_bias = grad_y.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    return product.weight_gradient(weight.dtype) if needs[2] else run.none, grad_bias


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
    if not takes(x, weight, _window(window), groups):
        return plain.rfa_conv_backward(
            grad_y, x, attention, feature, shift, relu, weight, needs, *window_and_groups
        )
    maps = maps_of(x, _window(window))
    table = table_of(maps, attention, shift, feature)
    run = _Backward(maps, table, relu, weight, needs[:2])
    with products_as_convolutions(x.dtype):
        grad_weight, grad_bias = _conv_backward(grad_y, run, Gates(ATTENTION), weight, needs, None)
    return *run.gradients(attention, feature, shift), grad_weight, grad_bias


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
    if not takes(x, weight, _window(window), groups):
        return plain.gated_conv_backward(
            grad_y, x, feature, shift, relu, first, second, weight, needs, *window_and_groups
        )
    maps = maps_of(x, _window(window))
    run = _Backward(maps, _bare_table(maps, feature, shift), relu, weight, needs[:2])
    totals = [
        torch.zeros_like(t, dtype=torch.float32, memory_format=own_format(t))
        for t in (first, second)
    ]

    def add(products: Tensor, chunk: Chunk) -> None:
        # Nothing needs the units of this chunk any more, so reuse their memory.
        used = run.products.windows(run.buffer("units", chunk), chunk)
        products = run.products.windows(products, chunk)
        grad_first, grad_second = _gate_windows(maps, chunk, *totals)
        one, other = _gate_windows(maps, chunk, first, second)
        _add_sum(grad_first, torch.mul(products, other, out=used))
        _add_sum(grad_second, products.mul_(one))

    with products_as_convolutions(x.dtype):
        gates = _gates(maps, first, second)
        grad_weight, grad_bias = _conv_backward(grad_y, run, gates, weight, needs, add)
    grad_x, _, grad_feature, grad_shift = run.gradients(shift, feature, shift)
    grad_gates = (total.to(t.dtype) for total, t in zip(totals, (first, second), strict=True))
    return grad_x, grad_feature, grad_shift, *grad_gates, grad_weight, grad_bias


def _add_sum(total: Tensor, values: Tensor) -> None:
    """Add values to a total of smaller shape, summed over the axes of size 1."""
    axes = [axis for axis, size in enumerate(total.shape) if size < values.shape[axis]]
    total += values.sum(axes, keepdim=True, dtype=total.dtype) if axes else values


def _gate_windows(maps: Maps, chunk: Chunk, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the gates of a chunk, broadcastable to (n, C, kh, kw, rows, w)."""
    first, second = (t[chunk.image : chunk.image + chunk.images] for t in (first, second))
    rows = slice(chunk.row, chunk.row + chunk.rows)
    if first.dim() == 2:
        second = second[:, :, rows].unflatten(1, maps.window.kernel_size)
        return first[:, :, None, None, None, None], second.unsqueeze(1)
    return first[..., rows][:, :, :, None, :, None], second[:, :, None, :, None, :]


def pool_channels(
    x: Tensor, feature: Tensor, shift: Tensor, relu: bool, indexed: bool, *window: Pair
) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    if not takes(x, None, _window(window)):
        return plain.pool_channels(x, feature, shift, relu, indexed, *window)
    maps = maps_of(x, _window(window))
    places = (maps.window.positions, *maps.size)
    pooled = x.new_empty((x.shape[0], 2, *places), dtype=torch.float32)
    largest = x.new_empty((x.shape[0], *places) if indexed else (0,), dtype=torch.float32)
    for features, images, rows in _bare_features(maps, feature, shift, relu):
        features = features.flatten(2, 3)  # (n, C, K, rows, w)
        most, index = features.max(1)
        pooled[images, 0, :, rows] = most
        pooled[images, 1, :, rows] = features.mean(1, dtype=torch.float32)
        if indexed:
            largest[images, :, rows] = index.float()
    return pooled, largest


def pool_coordinates(
    x: Tensor, feature: Tensor, shift: Tensor, relu: bool, *window: Pair
) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    if not takes(x, None, _window(window)):
        return plain.pool_coordinates(x, feature, shift, relu, *window)
    maps = maps_of(x, _window(window))
    (high, wide), (height, width) = maps.window.kernel_size, maps.size
    row_means = x.new_empty((*x.shape[:2], high, height), dtype=torch.float32)
    column_sums = x.new_zeros((*x.shape[:2], wide, width), dtype=torch.float32)
    for features, images, rows in _bare_features(maps, feature, shift, relu):
        row_means[images, ..., rows] = features.mean((3, 5), dtype=torch.float32)
        column_sums[images] += features.sum((2, 4), dtype=torch.float32)
    return row_means, column_sums / (high * height)


def _bare_features(maps: Maps, feature: Tensor, shift: Tensor, relu: bool) -> Any:
    """Yield features (n, C, kh, kw, rows, w), and their images and rows."""
    table, product = _bare_table(maps, feature, shift), Products(maps, None)
    units: Tensor | None = None
    for chunk in chunks(maps):
        units = product.buffer(product.units, chunk) if units is None else units
        launch.features(maps, table, Gates(BARE), relu, units, chunk)
        images, rows = (
            slice(chunk.image, chunk.image + chunk.images),
            slice(chunk.row, chunk.row + chunk.rows),
        )
        yield product.windows(units, chunk), images, rows


def pool_channels_backward(
    grad: Tensor,
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    largest: Tensor,
    needs: Sequence[bool],
    *window: Pair,
) -> tuple[Tensor, ...]:
    """See schema.py."""
    if not takes(x, None, _window(window)):
        return plain.pool_channels_backward(grad, x, feature, shift, relu, largest, needs, *window)

    def write(slopes: Tensor, images: slice, rows: slice) -> None:
        slopes = slopes.flatten(2, 3)
        grad_largest, grad_mean = grad[images, :, :, rows].to(slopes.dtype).split(1, 1)
        slopes.copy_(grad_mean / x.shape[1])
        index = largest[images, :, rows].long().unsqueeze(1)
        slopes.scatter_add_(1, index, grad_largest)

    return _features_backward(x, feature, shift, relu, needs, _window(window), write)


def pool_coordinates_backward(
    grad_rows: Tensor,
    grad_columns: Tensor,
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    needs: Sequence[bool],
    *window: Pair,
) -> tuple[Tensor, ...]:
    """See schema.py."""
    if not takes(x, None, _window(window)):
        return plain.pool_coordinates_backward(
            grad_rows, grad_columns, x, feature, shift, relu, needs, *window
        )
    (high, wide), (height, width) = window[0], _window(window).output_size(x.shape[2:])
    grad_rows, grad_columns = grad_rows / (wide * width), grad_columns / (high * height)

    def write(slopes: Tensor, images: slice, rows: slice) -> None:
        first = grad_rows[images, ..., rows][:, :, :, None, :, None]
        torch.add(first, grad_columns[images][:, :, None, :, None, :], out=slopes)

    return _features_backward(x, feature, shift, relu, needs, _window(window), write)


def _features_backward(
    x: Tensor,
    feature: Tensor,
    shift: Tensor,
    relu: bool,
    needs: Sequence[bool],
    window: Window,
    write: Callable[[Tensor, slice, slice], None],
) -> tuple[Tensor, ...]:
    """Return the gradients of x, feature and shift, given a function that writes the features'."""
    maps = maps_of(x, window)
    run = _Backward(maps, _bare_table(maps, feature, shift), relu, None, needs)
    for chunk in chunks(maps):
        slopes, features = run.buffer("slopes", chunk), run.buffer("features", chunk)
        images = slice(chunk.image, chunk.image + chunk.images)
        write(run.products.windows(slopes, chunk), images, slice(chunk.row, chunk.row + chunk.rows))
        if relu:
            launch.features(maps, run.table, Gates(BARE), relu, features, chunk)
        run.add(chunk, BARE, features)
    grad_x, _, grad_feature, grad_shift = run.gradients(shift, feature, shift)
    return grad_x, grad_feature, grad_shift


KERNELS = (
    *(window_moments, window_moments_backward, add_window_moments_backward),
    *(rfa_conv, rfa_conv_backward),
    *(gated_conv, gated_conv_backward, pool_channels, pool_channels_backward),
    *(pool_coordinates, pool_coordinates_backward, fold_moments, fold_moments_backward),
)
_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def register(key: str) -> None:
    """Register the kernels for a dispatch key, once.

    Args:
        key (str): 'CUDA', or 'CPU' to test with Triton's interpreter instead of the C++ kernels.
    """
    for function in KERNELS:
        _LIBRARY.impl(function.__name__, or_plain(function), key)
