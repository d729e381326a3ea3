"""Launch the Triton kernels of RFAConv, for CUDA tensors, or on the CPU in Triton's interpreter.

The same functions as cpu.py. Importing this needs triton; ``dispatch`` does so only when asked.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rfa_mmdet.ops.rfa_conv import triton_kernels as kernels

Pair = tuple[int, int]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL_WINDOW = 9  # positions of a window that fits into registers
LARGE_SPAN = 2**31 - 1  # offsets beyond it need 64 bits


class Window(NamedTuple):
    """Windows over a map: the arguments of a convolution."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def positions(self) -> int:
        """K of a window."""
        return self.kernel_size[0] * self.kernel_size[1]

    def out_size(self, size: Pair) -> Pair:
        """Return (h, w) of a map of (H, W)."""
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, *self, strict=True)
        )

    def constants(self) -> dict[str, int]:
        """Return the window as the kernels' constants."""
        names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
        return dict(zip(names, (n for pair in self for n in pair), strict=True))


def check(name: str, x: Tensor) -> None:
    """Raise unless the kernels take ``x``."""
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{name} is {x.dtype}: the Triton kernels take float32, float16 and bfloat16"
        )
    if not (x.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(
            f"{name} is on {x.device}: the Triton kernels run on CUDA, or with TRITON_INTERPRET=1"
        )


def position_axis(x: Tensor) -> int:
    """Return the orientation for a map: 0 where channels are next to each other, else 1."""
    return int(x.stride(1) != 1 or x.is_contiguous())


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


def coefficients(attention: Tensor, feature: Tensor | None, scale: Tensor, shift: Tensor) -> Tensor:
    """Gather the parameters of a channel into one table.

    Args:
        attention (Tensor): (C, K).
        feature (Tensor | None): (C, K, K).
        scale, shift (Tensor): (C, K).

    Returns:
        Tensor: (rows, C) float32. K rows of attention, K of shift, then K * K of scaled features
            (or K of scale, where the features are the windows).
    """
    attention, scale, shift = attention.float(), scale.float(), shift.float()
    if feature is not None:
        scale = (scale[:, :, None] * feature.float()).flatten(1)
    return torch.cat([attention, shift, scale], 1).t().contiguous()


def unit_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (O, C / g, K) weight as (O, K, C / g), so that channels are neighbours."""
    return weight.transpose(1, 2).to(dtype).contiguous()


def launch(kernel, grid: tuple, x: Tensor, arguments: tuple, constants: dict) -> None:
    """Run a kernel on the device of ``x``."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def moments_config(x: Tensor, axis: int, positions: int) -> dict[str, int]:
    """Return tile sizes of the moments kernel: one channel and position a thread."""
    if axis:
        return dict(BLOCK_P=32, BLOCK_C=4, num_warps=4, num_stages=1)
    return dict(BLOCK_P=4, BLOCK_C=32, num_warps=4, num_stages=1)


def splits(x: Tensor, tiles: int, blocks: int) -> int:
    """Return into how many parts to split a sum over positions, of ``blocks`` programs each.

    Eight programs a multiprocessor keep a GPU busy. The number depends on the sizes and the kind
    of GPU only: the same sum is added up in the same order in every run.
    """
    processors = 132
    if x.is_cuda:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(1, min(tiles, triton.cdiv(8 * processors, blocks)))


def moments(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[Tensor, Tensor]:
    """Compute mean and covariance of the K values of a window, over all windows, by channel.

    Args:
        x (Tensor): (B, C, H, W); at least one window.
        kernel_size, stride, padding, dilation (tuple[int, int]): Of the windows.

    Returns:
        tuple[Tensor, Tensor]: Means (C, K) and biased covariances (C, K, K), float32. Zeros of
            the padding count.
    """
    check("x", x)
    window = Window(kernel_size, stride, padding, dilation)
    channels, k = x.shape[1], window.positions
    height, width = window.out_size(x.shape[2:])
    count = x.shape[0] * height * width
    axis, small = position_axis(x), k <= SMALL_WINDOW
    config = moments_config(x, axis, k)
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
            **window.constants(),
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
    return (first + shift[:, None]).float(), covariance.float()


def forward_config(dtype: torch.dtype, positions: int, outputs: int) -> dict[str, int]:
    """Return tile sizes of the forward kernel."""
    if positions > SMALL_WINDOW:
        return dict(PARTS=1, BLOCK_P=32, BLOCK_C=16, BLOCK_O=64, num_warps=4, num_stages=1)
    block_o = min(128, max(16, triton.next_power_of_2(outputs)))
    return dict(PARTS=2, BLOCK_P=32, BLOCK_C=16, BLOCK_O=block_o, num_warps=8, num_stages=1)


def forward(
    x: Tensor,
    attention: Tensor,
    feature: Tensor | None,
    scale: Tensor,
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
    height, width = window.out_size(x.shape[2:])
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
            coefficients(attention, feature, scale, shift),
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
            **window.constants(),
            LEARNT=feature is not None,
            RELU=relu,
            BIAS=bias is not None,
            POSITION_AXIS=axis,
            LARGE=is_large(x, y),
            PRECISION=precision(x.dtype),
            ANCHOR=not triton.knobs.runtime.interpret,
            SMALL=window.positions <= SMALL_WINDOW,
            **config,
        ),
    )
    return y
