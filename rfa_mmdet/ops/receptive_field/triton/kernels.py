"""Triton kernels of receptive-field features: launch.py launches them, unroll.py writes them out.

Words: a *tap* is one of the K values that a window holds of one channel; a *unit* is a feature of a
window, weighted or not, one of K a channel and position; a *chunk* is the part of the output that a
launch computes: some rows of one image, or whole images.

A thread goes down a column of windows of one channel. It holds the K * K coefficients of the
channel and the K taps in registers: a step down loads only the taps of new rows, and nothing else.
Lanes of a warp are neighbours in memory: channels in channels_last, where a tile is BLOCK_Q columns
x BLOCK_C channels, and columns in NCHW, where BLOCK_C is 1.

The language is that of Triton 2.1, which torch 2.1 brings: no tuples, and no matrix products, which
each version and each GPU treats in its own way. cuBLAS has them.

What unroll.py puts in: KH, KW, K = KH * KW, PAIRS = K * (K + 1) // 2, NEW, the rows of a window
that a step down loads, and the numbers of launch.py. Functions without arguments are parts of
kernels: ``include`` puts their statements in, so that they share the kernel's names.
"""

# What unroll.py puts in is undefined here, what a part defines is unused, and arrays have no types.
# ruff: noqa: F821, F841, RUF059
# mypy: ignore-errors

import triton
import triton.language as tl

from rfa_mmdet.ops.receptive_field.triton.unroll import include as include
from rfa_mmdet.ops.receptive_field.triton.unroll import unroll as unroll


@triton.jit
def _columns(images, C, w, stride_w, pad_w, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Image, column of the output, first column of the window (1, BLOCK_Q); channel (BLOCK_C, 1).

    And which elements of a tile, (BLOCK_C, BLOCK_Q), are real. Where lanes could go along either
    axis, all versions of Triton let them go along the first one.
    """
    q = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))[None, :]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    image = q // w
    column = q - image * w
    return image, column, column * stride_w - pad_w, c, (q < images * w) & (c < C)


@triton.jit
def _write_sum(sums, row, rows, C, tile, add, BLOCK_C: tl.constexpr):
    """Write this program's part of a sum of each channel, or add to what is there."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    to = sums + (part * rows + row) * C + c
    found = tl.sum(tile, 1)
    found += tl.load(to, mask=(c < C) & (add != 0), other=0.0)
    tl.store(to, found, mask=c < C)


@triton.jit
def _load(x, offset, mask, row, H, x_row):
    """A row of the map, zero beside it."""
    mask = mask & (row >= 0) & (row < H)
    return tl.load(x + (offset + row * x_row), mask=mask, other=0.0)


@triton.jit
def _gate(gate, offset, mask):
    return tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _unit(image, column, row, rows, w, c, C, pitch, N, CHANNELS_LAST: tl.constexpr):
    """Offset of the first of N units of each element: (positions, N, C) or (C, N, pitch)."""
    position = (image * rows + row) * w + column
    return position * (N * C) + c if CHANNELS_LAST else position + c * N * pitch


def _go_to_windows():
    """Where the column of this thread is, and the taps of its first window but the last rows.

    Of those, ``coming`` holds what was loaded. With SHIFTED_TAPS, ``shift`` is taken off.
    """
    near, tap, coming = [], [], []
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
                coming[(i - KH + NEW) * KW + j] = value
    line = start


def _step_down():
    """Complete the taps of the next window, and load what comes with the one below it."""
    for n in unroll(K - NEW * KW):
        tap[n] = tap[n + NEW * KW]
    for n in unroll(NEW * KW):
        tap[K - NEW * KW + n] = coming[n].to(tl.float32)
        if SHIFTED_TAPS:
            tap[K - NEW * KW + n] -= shift
    top += stride_h
    for i in unroll(NEW):
        for j in unroll(KW):
            at = offset + j * dilation_w * x_column
            row = top + (KH - NEW + i) * dilation_h
            coming[i * KW + j] = _load(x, at, near[j], row, H, x_row)


def _place():
    """Which columns and channels this program has, and the strides of the map."""
    image, column, left, c, real = _columns(images, C, w, stride_w, pad_w, BLOCK_Q, BLOCK_C)
    x_column = C if CHANNELS_LAST else 1
    x_channel = 1 if CHANNELS_LAST else H * W
    x_row = W * x_column


def _load_kernels():
    """Read the depthwise kernels of each channel, and where the rest of the table is."""
    weight = []
    channel_offset = c if CHANNELS_LAST else c * (K * (K + 2))
    next_row = C if CHANNELS_LAST else 1
    for i in unroll(K):
        for j in unroll(K):
            at = table + (channel_offset + (2 * K + i * K + j) * next_row)
            weight[i * K + j] = tl.load(at, mask=c < C, other=0.0)


def _load_gates():
    """Read shift and attention of each channel, and the gates that all rows share."""
    bias, score, column_gate, power, gate = [], [], [], [], []
    for i in unroll(K):
        at = table + (channel_offset + (K + i) * next_row)
        bias[i] = tl.load(at, mask=c < C, other=0.0)
    if GATES == ATTENTION:
        for i in unroll(K):
            at = table + channel_offset + i * next_row
            # Of the taps' sum, to the base 2.
            score[i] = tl.load(at, mask=c < C, other=0.0) * (LOG2_E / K)
        highest = score[0]
        lowest = score[0]
        for i in unroll(K):
            highest = tl.maximum(highest, score[i])
            lowest = tl.minimum(lowest, score[i])
    number = first_image + image
    at_row = first_row + tl.program_id(2) * steps
    # Where a gate of this row is, of a position or of rows.
    # (A channel // C is 0, but known to none: each lane reads its own, and none moves it.)
    cell = (number * (K * h) + at_row) * w + column + c // C
    # Gates of rows and columns have the lanes next to each other, as the map has.
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
    """What each feature of a window is weighted by."""
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


def _go_to_units():
    """Where the units of this thread's first window are."""
    unit = _unit(image, column, start, rows, w, c, C, pitch, K, CHANNELS_LAST)
    next_unit = C if CHANNELS_LAST else pitch
    down = w * (K * C) if CHANNELS_LAST else w


def moments_kernel(
    x,  # (B, C, H, W)
    sums,  # out: (parts, K + PAIRS, C)
    shifts,  # out: (C,), taken off each value
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
    steps,  # rows of a program
    CHANNELS_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the taps, and of the products of two, i <= j."""
    first, second = [], []
    include(_place)
    cells = images * H * W // (2 * SAMPLES)
    shift = tl.zeros((BLOCK_C, 1), tl.float32)
    for i in unroll(SAMPLES):
        cell = cells * (2 * i + 1)
        at = cell // (H * W) * (C - x_column) * (H * W) + cell * x_column
        value = tl.load(x + at + c * x_channel, mask=c < C, other=0.0)
        shift += value.to(tl.float32) * (1 / SAMPLES)
    one = tl.program_id(0) + tl.program_id(2) == 0
    tl.store(shifts + c, shift, mask=(c < C) & one)
    for n in unroll(K):
        first[n] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    for n in unroll(PAIRS):
        second[n] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    include(_go_to_windows, SHIFTED_TAPS=1, first_image=0, first_row=0)
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
        _write_sum(sums, n, K + PAIRS, C, tile, 0, BLOCK_C)
    for n in unroll(PAIRS):
        tile = tl.where(real, second[n], 0.0)
        _write_sum(sums, K + n, K + PAIRS, C, tile, 0, BLOCK_C)


def features_kernel(
    x,  # (B, C, H, W)
    table,  # (C, K * (K + 2)) or, in channels_last, its transpose: attention, shift, kernels
    units,  # out
    first,  # gates: of channels (B, C) or rows (B, C, KH, h), in channels_last (B, KH, h, C)
    second,  # of positions (B, K, h, w) or columns (B, C, KW, w), (B, KW, w, C)
    images,  # of the chunk
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
    """Features act(kernels @ window + shift), weighted by what GATES says.

    By ATTENTION, softmax(attention * mean of window), or two gates; or BARE.
    """
    include(_place)
    include(_load_kernels)
    include(_load_gates)
    include(_go_to_windows, SHIFTED_TAPS=0)
    include(_go_to_units)
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
                u = tl.where(z <= 0, 0.0, u)  # lets NaN through, as torch's does
            tl.store(to + i * next_unit, u.to(units.dtype.element_ty), mask=real)
        line += 1


def gradient_kernel(
    x,  # (B, C, H, W)
    table,  # as of features_kernel
    units,  # in: gradient of the weighted features; out: these
    slopes,  # out, as units: gradient of what the activation takes
    others,  # out: ATTENTION: gradient of each tap through it, one a channel and position; else,
    # as units: gradient of the product of both gates
    first,  # gates, as of features_kernel
    second,
    sums,  # (parts, K * (K + 2), C): the first 2 * K, gradients of the table, are written
    add,  # whether to add to them what is there
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
    """Gradients up to the activation, and up to the attention or the gates."""
    product, grad_score, grad_bias = [], [], []
    include(_place)
    include(_load_kernels)
    include(_load_gates)
    for i in unroll(K):
        grad_bias[i] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
        grad_score[i] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    include(_go_to_windows, SHIFTED_TAPS=0)
    include(_go_to_units)
    mean_unit = _unit(image, column, start, rows, w, c, C, pitch, 1, CHANNELS_LAST)
    down_mean = w * C if CHANNELS_LAST else w
    last = tl.minimum(start + steps, rows)
    while line < last:
        include(_step_down, SHIFTED_TAPS=0)
        include(_compute_gates)
        below = unit + (line - start) * down
        unit_ptr = units + below
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
            to = unit_ptr + i * next_unit
            grad = tl.load(to, mask=real, other=0.0).to(tl.float32)
            u = z * passed
            slope = grad * passed
            grad_bias[i] += slope
            tl.store(to, u.to(units.dtype.element_ty), mask=real)
            to = slope_ptr + i * next_unit
            tl.store(to, slope.to(slopes.dtype.element_ty), mask=real)
            if GATES == ATTENTION:
                product[i] = grad * u
                weighted += product[i]
            else:
                found = grad * z
                if RELU:
                    found = tl.where(z <= 0, 0.0, found)
                tl.store(gate_ptr + i * next_unit, found.to(others.dtype.element_ty), mask=real)
        if GATES == ATTENTION:
            level = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
            for i in unroll(K):
                grad_logit = product[i] - gate[i] * weighted
                grad_score[i] += grad_logit * total
                level += grad_logit * score[i]
            level = level * (1 / LOG2_E)  # score is log2(e) / K times the attention
            below = mean_unit + (line - start) * down_mean
            tl.store(others + below, level.to(others.dtype.element_ty), mask=real)
        line += 1
    for i in unroll(K):
        if GATES == ATTENTION:
            _write_sum(sums, i, K * (K + 2), C, grad_score[i] * (1 / K), add, BLOCK_C)
        _write_sum(sums, K + i, K * (K + 2), C, grad_bias[i], add, BLOCK_C)


def products_kernel(
    x,  # (B, C, H, W)
    table,  # as of features_kernel
    slopes,  # in: gradient of what the activation takes; out: of the taps
    others,  # ATTENTION: of gradient_kernel; BARE: features, and ``slopes`` are their gradient
    sums,  # (parts, K * (K + 2), C): the last K * K are written, and K before them if BARE
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
    grad_weight, grad_bias, grad_tap = [], [], []
    include(_place)
    include(_load_kernels)
    for i in unroll(K):
        grad_bias[i] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    for n in unroll(K * K):
        grad_weight[n] = tl.zeros((BLOCK_C, BLOCK_Q), tl.float32)
    include(_go_to_windows, SHIFTED_TAPS=0)
    include(_go_to_units)
    mean_unit = _unit(image, column, start, rows, w, c, C, pitch, 1, CHANNELS_LAST)
    down_mean = w * C if CHANNELS_LAST else w
    last = tl.minimum(start + steps, rows)
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
            slope = tl.load(slope_ptr + i * next_unit, mask=real, other=0.0).to(tl.float32)
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
            _write_sum(sums, K + i, K * (K + 2), C, grad_bias[i], add, BLOCK_C)
    for n in unroll(K * K):
        _write_sum(sums, 2 * K + n, K * (K + 2), C, grad_weight[n], add, BLOCK_C)


def fold_kernel(
    taps,  # gradient of the taps, as units
    grad_x,  # out: (B, C, H, W)
    given_until,  # the rows above it hold a part of their sum, to which this one is added
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
    """Sum of the gradients of all taps that a value of the map is."""
    near, unit = [], []
    image, column, _, c, real = _columns(images, C, W, 1, 0, BLOCK_Q, BLOCK_C)
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
    given,  # gradient to which this one is added, where ADD
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

    What the windows hold that see a value lies up to a window less a step away: HIGH x WIDE values
    around it, of which a step down loads the last NEW rows.
    """
    near, seen, value, weight, bias = [], [], [], [], []
    image, column, _, c, real = _columns(images, C, W, 1, 0, BLOCK_Q, BLOCK_C)
    x_column = C if CHANNELS_LAST else 1
    x_channel = 1 if CHANNELS_LAST else H * W
    x_row = W * x_column
    for i in unroll(K):
        bias[i] = tl.load(constant + (c + i * C), mask=c < C, other=0.0)
        for j in unroll(K - i):
            at = slope + (c + (i * K + i + j) * C)
            weight[i * K + i + j] = tl.load(at, mask=c < C, other=0.0)
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
                        # Tap (m, n) of the window whose tap (i, j) this is.
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
    attention,  # out: (C * K,), of any type, as the others
    shift,  # out: (C * K,)
    feature,  # out: (C * K * K,)
    parts,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add up the parts of the gradients of a table, one of its rows a program."""
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
    sums,  # (parts, K + PAIRS, C), of moments_kernel
    shifts,  # (C,)
    mean,  # out: (C, K)
    covariance,  # out: (C, K, K)
    parts,
    count,  # of the windows
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and covariance of the taps from the parts of their sums: a pair of taps a program."""
    i = tl.program_id(0) // K
    j = tl.program_id(0) % K
    low = tl.minimum(i, j)
    high = tl.maximum(i, j)
    row = K + low * K - low * (low - 1) // 2 + high - low
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = K + K * (K + 1) // 2
    # Few numbers, of which two nearly cancel out.
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
    weight,  # (C, K), as all of the norm, where AFFINE
    bias,  # where SHIFTED
    folded,  # out: (C, K, K)
    shift,  # out: (C, K), as what follows
    response_mean,  # out
    variance,  # out, unbiased
    inverse,  # out: 1 / sqrt(biased variance + eps)
    eps,
    correction,  # count / (count - 1)
    C,
    AFFINE: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Batch norm, folded into the kernel of one response of each channel."""
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
    var = tl.maximum(var, 0.0)  # rounding may leave a variance of zero a little below it
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
    feature,  # as of fold_moments_kernel, and so on
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
    """Gradient of the kernel of one response, and one row of slope and constant: see README.md."""
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
