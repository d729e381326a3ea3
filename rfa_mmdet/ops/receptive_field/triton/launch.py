"""Launch the Triton kernels: one function per kernel, and the sizes of tiles and grids.

Requires triton, so ``backends.py`` imports it lazily.
"""

import functools
import inspect
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton import kernels
from rfa_mmdet.ops.receptive_field.triton.unroll import unrolled

THREADS = 128  # per program in channels_last, one element each; 32 in NCHW
# Warp schedulers of devices that replace a GPU in tests; a multiprocessor has 4. With one, programs
# walk over several rows even of the small maps that Triton's interpreter takes.
SCHEDULERS = {"cpu": 1, "meta": 4 * 132}
# Warps per scheduler, limited by registers. More would need memory for more partial sums.
RESIDENT = 2


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    x: Tensor,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Run a kernel on the device of ``x``."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            kernel[grid](*arguments, **constants)
    else:  # meta tensors or Triton's interpreter
        kernel[grid](*arguments, **constants)


@functools.cache
def kernel(name: str, kernel_size: tuple[int, int], new: int) -> Any:
    """Compile a kernel for a window size; it works for maps of any size.

    Args:
        name (str): Name of the kernel in ``kernels.py``.
        kernel_size (tuple[int, int]): (KH, KW).
        new (int): Rows of a window that each step down loads.
    """
    high, wide = kernel_size
    k = high * wide
    function = unrolled(
        getattr(kernels, name),
        KH=high,
        KW=wide,
        K=k,
        PAIRS=k * (k + 1) // 2,
        NEW=new,
        HIGH=2 * high - 1,
        WIDE=2 * wide - 1,
        **NUMBERS,
    )
    names = inspect.signature(function).parameters
    # Do not recompile for other values of integer arguments.
    numbers = [name for name in names if name not in POINTERS and name not in CONSTANTS]
    return triton.jit(function, do_not_specialize=numbers)


# Weights of the features: none, RFAConv's attention, channel and position gates, or row and column
# gates.
BARE, ATTENTION, CHANNELS, ROWS = range(4)
NUMBERS = dict(
    BARE=BARE,
    ATTENTION=ATTENTION,
    CHANNELS=CHANNELS,
    ROWS=ROWS,
    SAMPLES=8,  # values per channel whose mean is subtracted to avoid cancellation
    LOG2_E=1.4426950408889634,
)
CONSTANTS = (
    *("CHANNELS_LAST", "GATES", "RELU", "AFFINE", "SHIFTED", "STRIDE_H", "STRIDE_W", "ADD"),
    *("BLOCK_Q", "BLOCK_C", "BLOCK_P"),
)
POINTERS = (
    *("x", "table", "units", "slopes", "others", "first", "second", "taps", "grad_x"),
    *("sums", "shifts", "mean", "covariance", "attention", "shift", "feature", "weight", "bias"),
    *(
        "folded",
        "response_mean",
        "variance",
        "inverse",
        "grad_folded",
        "grad_shift",
        "grad_feature",
    ),
    *("grad_weight", "slope", "constant", "given"),
)


class Maps(NamedTuple):
    """A map x (B, C, H, W), dense in NCHW or channels_last, and its windows.

    Attributes:
        x (Tensor): The map.
        window (Window): A window with at most 9 positions.
        channels_last (bool): Whether x is channels_last rather than NCHW.
        size (tuple[int, int]): Output size, (h, w).
    """

    x: Tensor
    window: Window
    channels_last: bool
    size: tuple[int, int]

    @property
    def new(self) -> int:
        """Rows of a window that are not in the one above."""
        (high, _), (step, _), _, (apart, _) = self.window
        return min(step // apart, high) if step % apart == 0 else high

    def numbers(self) -> tuple[int, ...]:
        """Return C, H, W, h, w, stride, padding and dilation, in the order of kernel arguments."""
        window = self.window
        pairs = (*window.stride, *window.padding, *window.dilation)
        return (*self.x.shape[1:], *self.size, *pairs)

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of x."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def new_map(self, channels: int, size: tuple[int, int]) -> Tensor:
        """Allocate a map with the dtype and memory format of x."""
        shape = (self.x.shape[0], channels, *size)
        x = self.x
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.layout)

    @property
    def tile(self) -> dict[str, int]:
        """BLOCK_Q and BLOCK_C, with lanes along channels, or along columns in NCHW.

        It does not depend on the map's height and width, so that few kernels have to be compiled.
        """
        if self.channels_last:
            channels = min(32, 1 << (self.x.shape[1] - 1).bit_length())
            return dict(BLOCK_Q=THREADS // channels, BLOCK_C=channels, num_warps=4)
        return dict(BLOCK_Q=32, BLOCK_C=1, num_warps=1)

    def chunk_grid(self, chunk: "Chunk", resident: int = RESIDENT) -> Any:
        """Return tile, grid and rows per program for the largest chunk; all chunks use them.

        So each partial sum belongs to the same program in every chunk.
        """
        columns = chunk.most[0] * self.size[1]
        tile = self.tile
        return tile, *self.grid(tile, columns, chunk.most[1], resident)

    def grid(
        self, tile: dict[str, int], columns: int, rows: int, resident: int = RESIDENT
    ) -> tuple[tuple[int, int, int], int]:
        """Return a grid of (columns, channels, groups of rows), and the rows per group."""
        across = ceil_div(columns, tile["BLOCK_Q"])
        deep = ceil_div(self.x.shape[1], tile["BLOCK_C"])
        warps = across * deep * tile["num_warps"]
        wanted = ceil_div(schedulers(self.x.device) * resident, warps)
        steps = ceil_div(rows, min(wanted, rows))
        return (across, deep, ceil_div(rows, steps)), steps


def ceil_div(count: int, size: int) -> int:
    """Return how many blocks of a size hold a count; triton.cdiv takes microseconds.

    Example:
        >>> ceil_div(7, 3)
        3
    """
    return -(-count // size)


def schedulers(device: torch.device) -> int:
    """Return the number of warp schedulers."""
    return SCHEDULERS.get(device.type) or _of_gpu(device)


@functools.cache
def _of_gpu(device: torch.device) -> int:
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return 4 * multiprocessors


class Chunk(NamedTuple):
    """Rows of one image, or whole images, of the output.

    Attributes:
        image, images (int): First image, and number of images.
        row, rows (int): First row, and number of rows.
        most (tuple[int, int]): Images and rows of the largest chunk, which is the first.
        pitch (int): Stride between channels in NCHW; at least the number of positions.
    """

    image: int
    images: int
    row: int
    rows: int
    most: tuple[int, int]
    pitch: int

    def numbers(self) -> tuple[int, ...]:
        """Return the values that kernels take as arguments."""
        return self.images, self.image, self.row, self.rows, self.pitch


def moments(maps: Maps) -> tuple[Tensor, Tensor]:
    """Compute mean (C, K) and covariance (C, K, K) of the windows."""
    x, k = maps.x, maps.window.positions
    images, channels, high, wide = x.shape
    columns = images * maps.size[1]
    tile = maps.tile
    grid, steps = maps.grid(tile, columns, maps.size[0], 2 * RESIDENT)
    parts = grid[0] * grid[2]
    pairs = k * (k + 1) // 2
    sums = x.new_empty((parts, k + pairs, channels), dtype=torch.float32)
    shifts = x.new_empty((channels,), dtype=torch.float32)
    window = maps.window
    launch(
        kernel("moments_kernel", window.kernel_size, maps.new),
        grid,
        x,
        (
            *(x, sums, shifts, images, channels, high, wide, *maps.size),
            *(*window.stride, *window.padding, *window.dilation, steps),
        ),
        dict(CHANNELS_LAST=maps.channels_last, num_stages=1, **tile),
    )
    mean = x.new_empty((channels, k), dtype=torch.float32)
    covariance = x.new_empty((channels, k, k), dtype=torch.float32)
    launch(
        kernel("covariance_kernel", window.kernel_size, 1),
        (k * k, ceil_div(channels, 32)),
        x,
        (sums, shifts, mean, covariance, parts, images * maps.size[0] * maps.size[1], channels),
        dict(BLOCK_P=32, BLOCK_C=32, num_warps=4, num_stages=1),
    )
    return mean, covariance


class Gates(NamedTuple):
    """Weights of the features.

    Attributes:
        kind (int): BARE, ATTENTION, CHANNELS or ROWS.
        first, second (Tensor | None): The gates: (B, C) and (B, K, h, w) for CHANNELS; for ROWS
            (B, C, kh, h) and (B, C, kw, w), or channels_last (B, kh, h, C) and (B, kw, w, C).
    """

    kind: int
    first: Tensor | None = None
    second: Tensor | None = None

    def pointers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gates, or placeholders if there are none."""
        if self.first is None or self.second is None:
            return x, x
        return self.first, self.second


def features(
    maps: Maps, table: Tensor, gates: Gates, relu: bool, units: Tensor, chunk: Chunk
) -> None:
    """Compute the weighted features of a chunk."""
    tile, grid, steps = maps.chunk_grid(chunk, RESIDENT + 1)
    launch(
        kernel("features_kernel", maps.window.kernel_size, maps.new),
        grid,
        maps.x,
        (
            *(maps.x, table, units, *gates.pointers(maps.x)),
            *(*chunk.numbers(), *maps.numbers(), steps),
        ),
        dict(CHANNELS_LAST=maps.channels_last, GATES=gates.kind, RELU=relu, num_stages=1, **tile),
    )


def parts(maps: Maps, c: Chunk) -> int:
    """Return the number of parts of a chunk's sums."""
    grid: tuple[int, int, int] = maps.chunk_grid(c)[1]
    return grid[0] * grid[2]


def gradient(
    maps: Maps,
    table: Tensor,
    gates: Gates,
    relu: bool,
    units: Tensor,
    slopes: Tensor,
    others: Tensor,
    sums: Tensor,
    add: bool,
    chunk: Chunk,
) -> None:
    """Compute the gradients of the activation's input, and of the attention or the gates."""
    tile, grid, steps = maps.chunk_grid(chunk)
    launch(
        kernel("gradient_kernel", maps.window.kernel_size, maps.new),
        grid,
        maps.x,
        (
            *(maps.x, table, units, slopes, others, *gates.pointers(maps.x), sums, int(add)),
            *(*chunk.numbers(), *maps.numbers(), steps),
        ),
        dict(CHANNELS_LAST=maps.channels_last, GATES=gates.kind, RELU=relu, num_stages=1, **tile),
    )


def products(
    maps: Maps,
    table: Tensor,
    kind: int,
    relu: bool,
    slopes: Tensor,
    others: Tensor,
    sums: Tensor,
    add: bool,
    chunk: Chunk,
) -> None:
    """Compute the gradients of depthwise kernels and taps."""
    tile, grid, steps = maps.chunk_grid(chunk)
    numbers = maps.numbers()
    launch(
        kernel("products_kernel", maps.window.kernel_size, maps.new),
        grid,
        maps.x,
        (
            *(maps.x, table, slopes, others, sums, int(add)),
            *(*chunk.numbers(), *numbers[:3], *numbers[4:], steps),  # without h
        ),
        dict(CHANNELS_LAST=maps.channels_last, GATES=kind, RELU=relu, num_stages=1, **tile),
    )


def fold(maps: Maps, taps: Tensor, grad_x: Tensor, c: Chunk) -> None:
    """Add the gradient of the taps to the values of the map that they are copies of.

    Chunks of an image come from top to bottom. Each writes the rows that no later chunk adds to,
    and its partial sums for the rows that it shares with the next chunk.
    """
    (kh, _), (sh, sw), (ph, _), (dh, _) = maps.window
    high = maps.x.shape[2]
    first, last = 0, high
    given = 0
    if c.row > 0:
        first = _within(c.row * sh - ph, high)
        given = _within((c.row - 1) * sh - ph + (kh - 1) * dh + 1, high)
        # If windows do not overlap, the chunk above has written all rows before this chunk's.
        given = max(first, given)
    if c.row + c.rows < maps.size[0]:
        until = (c.row + c.rows - 1) * sh - ph + (kh - 1) * dh + 1
        last = max(_within(until, high), _within((c.row + c.rows) * sh - ph, high))
    if first >= last:
        return
    columns = c.images * maps.x.shape[3]
    tile = maps.tile
    grid, steps = maps.grid(tile, columns, last - first, 8)
    launch(
        kernel("fold_kernel", maps.window.kernel_size, 1),
        grid,
        maps.x,
        (
            *(taps, grad_x, given, first, last, *c.numbers(), *maps.x.shape[1:], maps.size[1]),
            *(*maps.window.padding, *maps.window.dilation, steps),
        ),
        dict(STRIDE_H=sh, STRIDE_W=sw, CHANNELS_LAST=maps.channels_last, num_stages=1, **tile),
    )


def _within(row: int, high: int) -> int:
    return min(max(row, 0), high)


def moments_gradient(
    maps: Maps, slope: Tensor, constant: Tensor, given: Tensor | None, grad_x: Tensor
) -> None:
    """Compute the gradient through the moments, and add ``given`` to it."""
    images, _, high, wide = maps.x.shape
    columns = images * wide
    tile = maps.tile
    grid, steps = maps.grid(tile, columns, high, 2 * RESIDENT)
    window = maps.window
    next_ = 1 if window.dilation[0] == 1 else 2 * window.kernel_size[0] - 1
    launch(
        kernel("moments_gradient_kernel", window.kernel_size, next_),
        grid,
        maps.x,
        (
            # fold_moments_backward() returns this layout, so nothing is copied.
            *(maps.x, constant.t().contiguous(), slope.permute(1, 2, 0).contiguous()),
            *(grad_x if given is None else given, grad_x, *maps.x.shape, *maps.size),
            *(*window.padding, *window.dilation, steps),
        ),
        dict(
            STRIDE_H=window.stride[0],
            STRIDE_W=window.stride[1],
            ADD=given is not None,
            CHANNELS_LAST=maps.channels_last,
            num_stages=1,
            **tile,
        ),
    )


def add_up(maps: Maps, sums: Tensor, attention: Tensor, shift: Tensor, feature: Tensor) -> None:
    """Add up the parts of the table's gradient."""
    parts, rows, channels = sums.shape
    launch(
        kernel("sums_kernel", maps.window.kernel_size, 1),
        (rows, ceil_div(channels, 32)),
        sums,
        (sums, attention, shift, feature, parts, channels),
        dict(BLOCK_P=32, BLOCK_C=32, num_warps=4, num_stages=1),
    )


def fold_moments(
    mean: Tensor,
    covariance: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
) -> tuple[Tensor, ...]:
    """Implement the operator in ``statistics.py`` by one kernel."""
    channels, k = mean.shape
    folded = torch.empty_like(feature)
    found = tuple(mean.new_empty(channels * k) for _ in range(4))
    launch(
        kernel("fold_moments_kernel", (k, 1), 1),
        (k, ceil_div(channels, 32)),
        mean,
        (
            *(mean, covariance, feature, mean if weight is None else weight),
            *(mean if bias is None else bias, folded, *found, eps, count / (count - 1), channels),
        ),
        dict(AFFINE=weight is not None, SHIFTED=bias is not None, **SMALL),
    )
    return folded, *found


def fold_moments_backward(
    grad_folded: Tensor,
    grad_shift: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    covariance: Tensor,
    response_mean: Tensor,
    inverse: Tensor,
    count: int,
) -> tuple[Tensor, ...]:
    """Implement the operator in ``statistics.py`` by one kernel."""
    channels, k = mean.shape
    grad_feature, grad_weight = torch.empty_like(feature), torch.empty_like(inverse)
    slope, constant = mean.new_empty(k, k, channels), mean.new_empty(k, channels)
    launch(
        kernel("fold_moments_gradient_kernel", (k, 1), 1),
        (k, ceil_div(channels, 32)),
        mean,
        (
            *(
                grad_folded,
                grad_shift,
                feature,
                mean if weight is None else weight,
                mean,
                covariance,
            ),
            *(response_mean, inverse, grad_feature, grad_weight, slope, constant),
            *(1 / max(count, 1), channels),
        ),
        dict(AFFINE=weight is not None, **SMALL),
    )
    return grad_feature, grad_weight, slope.permute(2, 0, 1), constant.t()


SMALL = dict(BLOCK_C=32, num_warps=1, num_stages=1)  # one lane per channel
