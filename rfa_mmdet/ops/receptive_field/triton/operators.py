"""The operators' kernels for CUDA: chunks of features by Triton, and their products by cuBLAS.

A chunk's features stay in the second-level cache until the product has read them. What is not
taken here, such as windows of more than 9 positions, is computed by ``plain.py``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rfa_mmdet.ops.common.windows import Pair, Window
from rfa_mmdet.ops.receptive_field import plain
from rfa_mmdet.ops.receptive_field.schema import NAMESPACE
from rfa_mmdet.ops.receptive_field.triton import launch
from rfa_mmdet.ops.receptive_field.triton.launch import Chunk, Maps

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POSITIONS = 9  # of a window: more do not fit into registers
OFFSETS = 2**31 - 2**24  # elements that 32 bits can tell apart, and what lies beside a map
BLOCKS = 65_535  # of a grid's second and third axis
LEAST_BYTES = 2**23  # of a chunk's features, on a GPU with little cache


def takes(x: Tensor, weight: Tensor | None, window: Window, groups: int = 1) -> bool:
    """Whether there are kernels for a map (B, C, H, W)."""
    height, width = window.output_size(x.shape[2:])
    outputs = 1 if weight is None else weight.shape[0]
    return (
        x.dtype in DTYPES
        and window.positions <= POSITIONS
        and groups == 1
        and 0 < x.numel() < OFFSETS
        and 0 < x.shape[0] * height * width * max(outputs, 1) < OFFSETS
        and x.shape[1] <= BLOCKS
        and all(0 <= n <= 2**20 for pair in window for n in pair)
        # A row of the output is the smallest chunk.
        and window.positions * x.shape[1] * width < OFFSETS
    )


def maps_of(x: Tensor, window: Window) -> Maps:
    """Return a map as the kernels read it; a copy if it is neither NCHW nor channels_last."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not channels_last:
        x = x.contiguous()
    return Maps(x, window, channels_last, window.output_size(x.shape[2:]))


def chunk_bytes(x: Tensor, share: int) -> int:
    """Return how many bytes of features to make at a time: a share of the second-level cache."""
    if not x.is_cuda:
        return LEAST_BYTES
    cache: int = getattr(torch.cuda.get_device_properties(x.device), "L2_cache_size", 0)
    return max(cache // share, LEAST_BYTES)


def chunks(maps: Maps, limit: int) -> Iterator[Chunk]:
    """Divide the output into parts of one size whose features take ``limit`` bytes at most."""
    images, channels = maps.x.shape[:2]
    height, width = maps.size
    of_row = maps.window.positions * channels * width * maps.x.element_size()
    rows = max(1, limit // of_row)
    at_once, rows = (max(1, rows // height), height) if rows >= height else (1, rows)
    at_once = -(-images // -(-images // at_once))
    rows = -(-height // -(-height // rows))
    # Whole vectors, so that each channel begins where one can be read at once.
    pitch = -(-at_once * rows * width // 16) * 16
    for image in range(0, images, at_once):
        for row in range(0, height, rows):
            sizes = min(at_once, images - image), min(rows, height - row)
            yield Chunk(image, sizes[0], row, sizes[1], (at_once, rows), pitch)


def table_of(maps: Maps, *parameters: Tensor) -> Tensor:
    """Gather parameters, (C * n, ...) each, channel by channel: neighbours as the lanes are."""
    channels = maps.x.shape[1]
    table = [p.reshape(channels, -1).float() for p in parameters]
    if maps.channels_last:
        return torch.cat([p.t() for p in table], 0)
    return torch.cat(table, 1)


class Products:
    """The convolution as a matrix product of weight and units, and its gradients.

    Units of P positions are (P, K * C) in channels_last and (C * K, pitch) in NCHW.
    """

    def __init__(self, maps: Maps, weight: Tensor) -> None:
        self.maps, self.shape = maps, weight.shape
        outputs, channels = weight.shape[:2]
        # (O, K * C) and (O, C * K)
        order = weight.permute(0, 2, 3, 1) if maps.channels_last else weight
        self.weight = order.to(maps.x.dtype).reshape(outputs, -1).contiguous()
        self.units = maps.window.positions * channels
        self.of_weight: Tensor | None = None

    def buffer(self, rows: int, chunk: Chunk) -> Tensor:
        """Return new memory for ``rows`` values of each position of a chunk."""
        positions = chunk.pitch
        shape = (positions, rows) if self.maps.channels_last else (rows, positions)
        return self.maps.x.new_empty(shape)

    def _positions(self, units: Tensor, chunk: Chunk) -> Tensor:
        count = chunk.images * chunk.rows * self.maps.size[1]
        return units[:count] if self.maps.channels_last else units[:, :count]

    def _of_map(self, y: Tensor, chunk: Chunk) -> Tensor:
        """View a chunk of a map (B, O, h, w), in the format of x: (P, O), or (n, O, positions)."""
        y = y[chunk.image : chunk.image + chunk.images, :, chunk.row : chunk.row + chunk.rows]
        if self.maps.channels_last:
            return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
        return y.flatten(2)

    def write(self, y: Tensor, units: Tensor, bias: Tensor | None, chunk: Chunk) -> None:
        """Compute a chunk of y, (B, O, h, w)."""
        units, y = self._positions(units, chunk), self._of_map(y, chunk)
        if self.maps.channels_last:
            if bias is None:
                torch.mm(units, self.weight.t(), out=y)
            else:
                torch.addmm(bias, units, self.weight.t(), out=y)
            return
        units = units.unflatten(1, (chunk.images, -1)).transpose(0, 1)
        weight = self.weight.expand(chunk.images, -1, -1)
        if bias is None:
            torch.bmm(weight, units, out=y)
        else:
            torch.baddbmm(bias.view(1, -1, 1), weight, units, out=y)

    def gradient(self, grad_y: Tensor, chunk: Chunk) -> Tensor:
        """Return a chunk of the gradient of y, as one matrix: (P, O) or (O, P)."""
        grad = self._of_map(grad_y, chunk).to(self.maps.x.dtype)
        if self.maps.channels_last:
            return grad.contiguous()
        return grad.transpose(0, 1).flatten(1)

    def units_gradient(self, grad: Tensor, units: Tensor, chunk: Chunk) -> None:
        """Compute the gradient of the units."""
        units = self._positions(units, chunk)
        if self.maps.channels_last:
            torch.mm(grad, self.weight, out=units)
        else:
            torch.mm(self.weight.t(), grad, out=units)

    def add_weight_gradient(self, grad: Tensor, units: Tensor, chunk: Chunk) -> None:
        """Add a chunk's part of the weight's gradient: in float32, as there are several."""
        units = self._positions(units, chunk)
        a, b = (grad.t(), units) if self.maps.channels_last else (grad, units.t())
        if self.of_weight is None:
            self.of_weight = torch.mm(a, b)
        elif self.of_weight.dtype == a.dtype == torch.float32:
            self.of_weight.addmm_(a, b)
        else:
            self.of_weight = self.of_weight.float().add_(torch.mm(a, b))

    def weight_gradient(self, dtype: torch.dtype) -> Tensor:
        """Return the gradient of the weight, (O, C, kh, kw)."""
        assert self.of_weight is not None
        outputs, channels, *kernel_size = self.shape
        if not self.maps.channels_last:
            return self.of_weight.view(self.shape).to(dtype)
        found = self.of_weight.view(outputs, *kernel_size, channels).permute(0, 3, 1, 2)
        return found.to(dtype)


def window_moments(x: Tensor, *window: Pair) -> tuple[Tensor, Tensor]:
    """See schema.py."""
    if not takes(x, None, Window(*window)):
        return plain.window_moments(x, *window)
    return launch.moments(maps_of(x, Window(*window)))


def window_moments_backward(x: Tensor, slope: Tensor, constant: Tensor, *window: Pair) -> Tensor:
    """See schema.py."""
    if not takes(x, None, Window(*window)):
        return plain.window_moments_backward(x, slope, constant, *window)
    maps = maps_of(x, Window(*window))
    grad_x = torch.empty_like(maps.x)
    launch.moments_gradient(maps, table_of(maps, constant, slope), None, grad_x)
    return grad_x


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
    *pairs, groups = window_and_groups
    window = Window(*pairs)
    if not takes(x, weight, window, groups):
        return plain.rfa_conv(x, attention, feature, shift, relu, weight, bias, *window_and_groups)
    maps = maps_of(x, window)
    table = table_of(maps, attention, shift, feature)
    layout = torch.channels_last if maps.channels_last else torch.contiguous_format
    shape = (x.shape[0], weight.shape[0], *maps.size)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    product = Products(maps, weight)
    units = None
    for chunk in chunks(maps, chunk_bytes(x, 2)):
        units = product.buffer(product.units, chunk) if units is None else units
        launch.features(maps, table, True, relu, units, chunk)
        product.write(y, units, bias, chunk)
    return y


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
    """See schema.py.

    Nothing is added up by atomics: two runs give the same bits.
    """
    *pairs, groups = window_and_groups
    window = Window(*pairs)
    if not takes(x, weight, window, groups):
        return plain.rfa_conv_backward(
            grad_y, x, attention, feature, shift, relu, weight, needs, *window_and_groups
        )
    need_x, need_features, need_weight, need_bias = needs
    maps = maps_of(x, window)
    table = table_of(maps, attention, shift, feature)
    product = Products(maps, weight)
    none = x.new_empty(0)
    grad_x = torch.empty_like(maps.x) if need_x else none
    units = slopes = means = sums = none
    first = True
    for chunk in chunks(maps, chunk_bytes(x, 4)) if any(needs[:3]) else ():
        if first:
            units = product.buffer(product.units, chunk)
        grad = product.gradient(grad_y, chunk)
        if need_x or need_features:
            if first:
                slopes, means = torch.empty_like(units), product.buffer(x.shape[1], chunk)
                shape = (launch.parts(maps, chunk), len(table.flatten()) // x.shape[1], x.shape[1])
                sums = x.new_empty(shape, dtype=torch.float32)
            product.units_gradient(grad, units, chunk)
            launch.gradient(maps, table, relu, units, slopes, means, sums, not first, chunk)
        else:
            launch.features(maps, table, True, relu, units, chunk)
        if need_weight:
            product.add_weight_gradient(grad, units, chunk)
        if need_x or need_features:
            launch.products(maps, table, True, relu, slopes, means, sums, not first, chunk)
        if need_x:
            launch.fold(maps, slopes, grad_x, chunk)
        first = False
    of_table = (none,) * 3
    if need_features:
        of_table = tuple(torch.empty_like(p) for p in (attention, feature, shift))
        launch.add_up(maps, sums, of_table[0], of_table[2], of_table[1])
    of_weight = product.weight_gradient(weight.dtype) if need_weight else none
    of_bias = none
    if need_bias:
        of_bias = grad_y.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
    return grad_x, *of_table, of_weight, of_bias


_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def register(key: str) -> None:
    """Register the kernels for a dispatch key, once.

    Args:
        key (str): 'CUDA'; 'CPU' where Triton's interpreter is to take the place of the C++ kernels.
    """
    for function in (window_moments, window_moments_backward, rfa_conv, rfa_conv_backward):
        _LIBRARY.impl(function.__name__, function, key)
