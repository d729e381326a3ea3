"""Triton kernels of RFAConv: pointer arithmetic only; launch.py launches them.

Words: a *position* is one cell of the output, over the images of a batch; a *tap* is one of the K
values that a window holds of one channel; a *coefficient* is a parameter of one channel, a row of
``table``, (rows, C) float32 (see ``launch.coefficients``).

Two orientations of one code. POSITION_AXIS is the axis of a tile that runs along positions, the
last one in NCHW (1), the first in channels_last (0), so that neighbouring lanes of a warp read
neighbouring addresses in both. The other axis runs along channels.

What costs time here, beside the matrix products, is not the K * K multiply-adds of an element but
the fetching of their K * K coefficients into registers. Every kernel therefore gives a thread few
channels and several positions: a tile is PARTS tiles, each of which reuses the coefficients.

Windows of at most 9 positions live in registers, and their loops are unrolled (SMALL). Larger ones
read each tap again where it is needed, from the first-level cache, in loops that are not unrolled:
625 multiply-adds of a 5 x 5 kernel in a row would take minutes to compile and spill.
"""

# Triton's compiler knows the sum of tuples, not unpacking in a display.
# ruff: noqa: RUF005

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Every new value of these would compile a kernel anew, if it is 1 or the first multiple of 16.
SIZES = (
    "count",
    "tiles",
    "H",
    "W",
    "h",
    "w",
    "first_image",
    "first_row",
    "rows",
    "M",
    "N",
    "inner",
)
SIZES += ("first_input_row", "input_rows")
SIZES += tuple(f"{map_}_{axis}" for map_ in "xy" for axis in ("image", "channel", "row", "column"))


def kernel(function):
    """Compile for a layer's constants, not for the sizes of its maps."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in SIZES])


@triton.jit
def _along_positions(vector, POSITION_AXIS: tl.constexpr):
    """(BLOCK_P,) to the shape that broadcasts along the channels of a tile."""
    return tl.expand_dims(vector, 1 - POSITION_AXIS)


@triton.jit
def _along_channels(vector, POSITION_AXIS: tl.constexpr):
    """(BLOCK_C,) to the shape that broadcasts along the positions of a tile."""
    return tl.expand_dims(vector, POSITION_AXIS)


@triton.jit
def _coefficient(table, row, channel, in_block, C, POSITION_AXIS: tl.constexpr):
    """Row of the table for the channels of a tile; zero beside them."""
    value = tl.load(table + row * C + channel, mask=in_block, other=0.0)
    return _along_channels(value, POSITION_AXIS)


@triton.jit
def _locate(position, first_image, first_row, rows, w, LARGE: tl.constexpr):
    """Image, row and column of positions counted from the first row of a chunk."""
    line = position // w
    column = position - line * w
    image = line // rows
    row = line - image * rows + first_row
    image = image + first_image
    if LARGE:  # offsets into a map of more than 2**31 values
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return image, row, column


@triton.jit
def _tap(
    corner,  # pointer to tap 0 of each element of a tile
    top,  # first row and column of the window, (BLOCK_P,)
    left,
    j,
    mask,
    H,
    W,
    x_row,
    x_column,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
):
    """Tap j of a tile in float32; the padding's are zero and never read."""
    down = (j // KW) * DH
    right = (j % KW) * DW
    inside = (top >= -down) & (top < H - down) & (left >= -right) & (left < W - right)
    mask = _along_positions(inside, POSITION_AXIS) & mask
    # One pointer to the window and a scalar step: no more address arithmetic than that.
    return tl.load(corner + (down * x_row + right * x_column), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rectify(z, RELU: tl.constexpr):
    """ReLU that lets NaN through, as torch's does."""
    if RELU:
        z = tl.where(z < 0, 0.0, z)
    return z


@triton.jit
def _scores(table, channel, in_block, C, K: tl.constexpr, POSITION_AXIS: tl.constexpr):
    """What the attention multiplies a window's mean with: K tiles, the largest, the smallest."""
    scores = ()
    for i in tl.static_range(K):
        scores = scores + (_coefficient(table, i, channel, in_block, C, POSITION_AXIS),)
    highest = scores[0]
    lowest = scores[0]
    for i in tl.static_range(1, K):
        highest = tl.maximum(highest, scores[i])
        lowest = tl.minimum(lowest, scores[i])
    return scores, highest, lowest


@triton.jit
def _softmax(taps, part: tl.constexpr, scores, highest, lowest, K: tl.constexpr):
    """Mean of the window, and K shares."""
    mean = taps[part * K]
    for j in tl.static_range(1, K):
        mean += taps[part * K + j]
    mean = mean * (1.0 / K)
    exponent = mean * LOG2_E
    # The largest logit, against overflow, without a pass over them.
    largest = tl.where(mean < 0, lowest, highest) * exponent
    powers = ()
    total = tl.zeros_like(mean)
    for i in tl.static_range(K):
        power = tl.exp2(exponent * scores[i] - largest)
        powers = powers + (power,)
        total += power
    inverse = 1.0 / total
    shares = ()
    for i in tl.static_range(K):
        shares = shares + (powers[i] * inverse,)
    return mean, shares


@triton.jit
def _kernel_row(
    table,
    i,
    channel,
    in_block,
    C,
    K: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
):
    """Row i of the features' kernels, K tiles."""
    row = ()
    for j in tl.static_range(K):
        n = 2 * K + i * K + j
        row = row + (_coefficient(table, n, channel, in_block, C, POSITION_AXIS),)
    return row


@triton.jit
def _feature(
    taps,
    part: tl.constexpr,
    i: tl.constexpr,
    row_of_i,
    shift,
    K: tl.constexpr,
):
    """Feature i before its ReLU."""
    z = tl.zeros_like(taps[part * K]) + shift
    for j in tl.static_range(K):
        z += row_of_i[j] * taps[part * K + j]
    return z


@triton.jit
def _side_by_side(parts, PARTS: tl.constexpr, POSITION_AXIS: tl.constexpr):
    """Join PARTS (1, 2 or 4) tiles along their positions."""
    # tl.join puts the parts into one thread's registers; what follows only renames.
    if PARTS == 1:
        joined = parts[0]
    elif PARTS == 2:
        joined = tl.join(parts[0], parts[1])
        if POSITION_AXIS == 1:
            joined = tl.permute(joined, (0, 2, 1))
            joined = tl.reshape(joined, (joined.shape[0], 2 * joined.shape[2]))
        else:
            joined = tl.permute(joined, (2, 0, 1))
            joined = tl.reshape(joined, (2 * joined.shape[1], joined.shape[2]))
    else:
        tl.static_assert(PARTS == 4)
        # The last axis but one counts within a pair, the last one counts pairs.
        joined = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
        if POSITION_AXIS == 1:
            joined = tl.permute(joined, (0, 3, 2, 1))
            joined = tl.reshape(joined, (joined.shape[0], 4 * joined.shape[3]))
        else:
            joined = tl.permute(joined, (3, 2, 0, 1))
            joined = tl.reshape(joined, (4 * joined.shape[2], joined.shape[3]))
    return joined


@triton.jit
def _anchor(tile, COMPILED: tl.constexpr):
    """Keep the layout in which a tile was computed up to here.

    On sm_80 the compiler moves the change to the matrix product's layout up to the loads, so that
    each warp computes the features of all: 8 times the work. It cannot move it past this copy.
    """
    if COMPILED:  # the interpreter knows no assembler
        if tile.dtype.primitive_bitwidth == 32:
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=1
            )
        else:
            tile = tl.inline_asm_elementwise(
                "mov.b16 $0, $1;", "=h,h", [tile], dtype=tile.dtype, is_pure=False, pack=1
            )
    return tile


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, COMPILED: tl.constexpr):
    """Compute total + a @ b in float32."""
    if not COMPILED:  # the interpreter of Triton 3.6 multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@kernel
def forward_kernel(
    x,  # (B, C, H, W), any strides
    table,  # (rows, C) float32
    weight,  # (O, K, C / groups), contiguous
    bias,  # (O,) float32
    y,  # (B, O, h, w), any strides
    count,  # B * h * w
    H,
    W,
    h,
    w,
    x_image,
    x_channel,
    x_row,
    x_column,
    y_image,
    y_channel,
    y_row,
    y_column,
    C: tl.constexpr,
    CG: tl.constexpr,  # channels and outputs of a group
    OG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RELU: tl.constexpr,
    BIAS: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    SMALL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,  # positions of one part
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Output of one tile of positions and one block of a group's outputs."""
    K: tl.constexpr = KH * KW
    TILE_P: tl.constexpr = PARTS * BLOCK_P
    COLUMNS: tl.constexpr = (C // CG) * ((OG + BLOCK_O - 1) // BLOCK_O)
    # Programs that share positions are neighbours: x comes from memory once.
    tile = tl.program_id(0) // COLUMNS
    block = tl.program_id(0) % COLUMNS
    group = block // ((OG + BLOCK_O - 1) // BLOCK_O)
    output = (block % ((OG + BLOCK_O - 1) // BLOCK_O)) * BLOCK_O + tl.arange(0, BLOCK_O)
    real_output = output < OG
    output = group * OG + output

    corners = ()
    tops = ()
    lefts = ()
    real = ()
    for part in tl.static_range(PARTS):
        position = tile * TILE_P + part * BLOCK_P + tl.arange(0, BLOCK_P)
        image, row, column = _locate(position, 0, 0, h, w, LARGE)
        top = row * SH - PH
        left = column * SW - PW
        corners = corners + (image * x_image + top * x_row + left * x_column,)
        tops = tops + (top,)
        lefts = lefts + (left,)
        real = real + (_along_positions(position < count, POSITION_AXIS),)

    if POSITION_AXIS == 1:
        total = tl.zeros((BLOCK_O, TILE_P), tl.float32)
    else:
        total = tl.zeros((TILE_P, BLOCK_O), tl.float32)

    for start in range(0, CG, BLOCK_C):
        inner = start + tl.arange(0, BLOCK_C)
        in_block = inner < CG
        channel = group * CG + inner
        here = _along_channels(in_block, POSITION_AXIS)
        wide = channel.to(tl.int64) if LARGE else channel
        channel_offset = _along_channels(wide * x_channel, POSITION_AXIS)
        # Of this block's channels at window position 0: (BLOCK_O, BLOCK_C), or its transpose.
        unit = tl.expand_dims(output * (K * CG), POSITION_AXIS) + tl.expand_dims(
            inner, 1 - POSITION_AXIS
        )
        real_unit = tl.expand_dims(real_output, POSITION_AXIS) & tl.expand_dims(
            in_block, 1 - POSITION_AXIS
        )
        if SMALL:
            taps = ()  # PARTS * K tiles, as are weights
            for part in tl.static_range(PARTS):
                corner = x + (_along_positions(corners[part], POSITION_AXIS) + channel_offset)
                for j in tl.static_range(K):
                    tap = _tap(
                        corner,
                        tops[part],
                        lefts[part],
                        j,
                        real[part] & here,
                        H,
                        W,
                        x_row,
                        x_column,
                        KW,
                        DH,
                        DW,
                        POSITION_AXIS,
                    )
                    taps = taps + (tap,)
            scores, highest, lowest = _scores(table, channel, in_block, C, K, POSITION_AXIS)
            shares = ()
            for part in tl.static_range(PARTS):
                mean, shares_of_part = _softmax(taps, part, scores, highest, lowest, K)
                shares = shares + shares_of_part
            for i in tl.static_range(K):
                row_of_i = _kernel_row(table, i, channel, in_block, C, K, POSITION_AXIS)
                shift = _coefficient(table, K + i, channel, in_block, C, POSITION_AXIS)
                units = ()
                for part in tl.static_range(PARTS):
                    z = _feature(taps, part, i, row_of_i, shift, K)
                    u = _rectify(z, RELU) * shares[part * K + i]
                    units = units + (_anchor(u.to(x.dtype.element_ty), COMPILED),)
                u = _side_by_side(units, PARTS, POSITION_AXIS)
                weights = tl.load(weight + unit + i * CG, mask=real_unit, other=0.0)
                if POSITION_AXIS == 1:
                    total = _dot(weights, u, total, PRECISION, COMPILED)
                else:
                    total = _dot(u, weights, total, PRECISION, COMPILED)
        else:
            tl.static_assert(PARTS == 1)
            mask = real[0] & here
            corner = x + (_along_positions(corners[0], POSITION_AXIS) + channel_offset)
            mean, largest, sum_of_powers = _attend_loop(
                corner,
                table,
                tops[0],
                lefts[0],
                channel,
                in_block,
                mask,
                H,
                W,
                x_row,
                x_column,
                C,
                K,
                KW,
                DH,
                DW,
                POSITION_AXIS,
            )
            for i in range(K):
                z = _feature_loop(
                    corner,
                    table,
                    tops[0],
                    lefts[0],
                    i,
                    channel,
                    in_block,
                    mask,
                    H,
                    W,
                    x_row,
                    x_column,
                    C,
                    K,
                    KW,
                    DH,
                    DW,
                    POSITION_AXIS,
                )
                score = _coefficient(table, i, channel, in_block, C, POSITION_AXIS)
                share = tl.exp2(mean * LOG2_E * score - largest) / sum_of_powers
                u = _anchor((_rectify(z, RELU) * share).to(x.dtype.element_ty), COMPILED)
                weights = tl.load(weight + unit + i * CG, mask=real_unit, other=0.0)
                if POSITION_AXIS == 1:
                    total = _dot(weights, u, total, PRECISION, COMPILED)
                else:
                    total = _dot(u, weights, total, PRECISION, COMPILED)

    if BIAS:
        offset = tl.load(bias + output, mask=real_output, other=0.0)
        total += tl.expand_dims(offset, POSITION_AXIS)
    position = tile * TILE_P + tl.arange(0, TILE_P)
    image, row, column = _locate(position, 0, 0, h, w, LARGE)
    if LARGE:
        output = output.to(tl.int64)
    to = _along_positions(image * y_image + row * y_row + column * y_column, POSITION_AXIS)
    to = to + tl.expand_dims(output * y_channel, POSITION_AXIS)
    real_total = _along_positions(position < count, POSITION_AXIS)
    real_total = real_total & tl.expand_dims(real_output, POSITION_AXIS)
    tl.store(y + to, total.to(y.dtype.element_ty), mask=real_total)


@triton.jit
def _attend_loop(
    corner,
    table,
    top,
    left,
    channel,
    in_block,
    mask,
    H,
    W,
    x_row,
    x_column,
    C,
    K: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
):
    """Window mean, the largest of its logits (base 2), and the softmax's denominator."""
    mean = tl.zeros(mask.shape, tl.float32)
    for j in range(K):
        mean += _tap(
            corner,
            top,
            left,
            j,
            mask,
            H,
            W,
            x_row,
            x_column,
            KW,
            DH,
            DW,
            POSITION_AXIS,
        )
    mean = mean * (1.0 / K)
    highest = _coefficient(table, 0, channel, in_block, C, POSITION_AXIS)
    lowest = highest
    for i in range(1, K):
        score = _coefficient(table, i, channel, in_block, C, POSITION_AXIS)
        highest = tl.maximum(highest, score)
        lowest = tl.minimum(lowest, score)
    largest = tl.where(mean < 0, lowest, highest) * (mean * LOG2_E)
    sum_of_powers = tl.zeros_like(mean)
    for i in range(K):
        score = _coefficient(table, i, channel, in_block, C, POSITION_AXIS)
        sum_of_powers += tl.exp2(mean * LOG2_E * score - largest)
    return mean, largest, sum_of_powers


@triton.jit
def _feature_loop(
    corner,
    table,
    top,
    left,
    i,
    channel,
    in_block,
    mask,
    H,
    W,
    x_row,
    x_column,
    C,
    K: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
):
    """Feature i before its ReLU."""
    z = tl.zeros(mask.shape, tl.float32)
    z += _coefficient(table, K + i, channel, in_block, C, POSITION_AXIS)
    for j in range(K):
        tap = _tap(
            corner,
            top,
            left,
            j,
            mask,
            H,
            W,
            x_row,
            x_column,
            KW,
            DH,
            DW,
            POSITION_AXIS,
        )
        row = 2 * K + i * K + j
        z += tap * _coefficient(table, row, channel, in_block, C, POSITION_AXIS)
    return z


@kernel
def moments_kernel(
    x,  # (B, C, H, W), any strides
    shift,  # (C,) float32
    sums,  # (SPLITS, K + K * (K + 1) / 2, C) float32; (SPLITS, K + K * K, C) where not SMALL
    count,
    tiles,  # of BLOCK_P positions
    H,
    W,
    h,
    w,
    x_image,
    x_channel,
    x_row,
    x_column,
    C,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of the shifted taps and of their products, over every SPLITS-th tile of positions."""
    K: tl.constexpr = KH * KW
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_block = channel < C
    here = _along_channels(in_block, POSITION_AXIS)
    s = _along_channels(tl.load(shift + channel, mask=in_block, other=0.0), POSITION_AXIS)
    wide = channel.to(tl.int64) if LARGE else channel
    channel_offset = _along_channels(wide * x_channel, POSITION_AXIS)
    if POSITION_AXIS == 1:
        zero = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    else:
        zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    # One sum a lane; the lanes are added up once, at the end.
    firsts = ()
    for _ in tl.static_range(K):
        firsts = firsts + (zero,)
    seconds = ()
    if SMALL:
        for _ in tl.static_range(K * (K + 1) // 2):
            seconds = seconds + (zero,)
    else:
        for _ in tl.static_range(K):
            seconds = seconds + (zero,)
    tile = split
    while tile < tiles:
        position = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        image, row, column = _locate(position, 0, 0, h, w, LARGE)
        mask = _along_positions(position < count, POSITION_AXIS) & here
        top = row * SH - PH
        left = column * SW - PW
        corner = image * x_image + top * x_row + left * x_column
        corner = x + (_along_positions(corner, POSITION_AXIS) + channel_offset)
        taps = ()
        for j in tl.static_range(K):
            tap = _tap(
                corner,
                top,
                left,
                j,
                mask,
                H,
                W,
                x_row,
                x_column,
                KW,
                DH,
                DW,
                POSITION_AXIS,
            )
            # Zeros of the padding count as values, and are shifted like them.
            taps = taps + (tl.where(mask, tap - s, 0.0),)
        added = ()
        for j in tl.static_range(K):
            added = added + (firsts[j] + taps[j],)
        firsts = added
        added = ()
        if SMALL:
            for i in tl.static_range(K):
                for j in tl.static_range(i, K):
                    # Pairs (i, j) with i <= j, row after row.
                    second = seconds[i * K - i * (i - 1) // 2 + j - i]
                    added = added + (second + taps[i] * taps[j],)
        else:
            i = tl.program_id(2)
            tap = _tap(
                corner,
                top,
                left,
                i,
                mask,
                H,
                W,
                x_row,
                x_column,
                KW,
                DH,
                DW,
                POSITION_AXIS,
            )
            tap = tl.where(mask, tap - s, 0.0)
            for j in tl.static_range(K):
                added = added + (seconds[j] + tap * taps[j],)
        seconds = added
        tile += splits
    if SMALL:
        rows = split * (K + K * (K + 1) // 2)
        for j in tl.static_range(K):
            to = sums + (rows + j) * C + channel
            tl.store(to, tl.sum(firsts[j], POSITION_AXIS), mask=in_block)
        for pair in tl.static_range(K * (K + 1) // 2):
            to = sums + (rows + K + pair) * C + channel
            tl.store(to, tl.sum(seconds[pair], POSITION_AXIS), mask=in_block)
    else:
        rows = split * (K + K * K)
        i = tl.program_id(2)
        for j in tl.static_range(K):
            to = sums + (rows + K + i * K + j) * C + channel
            tl.store(to, tl.sum(seconds[j], POSITION_AXIS), mask=in_block)
            if i == 0:
                to = sums + (rows + j) * C + channel
                tl.store(to, tl.sum(firsts[j], POSITION_AXIS), mask=in_block)


@triton.jit
def _row_in_scratch(channel, i, CG, K: tl.constexpr):
    """Row of unit i of a channel: as in the weight, the channels of a group are neighbours."""
    return (channel // CG) * (K * CG) + i * CG + channel % CG


@kernel
def window_gradient_kernel(
    x,  # (B, C, H, W), any strides
    table,
    units,  # in: gradient of the units, out: the units; (K * C, count) by its strides
    folds,  # out: gradient of the taps, likewise
    sums,  # out: (SPLITS, 2 * K + K * K, C) float32: of attention, shift, products
    first_image,
    first_row,
    rows,  # of the output, in the chunk
    count,  # positions of the chunk
    tiles,
    H,
    W,
    w,
    x_image,
    x_channel,
    x_row,
    x_column,
    unit_stride,
    position_stride,
    C: tl.constexpr,  # constants, as the registers are just enough
    CG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RELU: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_SUMS: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Everything between the two matrix products of the backward, for small windows."""
    K: tl.constexpr = KH * KW
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_block = channel < C
    here = _along_channels(in_block, POSITION_AXIS)
    wide = channel.to(tl.int64) if LARGE else channel
    channel_offset = _along_channels(wide * x_channel, POSITION_AXIS)
    if POSITION_AXIS == 1:
        zero = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    else:
        zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    # One sum a lane; the lanes are added up once, at the end.
    attentions = ()
    shifts = ()
    products = ()
    if NEED_SUMS:
        for _ in tl.static_range(K):
            attentions = attentions + (zero,)
            shifts = shifts + (zero,)
        for _ in tl.static_range(K * K):
            products = products + (zero,)
    tile = split
    while tile < tiles:
        taps = ()
        places = ()  # in units and folds, of unit 0
        masks = ()
        for part in tl.static_range(PARTS):
            position = (tile * PARTS + part) * BLOCK_P + tl.arange(0, BLOCK_P)
            image, row, column = _locate(position, first_image, first_row, rows, w, LARGE)
            mask = _along_positions(position < count, POSITION_AXIS) & here
            top = row * SH - PH
            left = column * SW - PW
            corner = image * x_image + top * x_row + left * x_column
            corner = x + (_along_positions(corner, POSITION_AXIS) + channel_offset)
            for j in tl.static_range(K):
                tap = _tap(
                    corner, top, left, j, mask, H, W, x_row, x_column, KW, DH, DW, POSITION_AXIS
                )
                taps = taps + (tap,)
            place = _along_channels(_row_in_scratch(channel, 0, CG, K), POSITION_AXIS) * unit_stride
            places = places + (place + _along_positions(position, POSITION_AXIS) * position_stride,)
            masks = masks + (mask,)
        scores, highest, lowest = _scores(table, channel, in_block, C, K, POSITION_AXIS)
        shares = ()
        means = ()
        gradients = ()  # of the taps, PARTS * K
        for part in tl.static_range(PARTS):
            mean, shares_of_part = _softmax(taps, part, scores, highest, lowest, K)
            means = means + (mean,)
            shares = shares + shares_of_part
            for _ in tl.static_range(K):
                gradients = gradients + (zero,)
        slopes = ()  # share * gradient of the share, K * PARTS
        totals = ()
        for _ in tl.static_range(PARTS):
            totals = totals + (zero,)
        new_shifts = ()
        new_products = ()
        for i in tl.static_range(K):
            row_of_i = _kernel_row(table, i, channel, in_block, C, K, POSITION_AXIS)
            shift = _coefficient(table, K + i, channel, in_block, C, POSITION_AXIS)
            features = ()  # their gradients, of each part
            new_totals = ()
            for part in tl.static_range(PARTS):
                f = _rectify(_feature(taps, part, i, row_of_i, shift, K), RELU)
                share = shares[part * K + i]
                place = places[part] + i * CG * unit_stride
                du = tl.load(units + place, mask=masks[part], other=0.0).to(tl.float32)
                tl.store(units + place, (f * share).to(units.dtype.element_ty), mask=masks[part])
                slope = du * f * share
                slopes = slopes + (slope,)
                new_totals = new_totals + (totals[part] + slope,)
                df = du * share
                if RELU:
                    df = tl.where(f > 0, df, 0.0)
                features = features + (df,)
            totals = new_totals
            if NEED_X:
                new_gradients = ()
                for part in tl.static_range(PARTS):
                    for j in tl.static_range(K):
                        gradient = gradients[part * K + j]
                        gradient += row_of_i[j] * features[part]
                        new_gradients = new_gradients + (gradient,)
                gradients = new_gradients
            if NEED_SUMS:
                total = shifts[i]
                for part in tl.static_range(PARTS):
                    total += features[part]
                new_shifts = new_shifts + (total,)
                for j in tl.static_range(K):
                    total = products[i * K + j]
                    for part in tl.static_range(PARTS):
                        total += features[part] * taps[part * K + j]
                    new_products = new_products + (total,)
        if NEED_SUMS:
            shifts = new_shifts
            products = new_products
            new_attentions = ()
            for i in tl.static_range(K):
                total = attentions[i]
                for part in tl.static_range(PARTS):
                    logit = slopes[i * PARTS + part] - shares[part * K + i] * totals[part]
                    total += logit * means[part]
                new_attentions = new_attentions + (total,)
            attentions = new_attentions
        if NEED_X:
            for part in tl.static_range(PARTS):
                through_mean = zero
                for i in tl.static_range(K):
                    logit = slopes[i * PARTS + part] - shares[part * K + i] * totals[part]
                    through_mean += scores[i] * logit
                for j in tl.static_range(K):
                    gradient = gradients[part * K + j] + through_mean * (1.0 / K)
                    to = folds + places[part] + j * CG * unit_stride
                    tl.store(to, gradient.to(folds.dtype.element_ty), mask=masks[part])
        tile += splits
    if NEED_SUMS:
        first = sums + split * ((2 * K + K * K) * C) + channel
        for i in tl.static_range(K):
            tl.store(first + i * C, tl.sum(attentions[i], POSITION_AXIS), mask=in_block)
            tl.store(first + (K + i) * C, tl.sum(shifts[i], POSITION_AXIS), mask=in_block)
        for n in tl.static_range(K * K):
            total = tl.sum(products[n], POSITION_AXIS)
            tl.store(first + (2 * K + n) * C, total, mask=in_block)


@kernel
def product_kernel(
    a,  # (groups, M, inner) by its strides
    b,  # (groups, inner, N) by its strides
    c,  # (splits, groups, M, N), N contiguous
    M,
    N,
    inner,
    a_group,
    a_m,
    a_inner,
    b_group,
    b_inner,
    b_n,
    c_split,
    c_group,
    c_m,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute c = a @ b, or c += a @ b; split s takes every splits-th block of the inner axis."""
    group = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    blocks = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    a += group * a_group
    b += group * b_group
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left = inner - split * BLOCK_K  # a count down, as the interpreter cannot range() over a tensor
    while left > 0:
        real = k < inner
        to = a + m[:, None] * a_m + k[None, :] * a_inner
        x = tl.load(to, mask=(m < M)[:, None] & real[None, :], other=0.0)
        to = b + k[:, None] * b_inner + n[None, :] * b_n
        y = tl.load(to, mask=real[:, None] & (n < N)[None, :], other=0.0)
        total = _dot(x, y, total, PRECISION, COMPILED)
        k += splits * BLOCK_K
        left -= splits * BLOCK_K
    to = c + split * c_split + group * c_group + m[:, None] * c_m + n[None, :]
    real = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        total += tl.load(to, mask=real, other=0.0)
    tl.store(to, total.to(c.dtype.element_ty), mask=real)


@kernel
def fold_kernel(
    folds,  # gradient of the taps
    grad_x,  # (B, C, H, W) float32
    first_image,
    first_row,  # of the chunk's output
    rows,
    first_input_row,
    input_rows,
    count,  # input cells: images * input_rows * W
    W,
    w,
    x_image,
    x_channel,
    x_row,
    x_column,
    unit_stride,
    position_stride,
    C,
    CG,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    ADD: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum up, for each cell of the input, the gradients of all taps that it was.

    A gather, not a scatter: no two programs write to one cell, and the order of the sum is fixed.
    """
    K: tl.constexpr = KH * KW
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = (tl.program_id(0) // channel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_block = channel < C
    image, row, column = _locate(cell, 0, first_input_row, input_rows, W, False)
    mask = _along_positions(cell < count, POSITION_AXIS) & _along_channels(in_block, POSITION_AXIS)
    base = _along_channels(_row_in_scratch(channel, 0, CG, K), POSITION_AXIS) * unit_stride
    if POSITION_AXIS == 1:
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    else:
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for j in range(K):
        down = row + PH - (j // KW) * DH
        right = column + PW - (j % KW) * DW
        out_row = down // SH - first_row
        out_column = right // SW
        seen = (down >= 0) & (right >= 0) & (out_row >= 0) & (out_row < rows) & (out_column < w)
        seen = seen & (out_row * SH == down - first_row * SH) & (out_column * SW == right)
        position = (image * rows + out_row) * w + out_column
        place = base + j * CG * unit_stride
        place = place + _along_positions(position, POSITION_AXIS) * position_stride
        seen = _along_positions(seen, POSITION_AXIS) & mask
        total += tl.load(folds + place, mask=seen, other=0.0).to(tl.float32)
    image = image + first_image
    if LARGE:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
        channel = channel.to(tl.int64)
    to = _along_positions(image * x_image + row * x_row + column * x_column, POSITION_AXIS)
    to = grad_x + (to + _along_channels(channel * x_channel, POSITION_AXIS))
    if ADD:
        total += tl.load(to, mask=mask, other=0.0)
    tl.store(to, total, mask=mask)


@kernel
def correct_kernel(
    grad_x,  # (B, C, H, W) float32, any strides, changed in place
    x,
    table,  # (K + K * K, C) float32: constant, then Q
    count,  # B * H * W
    H,
    W,
    h,
    w,
    y_image,  # of grad_x
    y_channel,
    y_row,
    y_column,
    x_image,
    x_channel,
    x_row,
    x_column,
    C,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    SMALL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Subtract fold(constant + Q window) from grad_x: a gather over the windows that see a cell."""
    K: tl.constexpr = KH * KW
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // channel_blocks
    cell = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    in_block = channel < C
    image, row, column = _locate(cell, 0, 0, H, W, LARGE)
    mask = _along_positions(cell < count, POSITION_AXIS) & _along_channels(in_block, POSITION_AXIS)
    wide = channel.to(tl.int64) if LARGE else channel
    # What the windows that see a cell hold lies up to one window less a step away from it.
    top = row - (KH - 1) * DH
    left = column - (KW - 1) * DW
    corner = image * x_image + top * x_row + left * x_column
    corner = _along_positions(corner, POSITION_AXIS) + _along_channels(
        wide * x_channel, POSITION_AXIS
    )
    corner = x + corner
    if POSITION_AXIS == 1:
        total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    else:
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    WIDE: tl.constexpr = 2 * KW - 1
    if SMALL:
        near = ()
        for n in tl.static_range((2 * KH - 1) * WIDE):
            value = _tap(
                corner, top, left, n, mask, H, W, x_row, x_column, WIDE, DH, DW, POSITION_AXIS
            )
            near = near + (value,)
        for j in tl.static_range(K):
            part = tl.zeros_like(total)
            part += _coefficient(table, j, channel, in_block, C, POSITION_AXIS)
            for n in tl.static_range(K):
                q = _coefficient(table, K + j * K + n, channel, in_block, C, POSITION_AXIS)
                # Tap n of the window whose tap j this cell is.
                part += q * near[(n // KW - j // KW + KH - 1) * WIDE + n % KW - j % KW + KW - 1]
            seen = _sees(row, column, j, h, w, KW, SH, SW, PH, PW, DH, DW)
            total += tl.where(_along_positions(seen, POSITION_AXIS), part, 0.0)
    else:
        for j in range(K):
            part = tl.zeros_like(total)
            part += _coefficient(table, j, channel, in_block, C, POSITION_AXIS)
            for n in range(K):
                q = _coefficient(table, K + j * K + n, channel, in_block, C, POSITION_AXIS)
                place = (n // KW - j // KW + KH - 1) * WIDE + n % KW - j % KW + KW - 1
                part += q * _tap(
                    corner,
                    top,
                    left,
                    place,
                    mask,
                    H,
                    W,
                    x_row,
                    x_column,
                    WIDE,
                    DH,
                    DW,
                    POSITION_AXIS,
                )
            seen = _sees(row, column, j, h, w, KW, SH, SW, PH, PW, DH, DW)
            total += tl.where(_along_positions(seen, POSITION_AXIS), part, 0.0)
    to = image * y_image + row * y_row + column * y_column
    to = _along_positions(to, POSITION_AXIS) + _along_channels(wide * y_channel, POSITION_AXIS)
    to = grad_x + to
    tl.store(to, tl.load(to, mask=mask, other=0.0) - total, mask=mask)


@triton.jit
def _sees(
    row,
    column,
    j,
    h,
    w,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
):
    """Whether there is a window whose tap j is the input cell (row, column)."""
    down = row + PH - (j // KW) * DH
    right = column + PW - (j % KW) * DW
    on_grid = (down % SH == 0) & (right % SW == 0)
    inside = (down >= 0) & (down < h * SH) & (right >= 0) & (right < w * SW)
    return on_grid & inside


@kernel
def large_window_gradient_kernel(
    x,  # (B, C, H, W), any strides
    table,
    units,  # in: gradient of the units, out: the units; (K * C, count) by its strides
    features,  # out: gradient of the normed features, likewise
    means,  # out: gradient of the windows' means; (C, count) by its strides
    sums,  # out: (tiles, K, C) float32: of attention
    first_image,
    first_row,
    rows,
    count,
    H,
    W,
    w,
    x_image,
    x_channel,
    x_row,
    x_column,
    unit_stride,
    position_stride,
    mean_channel,
    mean_position,
    C,
    CG,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RELU: tl.constexpr,
    NEED_GRADIENTS: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Units and gradient of the features, where a window does not fit into registers."""
    K: tl.constexpr = KH * KW
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // channel_blocks
    in_block = channel < C
    wide = channel.to(tl.int64) if LARGE else channel
    position = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    image, row, column = _locate(position, first_image, first_row, rows, w, LARGE)
    mask = _along_positions(position < count, POSITION_AXIS) & _along_channels(
        in_block, POSITION_AXIS
    )
    top = row * SH - PH
    left = column * SW - PW
    corner = image * x_image + top * x_row + left * x_column
    corner = _along_positions(corner, POSITION_AXIS) + _along_channels(
        wide * x_channel, POSITION_AXIS
    )
    corner = x + corner
    place = _along_channels(_row_in_scratch(channel, 0, CG, K), POSITION_AXIS) * unit_stride
    place = place + _along_positions(position, POSITION_AXIS) * position_stride
    mean, largest, powers = _attend_loop(
        corner,
        table,
        top,
        left,
        channel,
        in_block,
        mask,
        H,
        W,
        x_row,
        x_column,
        C,
        K,
        KW,
        DH,
        DW,
        POSITION_AXIS,
    )
    exponent = mean * LOG2_E
    weighed = tl.zeros_like(mean)
    through_mean = tl.zeros_like(mean)
    through_total = tl.zeros_like(mean)
    for i in range(K):
        z = _feature_loop(
            corner,
            table,
            top,
            left,
            i,
            channel,
            in_block,
            mask,
            H,
            W,
            x_row,
            x_column,
            C,
            K,
            KW,
            DH,
            DW,
            POSITION_AXIS,
        )
        f = _rectify(z, RELU)
        score = _coefficient(table, i, channel, in_block, C, POSITION_AXIS)
        share = tl.exp2(exponent * score - largest) / powers
        to = units + place + i * CG * unit_stride
        if NEED_GRADIENTS:
            du = tl.load(to, mask=mask, other=0.0).to(tl.float32)
            slope = du * f * share
            weighed += slope
            through_mean += score * slope
            through_total += score * share
            df = du * share
            if RELU:
                df = tl.where(f > 0, df, 0.0)
            tl.store(
                features + place + i * CG * unit_stride,
                df.to(features.dtype.element_ty),
                mask=mask,
            )
            # The sum over all i is not known yet: the first of two parts.
            part = tl.sum(slope * mean, POSITION_AXIS)
            tl.store(sums + (tile * K + i) * C + channel, part, mask=in_block)
        tl.store(to, (f * share).to(units.dtype.element_ty), mask=mask)
    if NEED_GRADIENTS:
        at = _along_channels(channel * mean_channel, POSITION_AXIS)
        at = means + (at + _along_positions(position * mean_position, POSITION_AXIS))
        tl.store(at, through_mean - weighed * through_total, mask=mask)
        tl.debug_barrier()  # a lane may have written what another one reads
        for i in range(K):
            score = _coefficient(table, i, channel, in_block, C, POSITION_AXIS)
            share = tl.exp2(exponent * score - largest) / powers
            to = sums + (tile * K + i) * C + channel
            part = tl.load(to, mask=in_block, other=0.0)
            part -= tl.sum(tl.where(mask, share * weighed * mean, 0.0), POSITION_AXIS)
            tl.store(to, part, mask=in_block)


@kernel
def large_products_kernel(
    x,  # (B, C, H, W), any strides
    features,  # gradient of the normed features
    sums,  # out: (SPLITS, K + K * K, C) float32: of shift, products
    first_image,
    first_row,
    rows,
    count,
    tiles,
    H,
    W,
    w,
    x_image,
    x_channel,
    x_row,
    x_column,
    unit_stride,
    position_stride,
    C,
    CG,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of a feature's gradient, and of its products with the taps, for large windows."""
    K: tl.constexpr = KH * KW
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    i = tl.program_id(2)
    in_block = channel < C
    here = _along_channels(in_block, POSITION_AXIS)
    wide = channel.to(tl.int64) if LARGE else channel
    channel_offset = _along_channels(wide * x_channel, POSITION_AXIS)
    unit = _along_channels(_row_in_scratch(channel, i, CG, K), POSITION_AXIS) * unit_stride
    if POSITION_AXIS == 1:
        zero = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    else:
        zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    shift = zero
    products = ()
    for _ in tl.static_range(K):
        products = products + (zero,)
    tile = split
    while tile < tiles:
        position = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        image, row, column = _locate(position, first_image, first_row, rows, w, LARGE)
        mask = _along_positions(position < count, POSITION_AXIS) & here
        top = row * SH - PH
        left = column * SW - PW
        corner = image * x_image + top * x_row + left * x_column
        corner = x + (_along_positions(corner, POSITION_AXIS) + channel_offset)
        place = unit + _along_positions(position, POSITION_AXIS) * position_stride
        df = tl.load(features + place, mask=mask, other=0.0).to(tl.float32)
        shift += df
        added = ()
        for j in tl.static_range(K):
            tap = _tap(corner, top, left, j, mask, H, W, x_row, x_column, KW, DH, DW, POSITION_AXIS)
            added = added + (products[j] + df * tap,)
        products = added
        tile += splits
    first = sums + split * ((K + K * K) * C) + channel
    tl.store(first + i * C, tl.sum(shift, POSITION_AXIS), mask=in_block)
    for j in tl.static_range(K):
        total = tl.sum(products[j], POSITION_AXIS)
        tl.store(first + (K + i * K + j) * C, total, mask=in_block)


@kernel
def large_taps_kernel(
    table,
    features,  # gradient of the normed features
    means,  # gradient of the windows' means
    folds,  # out: gradient of the taps
    count,
    unit_stride,
    position_stride,
    mean_channel,
    mean_position,
    C,
    CG,
    K: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of the taps from those of features and means, for large windows."""
    channel_blocks = tl.cdiv(C, BLOCK_C)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    position = (tl.program_id(0) // channel_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_block = channel < C
    mask = _along_positions(position < count, POSITION_AXIS) & _along_channels(
        in_block, POSITION_AXIS
    )
    place = _along_channels(_row_in_scratch(channel, 0, CG, K), POSITION_AXIS) * unit_stride
    place = place + _along_positions(position, POSITION_AXIS) * position_stride
    to = _along_channels(channel * mean_channel, POSITION_AXIS)
    to = means + (to + _along_positions(position * mean_position, POSITION_AXIS))
    level = tl.load(to, mask=mask, other=0.0) * (1.0 / K)
    for j in range(K):
        total = level
        for i in range(K):
            at = features + place + i * CG * unit_stride
            df = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            row = 2 * K + i * K + j
            total += df * _coefficient(table, row, channel, in_block, C, POSITION_AXIS)
        at = folds + place + j * CG * unit_stride
        tl.store(at, total.to(folds.dtype.element_ty), mask=mask)
