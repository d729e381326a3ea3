"""Iterate over the windows of a map in blocks of positions and channels."""

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import compute_dtype
from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.schema import layout_like

# Bytes of a block's features: on a CPU, a few blocks fit in a core's cache; on a GPU, a block takes
# longer to compute than to launch.
CPU_BYTES, GPU_BYTES = 2**20, 2**24


class Place(NamedTuple):
    """Some output rows of some images.

    Attributes:
        images (slice): Images of the batch.
        rows (slice): Rows of the output.
    """

    images: slice
    rows: slice

    def of(self, maps: Tensor) -> Tensor:
        """Return a view of this place in maps (B, C, ..., h, w): (C, ..., n, rows, w)."""
        return maps[self.images][..., self.rows, :].movedim(0, -3)


class Block(NamedTuple):
    """Windows of some channels at a place.

    Attributes:
        place (Place): Place with P = n * rows * w positions.
        channels (slice): Channels of the input.
        windows (Tensor): (C', K + 1, P), at least float32. The last value of each window is 1, so
            that a matrix applied to windows can have a bias column.
    """

    place: Place
    channels: slice
    windows: Tensor


class Slices:
    """Iterates over the windows of a map.

    Args:
        x (Tensor): (B, C, H, W).
        window (Sequence): The fields of a Window.
        groups (int): Groups of channels. A block has whole groups or part of one. Defaults to 1.
        split (bool): Whether a block may have only some of the channels. Defaults to True.
        centre (Tensor | None): (C, 1, 1), subtracted from the windows' values.
    """

    def __init__(
        self,
        x: Tensor,
        window: Sequence[Any],
        groups: int = 1,
        split: bool = True,
        centre: Tensor | None = None,
    ) -> None:
        self.x, self.window = x, Window(*window)
        self.group, self.split = x.shape[1] // groups, split
        self.size = self.window.output_size(x.shape[2:])
        self.dtype = compute_dtype(x.dtype)
        above, side = self.window.padding
        self._padded = F.pad(x, (side, side, above, above)) if above or side else x
        if centre is not None:
            self._padded = self._padded - centre
        size = CPU_BYTES if x.device.type == "cpu" else GPU_BYTES
        self.limit = size // torch.finfo(self.dtype).bits * 8  # elements
        self._scratch: dict[str, Tensor] = {}

    def places(self) -> Iterator[Place]:
        """Yield places that cover the output, each position once."""
        batch, channels = self.x.shape[:2]
        height, width = self.size
        if 0 in (batch, channels, height, width):
            return
        positions = self.limit // (channels * self.window.positions)
        # With few positions, reading the whole weight would dominate: use fewer channels instead.
        square = isqrt(self.limit)
        if self.split and positions < square // 2:
            positions = square
        rows = _evenly(height, positions // width)
        images = _evenly(batch, positions // (height * width)) if rows == height else 1
        for image in range(0, batch, images):
            image_slice = slice(image, min(batch, image + images))
            for y in range(0, height, rows):
                yield Place(image_slice, slice(y, min(height, y + rows)))

    def blocks(self, place: Place) -> Iterator[Block]:
        """Yield the blocks of a place. Each overwrites the windows of the previous one."""
        channels, group = self.x.shape[1], self.group
        step = channels
        if self.split:
            count = _length(place.images) * _length(place.rows) * self.size[1]
            most = max(1, self.limit // (self.window.positions * count))
            if most >= group:
                step = group * _evenly(channels // group, most // group)
            else:
                step = _evenly(group, most)
        width = max(step, group)
        for first in range(0, channels, width):
            last = min(channels, first + width)
            for start in range(first, last, step):
                channel_slice = slice(start, min(last, start + step))
                yield Block(place, channel_slice, self._windows(place, channel_slice))

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Return a buffer by name, reused if it has the same shape.

        On a CPU, new memory costs as much time as what is computed in it.
        """
        found = self._scratch.get(name)
        if found is None or found.shape != shape:
            found = self._scratch[name] = self.x.new_empty(shape, dtype=self.dtype)
        return found

    def empty_gradient(self, needed: bool) -> Tensor:
        """Return zeros to accumulate the gradient of x in; empty if it is not needed.

        At least float32, because rows of x that several places share are added to repeatedly.
        """
        return self.x.new_zeros(self.x.shape if needed else (0,), dtype=self.dtype)

    def as_gradient(self, grad_x: Tensor) -> Tensor:
        """Return what was accumulated with the dtype and layout of the gradient of x."""
        grad_x = grad_x.to(self.x.dtype)
        return grad_x.contiguous(memory_format=layout_like(self.x)) if grad_x.dim() == 4 else grad_x

    def add_to(self, grad_x: Tensor, block: Block, grad: Tensor) -> None:
        """Add the gradient of a block's windows, (C', K, P), to that of x."""
        (kh, kw), (sy, sx), (above, side), (dy, dx) = self.window
        place, (height, width) = block.place, self.x.shape[2:]
        grad = grad.view(self.shape(block))
        channels, _, _, images, rows, columns = grad.shape
        target = grad_x[place.images, block.channels].transpose(0, 1)
        # First along the rows, then down the columns: kw + kh additions, not kw * kh.
        wide = grad.new_zeros(channels, kh, images, rows, width)
        for j in range(kw):
            to, of = _inside(j * dx - side, sx, columns, width)
            wide[..., to] += grad[:, :, j, ..., of]
        for i in range(kh):
            to, of = _inside(i * dy - above + sy * place.rows.start, sy, rows, height)
            target[:, :, to] += wide[:, i, :, of]

    def shape(self, block: Block) -> tuple[int, ...]:
        """Return (C', kh, kw, n, rows, w)."""
        return self._shape(block.place, block.channels)

    def _shape(self, place: Place, channels: slice) -> tuple[int, ...]:
        counts = _length(place.images), _length(place.rows), self.size[1]
        return _length(channels), *self.window.kernel_size, *counts

    def _windows(self, place: Place, channels: slice) -> Tensor:
        _, (sy, sx), _, (dy, dx) = self.window
        x = self._padded[place.images, channels, sy * place.rows.start :]
        shape = self._shape(place, channels)
        image_stride, channel_stride, row_stride, column_stride = x.stride()
        strides = (
            channel_stride,
            dy * row_stride,
            dx * column_stride,
            image_stride,
            sy * row_stride,
            sx * column_stride,
        )
        positions, count = self.window.positions, shape[3] * shape[4] * shape[5]
        before = self._scratch.get("windows")
        windows = self.scratch("windows", shape[0], positions + 1, count)
        if windows is not before:
            windows[:, positions] = 1
        windows[:, :positions].view(shape).copy_(x.as_strided(shape, strides))
        return windows


def _inside(offset: int, step: int, count: int, size: int) -> tuple[slice, slice]:
    """Return which of the cells offset, offset + step, ... are in range(size), and their indices.

    Example:
        >>> _inside(-1, 2, 4, 5)
        (slice(1, 4, 2), slice(1, 3, None))
    """
    first = max(0, -(offset // step))
    last = max(first, min(count, (size - 1 - offset) // step + 1))
    if first == last:
        return slice(0), slice(0)
    return slice(offset + step * first, offset + step * (last - 1) + 1, step), slice(first, last)


def _length(of: slice) -> int:
    length: int = of.stop - of.start
    return length


def _evenly(total: int, most: int) -> int:
    """Return the size of even parts of ``total``, none larger than ``most``."""
    parts = -(-total // max(1, most))
    return -(-total // parts)
