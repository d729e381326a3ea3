"""Chunks of the output, so that few features exist at a time, and their matrix products."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.schema import own_format
from rfa_mmdet.ops.receptive_field.triton.launch import Chunk, Maps

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POSITIONS = 9  # per window; more do not fit in registers
OFFSETS = 2**31 - 2**24  # elements addressable with 32 bits, with a margin for padding
BLOCKS = 65_535  # limit of a grid's second and third axis
# Parts of the weight's gradient accumulated in half precision (rounding after each addition loses
# about as much as rounding each part), and the maximum size of all such sums in bytes.
ROUNDED, PARTS_BYTES = 4, 2**22
# Limit of a chunk's features. There is one buffer of this size forward, and two (with gates, three)
# backward. Features that fit in the L2 cache would be read faster, but on an H100 the launches of
# more chunks take longer than that saves.
CHUNK_BYTES = 2**26


def takes(x: Tensor, weight: Tensor | None, window: Window, groups: int = 1) -> bool:
    """Return whether the kernels support a map (B, C, H, W)."""
    (height, width), (kh, kw) = window.output_size(x.shape[2:]), window.kernel_size
    # Channels of the largest map: outputs or position gates.
    maps = max(window.positions, 0 if weight is None else weight.shape[0])
    return (
        x.dtype in DTYPES
        and window.positions <= POSITIONS
        and groups == 1
        and 0 < x.numel() < OFFSETS
        and 0 < x.shape[0] * height * width * maps < OFFSETS
        and x.shape[1] <= BLOCKS
        and all(0 <= n <= 2**20 for pair in window for n in pair)
        # The smallest chunk is a row of the output.
        and window.positions * x.shape[1] * width < OFFSETS
        # A part of a sum covers at least four columns: 54 numbers for all images, 99 for a chunk.
        and max(14 * x.shape[0], 25) * x.shape[1] * width < OFFSETS
        # Row and column gates.
        and x.shape[0] * x.shape[1] * max(kh * height, kw * width) < OFFSETS
    )


def maps_of(x: Tensor, window: Window) -> Maps:
    """Return a map for the kernels; copies it if it is neither NCHW nor channels_last."""
    channels_last = own_format(x) is torch.channels_last
    if not channels_last:
        x = x.contiguous()
    return Maps(x, window, channels_last, window.output_size(x.shape[2:]))


def chunks(maps: Maps) -> Iterator[Chunk]:
    """Divide the output into even chunks whose features take at most ``CHUNK_BYTES``."""
    images, channels = maps.x.shape[:2]
    height, width = maps.size
    row_bytes = maps.window.positions * channels * width * maps.x.element_size()
    rows = max(1, CHUNK_BYTES // row_bytes)
    at_once, rows = (max(1, rows // height), height) if rows >= height else (1, rows)
    at_once = -(-images // -(-images // at_once))
    rows = -(-height // -(-height // rows))
    # Whole vectors, so that every channel is aligned for vector loads.
    pitch = -(-at_once * rows * width // 16) * 16
    for image in range(0, images, at_once):
        for row in range(0, height, rows):
            sizes = min(at_once, images - image), min(rows, height - row)
            yield Chunk(image, sizes[0], row, sizes[1], (at_once, rows), pitch)


def table_of(maps: Maps, *parameters: Tensor) -> Tensor:
    """Gather parameters, (C * n, ...) each, by channel, with the layout of the lanes."""
    channels = maps.x.shape[1]
    table = [p.reshape(channels, -1).float() for p in parameters]
    if maps.channels_last:
        return torch.cat([p.t() for p in table], 0)
    return torch.cat(table, 1)


class Products:
    """The convolution as a matrix product of weight and units, and its gradients.

    The units of P positions are (P, K * C) in channels_last and (C * K, pitch) in NCHW.
    """

    def __init__(self, maps: Maps, weight: Tensor | None) -> None:
        self.maps = maps
        self.units = maps.window.positions * maps.x.shape[1]
        if weight is not None:
            self.shape, self.layout = weight.shape, own_format(weight)
            # (O, K * C) and (O, C * K)
            order = weight.permute(0, 2, 3, 1) if maps.channels_last else weight
            self.weight = order.to(maps.x.dtype).reshape(len(weight), -1).contiguous()
        self.grad_weight = maps.x.new_empty(0)

    def buffer(self, rows: int, chunk: Chunk) -> Tensor:
        """Allocate ``rows`` values per position of a chunk."""
        positions = chunk.pitch
        shape = (positions, rows) if self.maps.channels_last else (rows, positions)
        return self.maps.x.new_empty(shape)

    def _positions(self, units: Tensor, chunk: Chunk) -> Tensor:
        count = chunk.images * chunk.rows * self.maps.size[1]
        return units[:count] if self.maps.channels_last else units[:, :count]

    def _of_map(self, y: Tensor, chunk: Chunk) -> Tensor:
        """Return a view of a chunk of a map (B, O, h, w): (P, O) or (n, O, positions), like x."""
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

    def add_weight_gradient(
        self, grad: Tensor, units: Tensor, chunk: Chunk, number: int, count: int
    ) -> None:
        """Add a chunk's part of the weight's gradient, with index ``number`` of ``count``.

        Half precision rounds each addition. So each sum accumulates only a few parts, and the sums
        are added up in float32: at the end or, if they would take much memory, immediately.
        """
        units = self._positions(units, chunk)
        a, b = (grad.t(), units) if self.maps.channels_last else (grad, units.t())
        few = count if a.dtype == torch.float32 else ROUNDED
        if number == 0:
            sums = -(-count // few)
            sums = sums if sums * self.weight.nbytes <= PARTS_BYTES else 1
            self.grad_weight = a.new_empty(sums, *self.weight.shape)
        place, added = divmod(number, few)
        if place >= len(self.grad_weight):
            self.grad_weight = self.grad_weight.float()
            self.grad_weight[0] += torch.mm(a, b)
        elif added:
            self.grad_weight[place].addmm_(a, b)
        else:
            torch.mm(a, b, out=self.grad_weight[place])

    def weight_gradient(self, dtype: torch.dtype) -> Tensor:
        """Return the gradient of the weight, (O, C, kh, kw)."""
        outputs, channels, *kernel_size = self.shape
        found = self.grad_weight
        found = found[0].to(dtype) if len(found) == 1 else found.sum(0, dtype=dtype)
        if self.maps.channels_last:
            found = found.view(outputs, *kernel_size, channels).permute(0, 3, 1, 2)
        return found.view(self.shape).contiguous(memory_format=self.layout)

    def windows(self, units: Tensor, chunk: Chunk) -> Tensor:
        """Return a view of the units of a chunk: (n, C, kh, kw, rows, w)."""
        units, (high, wide) = self._positions(units, chunk), self.maps.window.kernel_size
        places = (chunk.images, chunk.rows, self.maps.size[1])
        if self.maps.channels_last:
            return units.view(*places, high, wide, -1).permute(0, 5, 3, 4, 1, 2)
        units = units.reshape(-1, high, wide, *places)
        return units.permute(3, 0, 1, 2, 4, 5)
