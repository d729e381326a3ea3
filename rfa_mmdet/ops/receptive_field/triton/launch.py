"""Launch the Triton kernels: the operators' kernels for CUDA.

Importing this needs triton, so ``backends.py`` does it only when asked. The tests register them for
the CPU, where Triton's interpreter runs them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

if not hasattr(triton, "knobs"):  # before the kernels, which its language cannot express
    raise ImportError(f"the kernels need triton 3.4 or later, and here is {triton.__version__}")

from rfa_mmdet.ops.common.windows import Pair, Window
from rfa_mmdet.ops.receptive_field.schema import NAMESPACE
from rfa_mmdet.ops.receptive_field.self_check import or_plain
from rfa_mmdet.ops.receptive_field.triton import kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL_WINDOW = 9  # positions of a window that fits into registers
SCRATCH_BYTES = 128 * 2**20  # of the backward
# Triton's interpreter runs each operation in NumPy: the fewer tiles, the faster.
INTERPRETED = triton.knobs.runtime.interpret
LARGE_SPAN = 2**31 - 1  # offsets beyond it need 64 bits
LARGEST = 2**20  # number of a window, as of the C++ kernels


def check(name: str, x: Tensor) -> None:
    """Raise unless the kernels take ``x``."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name} is {x.dtype}: the Triton kernels take float32, float16 and bfloat16"
        )
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(
            f"{name} is on {x.device}: the Triton kernels run on CUDA, or with TRITON_INTERPRET=1"
        )


def position_axis(x: Tensor) -> int:
    """Return the orientation for a map: 0 where channels are next to each other, else 1."""
    return int(x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last))


def is_large(*tensors: Tensor) -> bool:
    """Whether an offset into one of them can exceed 32 bits."""
    return any(
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) > LARGE_SPAN
        for t in tensors
    )


def precision(dtype: torch.dtype) -> str:
    """Return how float32 matrix products run: as ``torch.matmul``'s setting says.

    'tf32x3' adds up three TF32 products and comes near float32's own precision, on tensor cores;
    'ieee' would leave them idle.
    """
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "tf32x3"
    return "tf32"


def coefficients(attention: Tensor, feature: Tensor, shift: Tensor) -> Tensor:
    """Gather the parameters of a channel into one table.

    Args:
        attention (Tensor): (C * K, 1, 1, 1).
        feature (Tensor): (C * K, 1, kh, kw).
        shift (Tensor): (C * K,).

    Returns:
        Tensor: (rows, C) float32: K rows of attention, K of shift, then K * K of features.
    """
    positions = feature[0].numel()
    table = [t.float().reshape(-1, positions) for t in (attention, shift)]
    table.append(feature.float().reshape(-1, positions**2))
    return torch.cat(table, 1).t().contiguous()


def unit_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (O, C / g, kh, kw) weight as (O, K, C / g), so that channels are neighbours."""
    return weight.flatten(2).transpose(1, 2).to(dtype).contiguous()


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
    else:
        kernel[grid](*arguments, **constants)


def moments_config(axis: int) -> dict[str, int]:
    """Return tile sizes of the moments kernel: one channel and position a thread."""
    if INTERPRETED:
        return _tile(axis, 64, 16, 4)
    return _tile(axis, 32, 4, 4) if axis else _tile(axis, 4, 32, 4)


def _tile(axis: int, positions: int, channels: int, warps: int) -> dict[str, int]:
    return dict(BLOCK_P=positions, BLOCK_C=channels, num_warps=warps, num_stages=1)


def window_gradient_config(axis: int) -> dict[str, int]:
    """Return tile sizes of the window gradient: 2 K + K * K sums are all that fits in a thread."""
    if INTERPRETED:
        return dict(PARTS=2, **_tile(axis, 64, 16, 4))
    return dict(PARTS=1, **(_tile(axis, 32, 4, 4) if axis else _tile(axis, 4, 32, 4)))


def large_window_config(axis: int) -> dict[str, int]:
    """Return tile sizes of the kernels for large windows."""
    if INTERPRETED:
        return _tile(axis, 64, 16, 4)
    return _tile(axis, 64, 8, 4) if axis else _tile(axis, 16, 32, 4)


def fold_config(axis: int) -> dict[str, int]:
    """Return tile sizes of the fold."""
    if INTERPRETED:
        return _tile(axis, 64, 16, 4)
    return _tile(axis, 128, 8, 4) if axis else _tile(axis, 16, 64, 4)


def correct_config(axis: int) -> dict[str, int]:
    """Return tile sizes of the correction: a few positions of a channel a thread."""
    if INTERPRETED:
        return _tile(axis, 64, 16, 4)
    # Four positions a thread in NCHW; in channels_last, more than two spill for sm_90.
    return _tile(axis, 128, 4, 4) if axis else _tile(axis, 8, 32, 4)


def product_config(dtype: torch.dtype) -> dict[str, int]:
    """Return tile sizes of the matrix products of the backward."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=2)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=3)


def splits(x: Tensor, tiles: int, blocks: int) -> int:
    """Return into how many parts to split a sum over positions, of ``blocks`` programs each.

    Eight programs a multiprocessor keep a GPU busy. The number depends on the sizes and the kind
    of GPU only: the same sum is added up in the same order in every run.
    """
    processors = 132
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    wanted: int = triton.cdiv(8 * processors, blocks)
    return max(1, min(tiles, wanted))


def constants_of(window: Window) -> dict[str, int]:
    """Return a window as the kernels' constants.

    Raises:
        ValueError: One of its numbers is negative, or so large that 32 bits could overflow.
    """
    if not all(0 <= n <= LARGEST for pair in window for n in pair):
        raise ValueError(f"{window}: must hold numbers of at most {LARGEST}")
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (n for pair in window for n in pair), strict=True))


def window_moments(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Compute mean and covariance of the K values of a window, over all windows, by channel.

    Args:
        x (Tensor): (B, C, H, W).
        kernel_size, stride, padding, dilation (tuple[int, int]): Of the windows.

    Returns:
        tuple[Tensor, Tensor]: Means (C, K) and biased covariances (C, K, K), float32. Zeros of
            the padding count.
    """
    check("x", x)
    window = Window(kernel_size, stride, padding, dilation)
    channels, k = x.shape[1], window.positions
    if x.numel() == 0:  # of a rank without data
        of_none = x.new_zeros((channels, k, k), dtype=torch.float32)
        return of_none[..., 0].clone(), of_none
    height, width = window.output_size(x.shape[2:])
    count = x.shape[0] * height * width
    axis, small = position_axis(x), k <= SMALL_WINDOW
    config = moments_config(axis)
    tiles = triton.cdiv(count, config["BLOCK_P"])
    blocks = triton.cdiv(channels, config["BLOCK_C"])
    rows = 1 if small else k
    parts = splits(x, tiles, blocks * rows)
    # Any value near the mean will do against cancellation. A mean of a few rows and columns is
    # near it, and a single value might be an outlier.
    few = x[:, :, :: max(1, x.shape[2] // 8), :: max(1, x.shape[3] // 8)]
    shift = few.float().mean((0, 2, 3))
    pairs = k * (k + 1) // 2 if small else k * k
    sums = x.new_empty((parts, k + pairs, channels), dtype=torch.float32)
    launch(
        kernels.moments_kernel,
        (parts, blocks, rows),
        x,
        (x, shift, sums, count, tiles, *x.shape[2:], height, width, *x.stride()),
        dict(
            C=channels,
            **constants_of(window),
            POSITION_AXIS=axis,
            LARGE=is_large(x),
            SMALL=small,
            **config,
        ),
    )
    means = sums.sum(0, dtype=torch.float64) / count  # (K + pairs, C)
    first, second = means[:k].t(), means[k:].t()
    if small:
        i, j = torch.triu_indices(k, k, device=x.device)
        full = second.new_empty(channels, k, k)
        full[:, i, j] = second
        full[:, j, i] = second
    else:
        full = second.unflatten(1, (k, k))
    covariance = full - first[:, :, None] * first[:, None, :]
    first = first + shift[:, None]
    return first.float().contiguous(), covariance.float().contiguous()


def forward_config(dtype: torch.dtype, positions: int, outputs: int) -> dict[str, int]:
    """Return tile sizes of the forward kernel.

    Each block of outputs computes the features anew, so it is as large as the registers allow:
    a tile of 64 positions x 128 outputs takes 32 registers a thread beside the taps and shares.
    The three products that make up one of float32 need twice the operands.
    """
    if positions > SMALL_WINDOW:
        return dict(PARTS=1, BLOCK_P=32, BLOCK_C=16, BLOCK_O=64, num_warps=4, num_stages=1)
    block = 64 if dtype == torch.float32 else 128
    block = min(block, max(16, triton.next_power_of_2(outputs)))
    parts = 1 if dtype == torch.float32 else 2
    return dict(PARTS=parts, BLOCK_P=32, BLOCK_C=16, BLOCK_O=block, num_warps=8, num_stages=1)


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
    """Compute the layer in one pass."""
    check("x", x)
    window = Window(kernel_size, stride, padding, dilation)
    height, width = window.output_size(x.shape[2:])
    channels, outputs = x.shape[1], weight.shape[0]
    axis = position_axis(x)
    y = torch.empty(
        (x.shape[0], outputs, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.contiguous_format if axis else torch.channels_last,
    )
    if y.numel() == 0:
        return y
    config = forward_config(x.dtype, window.positions, outputs // groups)
    count = x.shape[0] * height * width
    tile = config["PARTS"] * config["BLOCK_P"]
    columns = groups * triton.cdiv(outputs // groups, config["BLOCK_O"])
    launch(
        kernels.forward_kernel,
        (triton.cdiv(count, tile) * columns,),
        x,
        (
            x,
            coefficients(attention, feature, shift),
            unit_weight(weight, x.dtype),
            None if bias is None else bias.float(),
            y,
            count,
            *x.shape[2:],
            height,
            width,
            *x.stride(),
            *y.stride(),
        ),
        dict(
            C=channels,
            CG=channels // groups,
            OG=outputs // groups,
            **constants_of(window),
            RELU=relu,
            BIAS=bias is not None,
            POSITION_AXIS=axis,
            LARGE=is_large(x, y),
            PRECISION=precision(x.dtype),
            COMPILED=not INTERPRETED,
            SMALL=window.positions <= SMALL_WINDOW,
            **config,
        ),
    )
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
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> tuple[Tensor, ...]:
    """Compute the gradients.

    Chunk by chunk of positions, so that the K-fold tensors of one chunk (gradient of the units,
    then the units, and gradient of the taps) take no more than SCRATCH_BYTES and stay, on a large
    GPU, mostly in its cache: one matrix product for the units' gradient, one pass over windows,
    one matrix product for the weight's gradient, and a gather of the taps' gradients. Nothing is
    added up by atomics: two runs give the same bits.

    Args:
        grad_y (Tensor): (B, O, h, w), any strides.
        x, attention, feature, shift, relu, weight: As of :func:`rfa_conv`.
        needs (Sequence[bool]): Whether the gradients of x, of attention, feature and shift, of
            weight, and of bias are wanted.
        kernel_size, stride, padding, dilation (tuple[int, int]): Of the windows.
        groups (int): Of the final convolution.

    Returns:
        tuple[Tensor, ...]: Of x, attention, feature, shift, weight and bias, in their shapes and
            types. Empty where not wanted.
    """
    check("x", x)
    check("grad_y", grad_y)
    need_x, need_sums, need_weight, need_bias = needs
    window = Window(kernel_size, stride, padding, dilation)
    wanted = (need_x, *(need_sums,) * 3, need_weight, need_bias)
    likes = (x, attention, feature, shift, weight, weight[:, 0, 0, 0])
    if grad_y.numel() == 0:  # of a rank without data
        return tuple(
            torch.zeros_like(like) if want else like.new_empty(0)
            for want, like in zip(wanted, likes, strict=True)
        )
    pass_ = _Backward(x, attention, feature, shift, relu, weight, needs, window, groups)
    if need_x or need_sums or need_weight:
        for chunk in pass_.chunks():
            pass_.add(grad_y, *chunk)
    of_bias = grad_y.sum((0, 2, 3), dtype=torch.float32) if need_bias else grad_y.new_empty(0)
    return tuple(
        gradient.to(like.dtype).view(like.shape) if want else like.new_empty(0)
        for want, gradient, like in zip(wanted, (*pass_.results(), of_bias), likes, strict=True)
    )


class _Backward:
    """Buffers and launches of one backward pass.

    Matrices of a chunk have one row for each unit, (group, K, channel of the group), and one
    column for each position, or are transposed, in channels_last.
    """

    def __init__(
        self,
        x: Tensor,
        attention: Tensor,
        feature: Tensor,
        shift: Tensor,
        relu: bool,
        weight: Tensor,
        needs: Sequence[bool],
        window: Window,
        groups: int,
    ) -> None:
        self.x, self.window, self.groups = x, window, groups
        self.need_x, self.need_sums, self.need_weight, _ = needs
        self.relu = relu
        self.batch, self.channels, self.height, self.width = x.shape
        self.outputs, self.k = weight.shape[0], window.positions
        self.h, self.w = window.output_size(x.shape[2:])
        self.axis, self.small = position_axis(x), self.k <= SMALL_WINDOW
        self.table = coefficients(attention, feature, shift)
        self.unit_weight = unit_weight(weight, x.dtype)
        self.constants = dict(
            C=self.channels,
            CG=self.channels // groups,
            **constants_of(window),
            POSITION_AXIS=self.axis,
        )
        self.large = is_large(x)
        # What is not wanted is empty.
        self.grad_x = x.new_empty(0)
        if self.need_x:
            layout = torch.contiguous_format if self.axis else torch.channels_last
            self.grad_x = x.new_zeros(x.shape, dtype=torch.float32).contiguous(memory_format=layout)
        rows = 2 * self.k + self.k**2
        self.sums = x.new_zeros((rows, self.channels), dtype=torch.float64)
        self.d_weight = x.new_empty(0)

    def chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """Divide the output: whole images, or rows of one, as many as the scratch holds.

        Yields:
            tuple[int, int, int, int]: First image and number of images, first row and number of
                rows.
        """
        bytes_a_row = 2 * self.k * self.channels * self.w * self.x.element_size()
        rows = max(1, SCRATCH_BYTES // bytes_a_row)
        if rows >= self.h:
            # Chunks of one size: the last one is not small.
            images = triton.cdiv(self.batch, triton.cdiv(self.batch, rows // self.h))
            for image in range(0, self.batch, images):
                yield image, min(images, self.batch - image), 0, self.h
        else:
            rows = triton.cdiv(self.h, triton.cdiv(self.h, rows))
            for image in range(self.batch):
                for row in range(0, self.h, rows):
                    yield image, 1, row, min(rows, self.h - row)

    def matrix(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Return new memory for a value of each row and each position of the chunk."""
        # Whole vectors of positions, so that each row begins where one can be read at once.
        size = triton.cdiv(self.count, 16) * 16
        shape = (rows, size) if self.axis else (size, rows)
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def strides(self, matrix: Tensor) -> Pair:
        """Return the strides of a matrix along units and along positions."""
        rows, columns = matrix.stride()
        return (rows, columns) if self.axis else (columns, rows)

    def add(self, grad_y: Tensor, image: int, images: int, row: int, rows: int) -> None:
        """Add one chunk's part to every gradient."""
        self.place = (image, row, rows)
        self.count = images * rows * self.w
        self.whole = rows == self.h
        dtype = self.x.dtype
        grad_y = grad_y[image : image + images, :, row : row + rows]
        # The chunk's gradient as a matrix: no copy in channels_last, if all rows are in it.
        if self.axis:
            grad = self.matrix(self.outputs, dtype)
            grad[:, : self.count].unflatten(1, (images, rows, self.w)).copy_(grad_y.transpose(0, 1))
        else:
            grad = grad_y.permute(0, 2, 3, 1).reshape(-1, self.outputs).to(dtype).contiguous()
        units = self.matrix(self.k * self.channels, dtype)
        taps = units.new_empty(0)
        if self.need_x or self.need_sums:
            self.unit_gradient(grad, units)
            if self.need_x or not self.small:
                taps = torch.empty_like(units)
        (self.small_windows if self.small else self.large_windows)(units, taps)
        if self.need_weight:
            self.add_weight_gradient(grad, units)
        if self.need_x:
            if not self.small:
                self.large_taps(taps, units)
                taps = units
            self.fold(taps)

    def product(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        size: tuple[int, int, int],
        strides: tuple[int, ...],
        splits: int = 1,
        add: bool = False,
    ) -> None:
        """Launch c (+)= a @ b for each group."""
        config = product_config(self.x.dtype)
        m, n, _ = size
        tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
        launch(
            kernels.product_kernel,
            (tiles, self.groups, splits),
            self.x,
            (a, b, c, *size, *strides),
            dict(ADD=add, PRECISION=precision(self.x.dtype), COMPILED=not INTERPRETED, **config),
        )

    def unit_gradient(self, grad: Tensor, units: Tensor) -> None:
        """Compute units = weight' grad."""
        of_group = self.outputs // self.groups  # outputs
        wide = self.k * self.channels // self.groups  # units
        w, w_group = self.unit_weight, of_group * wide
        if self.axis:
            across = grad.stride(0)
            self.product(
                *(w, grad, units),
                (wide, self.count, of_group),
                (w_group, 1, wide, of_group * across, across, 1, 0, wide * across, across),
            )
        else:
            across = units.stride(0)
            self.product(
                *(grad, w, units),
                (self.count, wide, of_group),
                (of_group, grad.stride(0), 1, w_group, wide, 1, 0, wide, across),
            )

    def add_weight_gradient(self, grad: Tensor, units: Tensor) -> None:
        """Compute d_weight += grad units', in parts that share the positions between them."""
        of_group = self.outputs // self.groups
        wide = self.k * self.channels // self.groups
        config = product_config(self.x.dtype)
        add = self.d_weight.numel() > 0
        if not add:
            tiles = triton.cdiv(of_group, config["BLOCK_M"]) * triton.cdiv(wide, config["BLOCK_N"])
            parts = splits(self.x, triton.cdiv(self.count, config["BLOCK_K"]), tiles * self.groups)
            shape = (parts, self.outputs, wide)
            self.d_weight = self.x.new_empty(shape, dtype=torch.float32)
        of_grad, of_unit = self.strides(grad), self.strides(units)
        self.product(
            *(grad, units, self.d_weight),
            (of_group, wide, self.count),
            (
                *(of_group * of_grad[0], *of_grad),
                *(wide * of_unit[0], of_unit[1], of_unit[0]),
                *(self.d_weight.stride(0), of_group * wide, wide),
            ),
            self.d_weight.shape[0],
            add,
        )

    def x_arguments(self) -> tuple[int, ...]:
        """Return sizes and strides as the kernels take them."""
        return (*self.x.shape[2:], self.w, *self.x.stride())

    def small_windows(self, units: Tensor, taps: Tensor) -> None:
        """Turn the units' gradient into units and the taps' gradient, and add up the sums."""
        config = window_gradient_config(self.axis)
        tiles = triton.cdiv(self.count, config["PARTS"] * config["BLOCK_P"])
        blocks = triton.cdiv(self.channels, config["BLOCK_C"])
        parts = splits(self.x, tiles, blocks)
        sums = self.x.new_empty((parts, *self.sums.shape), dtype=torch.float32)
        launch(
            kernels.window_gradient_kernel,
            (parts, blocks),
            self.x,
            (
                *(self.x, self.table, units, taps, sums),
                *(*self.place, self.count, tiles),
                *(*self.x_arguments(), *self.strides(units)),
            ),
            dict(
                **self.constants,
                RELU=self.relu,
                NEED_X=self.need_x,
                NEED_SUMS=self.need_sums,
                LARGE=self.large,
                **config,
            ),
        )
        if self.need_sums:
            self.sums += sums.sum(0, dtype=torch.float64)

    def large_windows(self, units: Tensor, features: Tensor) -> None:
        """Do the same where a window does not fit into registers, but for the taps' gradient."""
        config = large_window_config(self.axis)
        tiles = triton.cdiv(self.count, config["BLOCK_P"])
        blocks = triton.cdiv(self.channels, config["BLOCK_C"])
        need = self.need_x or self.need_sums
        self.means = self.matrix(self.channels if need else 0, torch.float32)
        shape = (tiles if need else 0, self.k, self.channels)
        sums = self.x.new_empty(shape, dtype=torch.float32)
        launch(
            kernels.large_window_gradient_kernel,
            (tiles * blocks,),
            self.x,
            (
                *(self.x, self.table, units, features, self.means, sums),
                *(*self.place, self.count, *self.x_arguments(), *self.strides(units)),
                *self.strides(self.means),
            ),
            dict(
                **self.constants,
                RELU=self.relu,
                NEED_GRADIENTS=need,
                LARGE=self.large,
                **config,
            ),
        )
        if not self.need_sums:
            return
        self.sums[: self.k] += sums.sum(0, dtype=torch.float64)
        parts = splits(self.x, tiles, blocks * self.k)
        shape = (parts, self.k + self.k**2, self.channels)
        sums = self.x.new_empty(shape, dtype=torch.float32)
        launch(
            kernels.large_products_kernel,
            (parts, blocks, self.k),
            self.x,
            (
                *(self.x, features, sums),
                *(*self.place, self.count, tiles),
                *(*self.x_arguments(), *self.strides(units)),
            ),
            dict(**self.constants, LARGE=self.large, **config),
        )
        self.sums[self.k :] += sums.sum(0, dtype=torch.float64)

    def large_taps(self, features: Tensor, taps: Tensor) -> None:
        """Compute the taps' gradient where a window does not fit into registers."""
        config = large_window_config(self.axis)
        tiles = triton.cdiv(self.count, config["BLOCK_P"])
        launch(
            kernels.large_taps_kernel,
            (tiles * triton.cdiv(self.channels, config["BLOCK_C"]),),
            self.x,
            (
                *(self.table, features, self.means, taps, self.count),
                *(*self.strides(taps), *self.strides(self.means)),
            ),
            dict(
                C=self.channels,
                CG=self.channels // self.groups,
                K=self.k,
                POSITION_AXIS=self.axis,
                **config,
            ),
        )

    def fold(self, taps: Tensor) -> None:
        """Add the taps' gradient to the input cells that they were."""
        image, first_row, rows = self.place
        top, bottom = 0, self.height
        if not self.whole:
            (kh, _), (sh, _), (ph, _), (dh, _) = self.window
            top = max(0, first_row * sh - ph)
            bottom = min(self.height, (first_row + rows - 1) * sh - ph + (kh - 1) * dh + 1)
        if top >= bottom:
            return  # windows that lie in the padding only
        config = fold_config(self.axis)
        count = self.count // (rows * self.w) * (bottom - top) * self.width
        tiles = triton.cdiv(count, config["BLOCK_P"])
        launch(
            kernels.fold_kernel,
            (tiles * triton.cdiv(self.channels, config["BLOCK_C"]),),
            self.x,
            (
                *(taps, self.grad_x, image, first_row, rows, top, bottom - top, count),
                *(self.width, self.w, *self.grad_x.stride(), *self.strides(taps)),
            ),
            dict(**self.constants, ADD=not self.whole, LARGE=is_large(self.grad_x), **config),
        )

    def results(self) -> tuple[Tensor, ...]:
        """Return the gradients of x, attention, feature, shift and weight."""
        d_attention = d_shift = products = d_weight = self.x.new_empty(0)
        if self.need_sums:
            sums = self.sums.float().t()
            d_attention, d_shift, products = sums.split([self.k, self.k, self.k**2], 1)
            d_attention, d_shift = d_attention.contiguous(), d_shift.contiguous()
            products = products.contiguous().unflatten(1, (self.k, self.k))
        if self.need_weight:
            d_weight = self.d_weight.sum(0).unflatten(1, (self.k, -1)).transpose(1, 2).contiguous()
        return self.grad_x, d_attention, products, d_shift, d_weight


def window_moments_backward(
    x: Tensor,
    slope: Tensor,
    constant: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Compute fold(constant + slope @ window).

    Args:
        x (Tensor): (B, C, H, W).
        slope (Tensor): (C, K, K), symmetric.
        constant (Tensor): (C, K).
        kernel_size, stride, padding, dilation (tuple[int, int]): Of the windows.

    Returns:
        Tensor: (B, C, H, W), of x's type.
    """
    check("x", x)
    window = Window(kernel_size, stride, padding, dilation)
    axis = position_axis(x)
    config = correct_config(axis)
    grad_x = torch.zeros_like(x, dtype=torch.float32)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    tiles = triton.cdiv(count, config["BLOCK_P"])
    # The kernel subtracts.
    table = -torch.cat([constant.float(), slope.float().flatten(1)], 1).t().contiguous()
    if count:
        launch(
            kernels.correct_kernel,
            (tiles * triton.cdiv(x.shape[1], config["BLOCK_C"]),),
            x,
            (
                *(grad_x, x, table, count, *x.shape[2:], *window.output_size(x.shape[2:])),
                *(*grad_x.stride(), *x.stride()),
            ),
            dict(
                C=x.shape[1],
                **constants_of(window),
                POSITION_AXIS=axis,
                LARGE=is_large(x, grad_x),
                SMALL=window.positions <= SMALL_WINDOW,
                **config,
            ),
        )
    return grad_x.to(x.dtype)


_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")


def register(key: str) -> None:
    """Register the kernels for a dispatch key, once.

    Args:
        key (str): 'CUDA'; 'CPU' where Triton's interpreter is to take the place of the C++ kernels.
    """
    for function in (window_moments, window_moments_backward, rfa_conv, rfa_conv_backward):
        _LIBRARY.impl(function.__name__, or_plain(function), key)
