"""The windows of a map, a few rows at a time."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import compute_dtype
from rfa_mmdet.ops.common.windows import Window

# Bytes of the windows of a slice: what stays in a core's cache, or keeps a GPU busy. A larger part
# of a large input costs little.
CPU_BYTES, GPU_BYTES = 2**20, 2**23
PART_OF_INPUT = 8


class Slice(NamedTuple):
    """Windows of some rows of some images.

    Attributes:
        images (slice): Of the batch.
        rows (slice): Of the output.
        windows (Tensor): (n, C, K, rows * w), in the type that is computed in.
    """

    images: slice
    rows: slice
    windows: Tensor

    def of(self, y: Tensor) -> Tensor:
        """Return this slice of a map (B, ..., h, w)."""
        return y[self.images][..., self.rows, :]


class Slices:
    """Iterates over the windows of a map (B, C, H, W), slice by slice."""

    def __init__(self, x: Tensor, window: Sequence[Any]) -> None:
        self.x, self.window = x, Window(*window)
        self.size = self.window.output_size(x.shape[2:])
        self.dtype = compute_dtype(x.dtype)

    def __iter__(self) -> Iterator[Slice]:
        batch, channels = self.x.shape[:2]
        height, width = self.size
        if 0 in (batch, channels, height, width):
            return
        least = CPU_BYTES if self.x.device.type == "cpu" else GPU_BYTES
        limit = max(least, self.x.numel() * self.x.element_size() // PART_OF_INPUT)
        row = channels * self.window.positions * width * self.dtype.itemsize
        rows = min(height, max(1, limit // row))
        images = max(1, limit // (row * rows)) if rows == height else 1
        for image in range(0, batch, images):
            of_images = slice(image, min(batch, image + images))
            for y in range(0, height, rows):
                of_rows = slice(y, min(height, y + rows))
                yield Slice(of_images, of_rows, self._windows(of_images, of_rows))

    def empty_gradient(self, needed: bool) -> Tensor:
        """Return zeros to add up the gradient of x in; of no elements if it is not needed.

        In the type that is computed in, since slices have rows of x in common.
        """
        return self.x.new_zeros(self.x.shape if needed else (0,), dtype=self.dtype)

    def _band(self, rows: slice) -> tuple[slice, int, int]:
        """Return the rows of x below windows, and how many rows of zeros are above and below."""
        (kernel, _), (stride, _), (padding, _), (dilation, _) = self.window
        top = rows.start * stride - padding
        bottom = (rows.stop - 1) * stride - padding + dilation * (kernel - 1) + 1
        height = self.x.shape[2]
        first, last = min(max(top, 0), height), min(max(bottom, 0), height)
        return (
            slice(first, last),
            min(max(-top, 0), bottom - top),
            max(bottom - max(height, top), 0),
        )

    def _windows(self, images: slice, rows: slice) -> Tensor:
        band, above, below = self._band(rows)
        side = self.window.padding[1]
        x = F.pad(self.x[images, :, band].to(self.dtype), (side, side, above, below))
        return self._taps(x, rows).reshape(*x.shape[:2], self.window.positions, -1)

    def _taps(self, padded: Tensor, rows: slice) -> Tensor:
        """View a band of x as the values of its windows, (n, C, kh, kw, rows, w)."""
        kernel_size, (sy, sx), _, (dy, dx) = self.window
        of_image, of_channel, y, x = padded.stride()
        shape = (*padded.shape[:2], *kernel_size, rows.stop - rows.start, self.size[1])
        return padded.as_strided(shape, (of_image, of_channel, dy * y, dx * x, sy * y, sx * x))

    def add_to(self, grad_x: Tensor, part: Slice, grad_windows: Tensor) -> None:
        """Add the gradient of a slice's windows, (n, C, K, rows * w), to that of x."""
        band, above, below = self._band(part.rows)
        side, height, width = self.window.padding[1], band.stop - band.start, self.x.shape[3]
        shape = (*grad_windows.shape[:2], above + height + below, width + 2 * side)
        padded = grad_windows.new_zeros(shape)
        taps = self._taps(padded, part.rows)
        grad = grad_windows.view(taps.shape)
        for i, j in product(*map(range, self.window.kernel_size)):  # one does not overlap itself
            taps[:, :, i, j] += grad[:, :, i, j]
        grad_x[part.images, :, band] += padded[:, :, above : above + height, side : side + width]
