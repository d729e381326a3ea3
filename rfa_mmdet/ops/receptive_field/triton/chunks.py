"""Chunks of the output, whose features stay in the second-level cache, and their products."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rfa_mmdet.ops.common.torch_versions import cache_bytes
from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton.launch import Chunk, Maps

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POSITIONS = 9  # of a window: more do not fit into registers
OFFSETS = 2**31 - 2**24  # elements that 32 bits can tell apart, and what lies beside a map
BLOCKS = 65_535  # of a grid's second and third axis
# Parts of the weight's gradient that are added up in a half type: rounded for each, that loses
# about as much as to round each of them would. And the bytes of all such sums.
ROUNDED, PARTS_BYTES = 4, 2**22
LEAST_BYTES = 2**23  # of a chunk's features, on a GPU with little cache


def takes(x: Tensor, weight: Tensor | None, window: Window, groups: int = 1) -> bool:
    """Whether there are kernels for a map (B, C, H, W)."""
    (height, width), (kh, kw) = window.output_size(x.shape[2:]), window.kernel_size
    # Of an output's map, or of a gate's.
    maps = max(window.positions, 0 if weight is None else weight.shape[0])
    return (
        x.dtype in DTYPES
        and window.positions <= POSITIONS
        and groups == 1
        and 0 < x.numel() < OFFSETS
        and 0 < x.shape[0] * height * width * maps < OFFSETS
        and x.shape[1] <= BLOCKS
        and all(0 <= n <= 2**20 for pair in window for n in pair)
        # A row of the output is the smallest chunk.
        and window.positions * x.shape[1] * width < OFFSETS
        # Parts of sums are of four columns or more: 54 numbers of all images, 99 of a chunk.
        and max(14 * x.shape[0], 25) * x.shape[1] * width < OFFSETS
        # Gates of rows and columns.
        and x.shape[0] * x.shape[1] * max(kh * height, kw * width) < OFFSETS
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
    return max(cache_bytes(x.device) // share, LEAST_BYTES)


def chunks(maps: Maps, limit: int) -> Iterator[Chunk]:
    """Divide the output into parts of one size whose features take ``limit`` bytes at most."""
    images, channels = maps.x.shape[:2]
    height, width = maps.size
    row_bytes = maps.window.positions * channels * width * maps.x.element_size()
    rows = max(1, limit // row_bytes)
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

    def __init__(self, maps: Maps, weight: Tensor | None) -> None:
        self.maps = maps
        self.units = maps.window.positions * maps.x.shape[1]
        if weight is not None:
            self.shape = weight.shape
            # (O, K * C) and (O, C * K)
            order = weight.permute(0, 2, 3, 1) if maps.channels_last else weight
            self.weight = order.to(maps.x.dtype).reshape(len(weight), -1).contiguous()
        self.grad_weight = maps.x.new_empty(0)

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

    def add_weight_gradient(
        self, grad: Tensor, units: Tensor, chunk: Chunk, number: int, count: int
    ) -> None:
        """Compute a chunk's part of the weight's gradient, the number-th of so many.

        A half type is rounded with each part. So sums of a few parts are kept, and added up in
        float32: at the end, or, where they would take much memory, at once.
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
        if not self.maps.channels_last:
            return found.view(self.shape)
        return found.view(outputs, *kernel_size, channels).permute(0, 3, 1, 2)

    def windows(self, units: Tensor, chunk: Chunk) -> Tensor:
        """View the units of a chunk as (n, C, kh, kw, rows, w)."""
        units, (high, wide) = self._positions(units, chunk), self.maps.window.kernel_size
        places = (chunk.images, chunk.rows, self.maps.size[1])
        if self.maps.channels_last:
            return units.view(*places, high, wide, -1).permute(0, 5, 3, 4, 1, 2)
        units = units.reshape(-1, high, wide, *places)
        return units.permute(3, 0, 1, 2, 4, 5)
