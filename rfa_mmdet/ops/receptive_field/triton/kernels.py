"""Triton kernels of receptive-field features; launch.py launches them, unroll.py expands them.

Terms: a *tap* is one of the K values of a window of one channel. A *unit* is a feature, weighted or
not; each channel and position has K. A *chunk* is the part of the output that a launch computes:
some rows of one image, or whole images.

The compiler moves no load above a store to what may be the same address, so nothing hides the
latency of such a load: loads come first, if possible a step ahead.

Each thread walks down a column of windows of one channel, with the channel's K * K coefficients and
the K taps in registers, so a step only loads the taps of new rows. Adjacent lanes are adjacent in
memory: channels in channels_last, where a tile is BLOCK_Q columns x BLOCK_C channels; columns in
NCHW, where BLOCK_C is 1. There, what belongs to the channel is a scalar: Triton's compiler takes
time in proportion to the number of loads and stores of blocks, squared.

The kernels use the language of Triton 2.1, which torch 2.1 ships: no tuples. Matrix products are
left to cuBLAS, because tl.dot behaves differently in each version and on each GPU.

unroll.py defines KH, KW, K = KH * KW, PAIRS = K * (K + 1) // 2, NEW (rows of a window that a step
loads), and the constants of launch.py. Functions without arguments are fragments: ``include``
inserts their statements, so they share the kernel's variables.
"""

# unroll.py defines what is undefined here; kernels use what seems unused in fragments.
# ruff: noqa: F821, F841, RUF059
# mypy: ignore-errors

import triton
import triton.language as tl

from rfa_mmdet.ops.receptive_field.triton.unroll import include as include
from rfa_mmdet.ops.receptive_field.triton.unroll import unroll as unroll


@triton.jit
def _channels(block, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels of a block: (BLOCK_C,), or a scalar in NCHW."""
    first = block * BLOCK_C
    return first + tl.arange(0, BLOCK_C) if CHANNELS_LAST else first


@triton.jit
def _columns(
    images,
    C,
    w,
    stride_w,
    pad_w,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Image, output column, first column of the window, (1, BLOCK_Q).

    Also the channel, (BLOCK_C, 1) or a scalar, and a mask of the real elements of a tile,
    (BLOCK_C, BLOCK_Q). All versions of Triton put lanes along the first axis if both are possible.
    """
    q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :]
    c = _channels(tl.program_id(1), CHANNELS_LAST, BLOCK_C)
    c = c[:, None] if CHANNELS_LAST else c
    image = q // w
    column = q - image * w
    return image, column, column * stride_w - pad_w, c, (q < images * w) & (c < C)


@triton.jit
def _sum_pointers(sums, row, rows, C, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where this program keeps a partial sum for each of its channels, and a mask."""
    c = _channels(tl.program_id(1), CHANNELS_LAST, BLOCK_C)
    part = tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    return sums + (part * rows + row) * C + c, c < C


@triton.jit
def _stored_sum(sums, row, rows, C, add, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr):
    """The partial sum of earlier chunks, or zero unless ``add``."""
    at, real = _sum_pointers(sums, row, rows, C, CHANNELS_LAST, BLOCK_C)
    return tl.load(at, mask=real & (add != 0), other=0.0)


@triton.jit
def _write_sum(
    sums, row, rows, C, tile, stored, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Write the sum of a tile and of what was stored."""
    at, real = _sum_pointers(sums, row, rows, C, CHANNELS_LAST, BLOCK_C)
    found = tl.sum(tile, 1)
    found = found if CHANNELS_LAST else tl.sum(found, 0)
    tl.store(at, found + stored, mask=real)


@triton.jit
def _load(x, offset, mask, row, H, x_row):
    """Load a row of the map, with zeros outside."""
    mask = mask & (row >= 0) & (row < H)
    return tl.load(x + (offset + row * x_row), mask=mask, other=0.0)


@triton.jit
def _unit_value(units, offset, mask):
    return tl.load(units + offset, mask=mask, other=0.0)


@triton.jit
def _gate(gate, offset, mask):
    return tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unit(image, column, row, rows, w, c, C, pitch, N, CHANNELS_LAST: tl.constexpr):
    """Offset of each element's first of N units: (positions, N, C) or (C, N, pitch)."""
    position = (image * rows + row) * w + column
    return position * (N * C) + c if CHANNELS_LAST else position + c * N * pitch


def _start_windows():
    """Locate this thread's column and load the taps of its first window.

    ``prefetched_taps`` holds the last rows as loaded. SHIFTED_TAPS subtracts ``shift``.
    """
    near, tap, prefetched_taps = [], [], []
    offset = (first_image + image) * (C * H * W) + left * x_column
    offset = offset + (c * x_channel)
    for j in unroll(KW):
        seen = (left >= -j * dilation_w) & (left < W - j * dilation_w)
        near[j] = seen & real
    start = tl.program_id(2) * steps
    top = (first_row + start) * stride_h - pad_h
    for i in unroll(KH):
        for j in unroll(KW):
            at = offset + j * dilation_w * x_column
            value = _load(x, at, near[j], top + i * dilation_h, H, x_row)
            if i < KH - NEW:
                tap[(i + NEW) * KW + j] = value.to(tl.float32)
                if SHIFTED_TAPS:
                    tap[(i + NEW) * KW + j] -= shift
            else:
                prefetched_taps[(i - KH + NEW) * KW + j] = value
    line = start


def _step_down():
    """Complete the taps of the next window, and prefetch the new rows of the one below."""
    for n in unroll(K - NEW * KW):
        tap[n] = tap[n + NEW * KW]
    for n in unroll(NEW * KW):
        tap[K - NEW * KW + n] = prefetched_taps[n].to(tl.float32)
        if SHIFTED_TAPS:
            tap[K - NEW * KW + n] -= shift
    top += stride_h
    for i in unroll(NEW):
        for j in unroll(KW):
            at = offset + j * dilation_w * x_column
            row = top + (KH - NEW + i) * dilation_h
            prefetched_taps[i * KW + j] = _load(x, at, near[j], row, H, x_row)


def _locate():
    """Compute the columns and channels of this program, and the strides of the map."""
    image, column, left, c, real = _columns(
        images, C, w, stride_w, pad_w, CHANNELS_LAST, BLOCK_Q, BLOCK_C
    )
    x_column = C if CHANNELS_LAST else 1
    x_channel = 1 if CHANNELS_LAST else H * W
    x_row = W * x_column


def _load_kernels():
    """Load each channel's depthwise kernels, and compute the offsets of the table."""
    weight = []
    channel_offset = c if CHANNELS_LAST else c * (K * (K + 2))
    next_row = C if CHANNELS_LAST else 1
    for i in unroll(K):
        for j in unroll(K):
            at = table + (channel_offset + (2 * K + i * K + j) * next_row)
            weight[i * K + j] = tl.load(at, mask=c < C, other=0.0)


def _load_gates():
    """Load each channel's shift and attention, and the gates that are the same in all rows."""
    bias, score, column_gate, power, gate = [], [], [], [], []
    for i in unroll(K):
        at = table + (channel_offset + (K + i) * next_row)
        bias[i] = tl.load(at, mask=c < C, other=0.0)
    if GATES == ATTENTION:
        for i in unroll(K):
            at = table + channel_offset + i * next_row
            # For exp2 and the sum of the taps.
            score[i] = tl.load(at, mask=c < C, other=0.0) * (LOG2_E / K)
        highest = score[0]
        lowest = score[0]
        for i in unroll(K):
            highest = tl.maximum(highest, score[i])
            lowest = tl.minimum(lowest, score[i])
    number = first_image + image
    at_row = first_row + tl.program_id(2) * steps
    # Offsets of this row's gates, for position gates and for row gates. c // C is 0, but keeps
    # Triton from loading one value and moving it between lanes.
    cell = (number * (K * h) + at_row) * w + column + c // C
    # Row and column gates have the layout of the map, so that lanes read adjacent values.
    next_gate = C if CHANNELS_LAST else 1
    in_rows = number * C * (KH * h) + at_row * next_gate
    in_rows = in_rows + (c if CHANNELS_LAST else c * (KH * h))
    in_columns = number * C * (KW * w) + column * next_gate
    in_columns = in_columns + (c if CHANNELS_LAST else c * (KW * w))
    if GATES == CHANNELS:
        channel_gate = _gate(first, (number * C) + c, real)
    if GATES == ROWS:
        for j in unroll(KW):
            column_gate[j] = _gate(second, in_columns + j * w * next_gate, real)


def _compute_gates():
    """Compute the weight of each feature of a window."""
    if GATES == ATTENTION:
        total = tap[0]
        for n in unroll(K - 1):
            total += tap[n + 1]
        largest = tl.where(total < 0, lowest, highest) * total
        powers = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        for i in unroll(K):
            power[i] = tl.math.exp2(total * score[i] - largest)
            powers += power[i]
        inverse = 1.0 / powers
        for i in unroll(K):
            gate[i] = power[i] * inverse
    if GATES == CHANNELS:
        for i in unroll(K):
            at = cell + ((line - start) * w + i * (h * w))
            gate[i] = channel_gate * _gate(second, at, real)
    if GATES == ROWS:
        for i in unroll(KH):
            row_gate = _gate(first, in_rows + (line - start + i * h) * next_gate, real)
            for j in unroll(KW):
                gate[i * KW + j] = row_gate * column_gate[j]


def _start_units():
    """Compute the offset of the units of this thread's first window."""
    unit = _unit(image, column, start, rows, w, c, C, pitch, K, CHANNELS_LAST)
    next_unit = C if CHANNELS_LAST else pitch
    down = w * (K * C) if CHANNELS_LAST else w


def moments_kernel(
    x,  # (B, C, H, W)
    sums,  # out: (parts, K + PAIRS, C)
    shifts,  # out: (C,), subtracted from each value
    images,
    C,
    H,
    W,
    h,
    w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    steps,  # rows per program
    CHANNELS_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the taps, and of the products of taps i <= j."""
    first, second = [], []
    include(_locate)
    cells = images * H * W // (2 * SAMPLES)
    # A block in NCHW too, because Triton 2.1 cannot convert a bfloat16 scalar.
    channels = _channels(tl.program_id(1), True, BLOCK_C)[:, None]
    shift = tl.zeros((BLOCK_C, 1), tl.float32)
    for i in unroll(SAMPLES):
        cell = cells * (2 * i + 1)
        at = cell // (H * W) * (C - x_column) * (H * W) + cell * x_column
        value = tl.load(x + at + channels * x_channel, mask=channels < C, other=0.0)
        shift += value.to(tl.float32) * (1 / SAMPLES)
    one = tl.program_id(0) + tl.program_id(2) == 0
    tl.store(shifts + channels, shift, mask=(channels < C) & one)
    for n in unroll(K):
        first[n] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    for n in unroll(PAIRS):
        second[n] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    include(_start_windows, SHIFTED_TAPS=1, first_image=0, first_row=0)
    last = tl.minimum(start + steps, h)
    while line < last:
        include(_step_down, SHIFTED_TAPS=1)
        for i in unroll(K):
            first[i] += tap[i]
            for j in unroll(K - i):
                second[i * K - i * (i - 1) // 2 + j] += tap[i] * tap[i + j]
        line += 1
    for n in unroll(K):
        tile = tl.where(real, first[n], 0.0)
        _write_sum(sums, n, K + PAIRS, C, tile, 0.0, CHANNELS_LAST, BLOCK_C)
    for n in unroll(PAIRS):
        tile = tl.where(real, second[n], 0.0)
        _write_sum(sums, K + n, K + PAIRS, C, tile, 0.0, CHANNELS_LAST, BLOCK_C)


def features_kernel(
    x,  # (B, C, H, W)
    table,  # (C, K * (K + 2)) or, in channels_last, its transpose: attention, shift, kernels
    units,  # out
    first,  # gates: channels (B, C), or rows (B, C, KH, h) or, channels_last, (B, KH, h, C)
    second,  # positions (B, K, h, w), or columns (B, C, KW, w) or (B, KW, w, C)
    images,  # images in the chunk
    first_image,
    first_row,
    rows,
    pitch,
    C,
    H,
    W,
    h,
    w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    steps,
    CHANNELS_LAST: tl.constexpr,
    GATES: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Features act(kernels @ window + shift), weighted according to GATES.

    Weights are softmax(attention * mean of window), the product of two gates, or none (BARE).
    """
    include(_locate)
    include(_load_kernels)
    include(_load_gates)
    include(_start_windows, SHIFTED_TAPS=0)
    include(_start_units)
    last = tl.minimum(start + steps, rows)
    while line < last:
        include(_step_down, SHIFTED_TAPS=0)
        include(_compute_gates)
        to = units + (unit + (line - start) * down)
        for i in unroll(K):
            z = bias[i] + weight[i * K] * tap[0]
            for n in unroll(K - 1):
                z += weight[i * K + n + 1] * tap[n + 1]
            u = z
            if GATES != BARE:
                u = z * gate[i]
            if RELU:
                u = tl.where(z <= 0, 0.0, u)  # propagates NaN, like torch's ReLU
            tl.store(to + i * next_unit, u.to(units.dtype.element_ty), mask=real)
        line += 1


def gradient_kernel(
    x,  # (B, C, H, W)
    table,  # see features_kernel
    units,  # in: gradient of the weighted features; out: the weighted features
    slopes,  # out, shaped like units: gradient of the activation's input
    # ATTENTION: gradient of every tap through the mean, one per channel and position. Otherwise:
    # gradient of the product of both gates, shaped like units.
    others,  # out
    first,  # gates, see features_kernel
    second,
    sums,  # out: (parts, K * (K + 2), C), gradient of the table; only the first 2 * K
    add,  # whether to add to the stored sums
    images,
    first_image,
    first_row,
    rows,
    pitch,
    C,
    H,
    W,
    h,
    w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    steps,
    CHANNELS_LAST: tl.constexpr,
    GATES: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the activation's input, and of the attention or the gates."""
    product, grad_score, grad_bias, grad, prefetched_units, stored = [], [], [], [], [], []
    include(_locate)
    include(_load_kernels)
    include(_load_gates)
    for i in unroll(K):
        grad_bias[i] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        grad_score[i] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    include(_start_windows, SHIFTED_TAPS=0)
    include(_start_units)
    mean_unit = _unit(image, column, start, rows, w, c, C, pitch, 1, CHANNELS_LAST)
    down_mean = w * C if CHANNELS_LAST else w
    last = tl.minimum(start + steps, rows)
    for i in unroll(K):
        prefetched_units[i] = _unit_value(units, unit + i * next_unit, real & (start < last))
    while line < last:
        include(_step_down, SHIFTED_TAPS=0)
        below = unit + (line - start) * down
        unit_ptr = units + below
        for i in unroll(K):
            grad[i] = prefetched_units[i].to(tl.float32)
            prefetched_units[i] = _unit_value(
                unit_ptr, down + i * next_unit, real & (line + 1 < last)
            )
        include(_compute_gates)
        slope_ptr = slopes + below
        gate_ptr = others + below
        weighted = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        for i in unroll(K):
            z = bias[i] + weight[i * K] * tap[0]
            for n in unroll(K - 1):
                z += weight[i * K + n + 1] * tap[n + 1]
            passed = gate[i]
            if RELU:
                passed = tl.where(z <= 0, 0.0, passed)
            u = z * passed
            slope = grad[i] * passed
            grad_bias[i] += slope
            to = unit_ptr + i * next_unit
            tl.store(to, u.to(units.dtype.element_ty), mask=real)
            to = slope_ptr + i * next_unit
            tl.store(to, slope.to(slopes.dtype.element_ty), mask=real)
            if GATES == ATTENTION:
                product[i] = grad[i] * u
                weighted += product[i]
            else:
                found = grad[i] * z
                if RELU:
                    found = tl.where(z <= 0, 0.0, found)
                tl.store(gate_ptr + i * next_unit, found.to(others.dtype.element_ty), mask=real)
        if GATES == ATTENTION:
            level = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
            for i in unroll(K):
                grad_logit = product[i] - gate[i] * weighted
                grad_score[i] += grad_logit * total
                level += grad_logit * score[i]
            level = level * (1 / LOG2_E)  # score is attention * log2(e) / K
            below = mean_unit + (line - start) * down_mean
            tl.store(others + below, level.to(others.dtype.element_ty), mask=real)
        line += 1
    if GATES == ATTENTION:
        for i in unroll(K):
            stored[i] = _stored_sum(sums, i, K * (K + 2), C, add, CHANNELS_LAST, BLOCK_C)
    for i in unroll(K):
        stored[K + i] = _stored_sum(sums, K + i, K * (K + 2), C, add, CHANNELS_LAST, BLOCK_C)
    if GATES == ATTENTION:
        for i in unroll(K):
            tile = grad_score[i] * (1 / K)
            _write_sum(sums, i, K * (K + 2), C, tile, stored[i], CHANNELS_LAST, BLOCK_C)
    for i in unroll(K):
        row = K + i
        _write_sum(sums, row, K * (K + 2), C, grad_bias[i], stored[K + i], CHANNELS_LAST, BLOCK_C)


def products_kernel(
    x,  # (B, C, H, W)
    table,  # see features_kernel
    slopes,  # in: gradient of the activation's input (BARE: of the features); out: of the taps
    others,  # ATTENTION: from gradient_kernel; BARE: features
    sums,  # out: (parts, K * (K + 2), C); the last K * K, and the K before them if BARE
    add,
    images,
    first_image,
    first_row,
    rows,
    pitch,
    C,
    H,
    W,
    w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    steps,
    CHANNELS_LAST: tl.constexpr,
    GATES: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of the kernels and of the taps."""
    grad_weight, grad_bias, grad_tap, prefetched_slopes, stored = [], [], [], [], []
    include(_locate)
    include(_load_kernels)
    for i in unroll(K):
        grad_bias[i] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    for n in unroll(K * K):
        grad_weight[n] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    include(_start_windows, SHIFTED_TAPS=0)
    include(_start_units)
    mean_unit = _unit(image, column, start, rows, w, c, C, pitch, 1, CHANNELS_LAST)
    down_mean = w * C if CHANNELS_LAST else w
    last = tl.minimum(start + steps, rows)
    for i in unroll(K):
        prefetched_slopes[i] = _unit_value(slopes, unit + i * next_unit, real & (start < last))
    while line < last:
        include(_step_down, SHIFTED_TAPS=0)
        slope_ptr = slopes + (unit + (line - start) * down)
        feature_ptr = others + (unit + (line - start) * down)
        level = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        if GATES == ATTENTION:
            level_ptr = others + (mean_unit + (line - start) * down_mean)
            level += tl.load(level_ptr, mask=real, other=0.0).to(tl.float32)
        for j in unroll(K):
            grad_tap[j] = level
        for i in unroll(K):
            slope = prefetched_slopes[i].to(tl.float32)
            prefetched_slopes[i] = _unit_value(
                slope_ptr, down + i * next_unit, real & (line + 1 < last)
            )
            if GATES == BARE:
                if RELU:
                    f = tl.load(feature_ptr + i * next_unit, mask=real, other=0.0)
                    slope = tl.where(f > 0, slope, 0.0)
                grad_bias[i] += slope
            for j in unroll(K):
                grad_weight[i * K + j] += slope * tap[j]
                grad_tap[j] += slope * weight[i * K + j]
        for j in unroll(K):
            to = slope_ptr + j * next_unit
            tl.store(to, grad_tap[j].to(slopes.dtype.element_ty), mask=real)
        line += 1
    if GATES == BARE:
        for i in unroll(K):
            stored[i] = _stored_sum(sums, K + i, K * (K + 2), C, add, CHANNELS_LAST, BLOCK_C)
        for i in unroll(K):
            row = K + i
            _write_sum(sums, row, K * (K + 2), C, grad_bias[i], stored[i], CHANNELS_LAST, BLOCK_C)
    # At a time only as many as fit in registers.
    for part in unroll(KH):
        for n in unroll(KW * K):
            row = 2 * K + part * KW * K + n
            stored[n] = _stored_sum(sums, row, K * (K + 2), C, add, CHANNELS_LAST, BLOCK_C)
        for n in unroll(KW * K):
            row = 2 * K + part * KW * K + n
            tile = grad_weight[part * KW * K + n]
            _write_sum(sums, row, K * (K + 2), C, tile, stored[n], CHANNELS_LAST, BLOCK_C)


def fold_kernel(
    taps,  # gradient of the taps, shaped like units
    grad_x,  # out: (B, C, H, W)
    given_until,  # rows above this one hold partial sums to add to
    first_input_row,
    last_input_row,
    images,
    first_image,
    first_row,
    rows,
    pitch,
    C,
    H,
    W,
    w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    steps,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum, for each value of the map, of the gradients of all taps that it occurs in."""
    near, unit = [], []
    image, column, _, c, real = _columns(images, C, W, 1, 0, CHANNELS_LAST, BLOCK_Q, BLOCK_C)
    x_column = C if CHANNELS_LAST else 1
    x_channel = 1 if CHANNELS_LAST else H * W
    next_unit = C if CHANNELS_LAST else pitch
    down = w * (K * C) if CHANNELS_LAST else w
    for j in unroll(KW):
        right = column + pad_w - j * dilation_w
        seen = (right >= 0) & (right < w * STRIDE_W) & (right % STRIDE_W == 0)
        near[j] = seen & real
        unit[j] = _unit(image, right // STRIDE_W, 0, rows, w, c, C, pitch, K, CHANNELS_LAST)
    start = first_input_row + tl.program_id(2) * steps
    to = (first_image + image) * (C * H * W) + column * x_column
    to = grad_x + (to + (c * x_channel))
    row = start
    last = tl.minimum(start + steps, last_input_row)
    while row < last:
        at = to + row * W * x_column
        total = tl.load(at, mask=real & (row < given_until), other=0.0).to(tl.float32)
        for i in unroll(KH):
            below = row + pad_h - i * dilation_h
            line = below // STRIDE_H - first_row
            there = (below >= 0) & (below % STRIDE_H == 0) & (line >= 0) & (line < rows)
            for j in unroll(KW):
                tap_offset = unit[j] + (line * down + (i * KW + j) * next_unit)
                total += tl.load(taps + tap_offset, mask=near[j] & there, other=0.0).to(tl.float32)
        tl.store(at, total.to(grad_x.dtype.element_ty), mask=real)
        row += 1


def moments_gradient_kernel(
    x,  # (B, C, H, W)
    constant,  # (K, C)
    slope,  # (K * K, C)
    given,  # gradient to add to, if ADD
    grad_x,  # out
    images,
    C,
    H,
    W,
    h,
    w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    steps,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ADD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Fold of constant + slope @ window, where slope is symmetric.

    The windows that contain a value span HIGH x WIDE values around it; a step loads their last NEW
    rows.
    """
    near, seen, value, weight, bias = [], [], [], [], []
    image, column, _, c, real = _columns(images, C, W, 1, 0, CHANNELS_LAST, BLOCK_Q, BLOCK_C)
    x_column = C if CHANNELS_LAST else 1
    x_channel = 1 if CHANNELS_LAST else H * W
    x_row = W * x_column
    for i in unroll(K):
        bias[i] = tl.load(constant + (c + i * C), mask=c < C, other=0.0)
        for j in unroll(K - i):
            entry = slope + (c + (i * K + i + j) * C)
            weight[i * K + i + j] = tl.load(entry, mask=c < C, other=0.0)
    for j in unroll(KW):
        right = column + pad_w - j * dilation_w
        inside = (right >= 0) & (right < w * STRIDE_W) & (right % STRIDE_W == 0)
        seen[j] = inside & real
    offset = (image * (C * H * W) + column * x_column) + (c * x_channel)
    for j in unroll(WIDE):
        aside = column + (j - KW + 1) * dilation_w
        near[j] = ((aside >= 0) & (aside < W)) & real
    start = tl.program_id(2) * steps
    for i in unroll(HIGH - NEW):
        for j in unroll(WIDE):
            at = offset + (j - KW + 1) * dilation_w * x_column
            found = _load(x, at, near[j], start + (i - KH + 1) * dilation_h, H, x_row)
            value[(i + NEW) * WIDE + j] = found.to(tl.float32)
    row = start
    last = tl.minimum(start + steps, H)
    while row < last:
        for n in unroll((HIGH - NEW) * WIDE):
            value[n] = value[n + NEW * WIDE]
        for i in unroll(NEW):
            for j in unroll(WIDE):
                at = offset + (j - KW + 1) * dilation_w * x_column
                down = row + (HIGH - NEW + i - KH + 1) * dilation_h
                found = _load(x, at, near[j], down, H, x_row)
                value[(HIGH - NEW + i) * WIDE + j] = found.to(tl.float32)
        total = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        if ADD:
            total += tl.load(given + (offset + row * x_row), mask=real, other=0.0).to(tl.float32)
        for i in unroll(KH):
            below = row + pad_h - i * dilation_h
            there = (below >= 0) & (below < h * STRIDE_H) & (below % STRIDE_H == 0)
            for j in unroll(KW):
                part = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32) + bias[i * KW + j]
                for m in unroll(KH):
                    for n in unroll(KW):
                        # Tap (m, n) of the window that has this value as tap (i, j).
                        part += (
                            weight[min(i * KW + j, m * KW + n) * K + max(i * KW + j, m * KW + n)]
                            * value[(m - i + KH - 1) * WIDE + n - j + KW - 1]
                        )
                total += tl.where(seen[j] & there, part, 0.0)
        to = grad_x + (offset + row * x_row)
        tl.store(to, total.to(grad_x.dtype.element_ty), mask=real)
        row += 1


def sums_kernel(
    sums,  # (parts, K * (K + 2), C)
    attention,  # out: (C * K,); outputs may have any dtype
    shift,  # out: (C * K,)
    feature,  # out: (C * K * K,)
    parts,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add up the parts of the table's gradient; one row per program."""
    row = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    start = 0
    while start < parts:
        part = start + tl.arange(0, BLOCK_P)
        at = sums + (part * (K * (K + 2) * C) + row * C)[:, None] + c[None, :]
        total += tl.load(at, mask=(part < parts)[:, None] & (c < C)[None, :], other=0.0)
        start += BLOCK_P
    found = tl.sum(total, 0)
    if row < K:
        tl.store(attention + c * K + row, found.to(attention.dtype.element_ty), mask=c < C)
    elif row < 2 * K:
        tl.store(shift + c * K + row - K, found.to(shift.dtype.element_ty), mask=c < C)
    else:
        at = feature + c * (K * K) + row - 2 * K
        tl.store(at, found.to(feature.dtype.element_ty), mask=c < C)


def covariance_kernel(
    sums,  # (parts, K + PAIRS, C), from moments_kernel
    shifts,  # (C,)
    mean,  # out: (C, K)
    covariance,  # out: (C, K, K)
    parts,
    count,  # number of windows
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and covariance of the taps, from the parts of their sums; one pair per program."""
    i = tl.program_id(0) // K
    j = tl.program_id(0) % K
    low = tl.minimum(i, j)
    high = tl.maximum(i, j)
    row = K + low * K - low * (low - 1) // 2 + high - low
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = K + K * (K + 1) // 2
    # float64 against cancellation; there are few numbers.
    both = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    one = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    other = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
    start = 0
    while start < parts:
        part = start + tl.arange(0, BLOCK_P)
        at = sums + (part * (rows * C))[:, None] + c[None, :]
        real = (part < parts)[:, None] & (c < C)[None, :]
        both += tl.load(at + row * C, mask=real, other=0.0).to(tl.float64)
        one += tl.load(at + i * C, mask=real, other=0.0).to(tl.float64)
        other += tl.load(at + j * C, mask=real, other=0.0).to(tl.float64)
        start += BLOCK_P
    first = tl.sum(one, 0) / count
    found = tl.sum(both, 0) / count - first * (tl.sum(other, 0) / count)
    tl.store(covariance + c * (K * K) + i * K + j, found.to(tl.float32), mask=c < C)
    level = first.to(tl.float32) + tl.load(shifts + c, mask=c < C, other=0.0)
    tl.store(mean + c * K + i, level, mask=(c < C) & (i == j))


def fold_moments_kernel(
    mean,  # (C, K), of the windows
    covariance,  # (C, K, K)
    feature,  # (C, K, K)
    weight,  # (C, K), of the norm, if AFFINE
    bias,  # (C, K), of the norm, if SHIFTED
    folded,  # out: (C, K, K)
    shift,  # out: (C, K)
    response_mean,  # out: (C, K)
    variance,  # out: (C, K), unbiased
    inverse,  # out: (C, K), 1 / sqrt(biased variance + eps)
    eps,
    correction,  # count / (count - 1)
    C,
    AFFINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Batch norm folded into the kernel of one response of each channel."""
    w = []
    i = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < C
    level = tl.zeros((BLOCK_C,), tl.float32)
    for j in unroll(K):
        w[j] = tl.load(feature + (c * (K * K) + i * K + j), mask=real, other=0.0)
        level += w[j] * tl.load(mean + (c * K + j), mask=real, other=0.0)
    var = tl.zeros((BLOCK_C,), tl.float32)
    for j in unroll(K):
        row = tl.zeros((BLOCK_C,), tl.float32)
        for n in unroll(K):
            row += w[n] * tl.load(covariance + (c * (K * K) + j * K + n), mask=real, other=0.0)
        var += row * w[j]
    var = tl.maximum(var, 0.0)  # rounding may make a zero variance slightly negative
    one = 1.0 / tl.sqrt(var + eps)
    scale = one
    if AFFINE:
        scale = one * tl.load(weight + (c * K + i), mask=real, other=0.0)
    offset = -scale * level
    if SHIFTED:
        offset += tl.load(bias + (c * K + i), mask=real, other=0.0)
    for j in unroll(K):
        tl.store(folded + (c * (K * K) + i * K + j), w[j] * scale, mask=real)
    tl.store(shift + (c * K + i), offset, mask=real)
    tl.store(response_mean + (c * K + i), level, mask=real)
    tl.store(variance + (c * K + i), var * correction, mask=real)
    tl.store(inverse + (c * K + i), one, mask=real)


def fold_moments_gradient_kernel(
    grad_folded,  # (C, K, K)
    grad_shift,  # (C, K)
    feature,  # this and the following: see fold_moments_kernel
    weight,
    mean,
    covariance,
    response_mean,
    inverse,
    grad_feature,  # out: (C, K, K)
    grad_weight,  # out: (C, K)
    slope,  # out: (K, K, C)
    constant,  # out: (K, C)
    share,  # 1 / count
    C,
    AFFINE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of the kernel of one response, and one row of slope and constant; see README.md."""
    w, row = [], []
    own = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < C
    level = tl.zeros((BLOCK_C,), tl.float32)
    for n in unroll(K):
        row[n] = tl.zeros((BLOCK_C,), tl.float32)
    i = 0
    while i < K:
        grad_scale = tl.zeros((BLOCK_C,), tl.float32)
        for j in unroll(K):
            w[j] = tl.load(feature + (c * (K * K) + i * K + j), mask=real, other=0.0)
            at = grad_folded + (c * (K * K) + i * K + j)
            grad_scale += w[j] * tl.load(at, mask=real, other=0.0)
        s = tl.load(grad_shift + (c * K + i), mask=real, other=0.0)
        grad_scale -= s * tl.load(response_mean + (c * K + i), mask=real, other=0.0)
        one = tl.load(inverse + (c * K + i), mask=real, other=0.0)
        scale = one
        grad_inverse = grad_scale
        if AFFINE:
            a = tl.load(weight + (c * K + i), mask=real, other=0.0)
            scale = one * a
            grad_inverse = grad_scale * a
        grad_mean = -scale * s
        twice_grad_var = -(one * one * one) * grad_inverse
        # Tap ``own`` of this response's kernel.
        tap = tl.load(feature + (c * (K * K) + i * K + own), mask=real, other=0.0)
        level += grad_mean * tap
        for n in unroll(K):
            row[n] += twice_grad_var * tap * w[n]
        if i == own:
            tl.store(grad_weight + (c * K + i), grad_scale * one, mask=real)
            for j in unroll(K):
                through = tl.zeros((BLOCK_C,), tl.float32)
                for n in unroll(K):
                    at = covariance + (c * (K * K) + j * K + n)
                    through += w[n] * tl.load(at, mask=real, other=0.0)
                place = c * (K * K) + i * K + j
                found = scale * tl.load(grad_folded + place, mask=real, other=0.0)
                found += grad_mean * tl.load(mean + (c * K + j), mask=real, other=0.0)
                tl.store(grad_feature + place, found + twice_grad_var * through, mask=real)
        i += 1
    level = level * share
    for n in unroll(K):
        row[n] = row[n] * share
        level -= row[n] * tl.load(mean + (c * K + n), mask=real, other=0.0)
        tl.store(slope + (c + (own * K + n) * C), row[n], mask=real)
    tl.store(constant + (c + own * C), level, mask=real)
