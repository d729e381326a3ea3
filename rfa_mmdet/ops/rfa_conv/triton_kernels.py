"""Triton kernels of RFAConv: pointer arithmetic only; triton_backend.py launches them.

Words: a *position* is one cell of the output, over the images of a batch; a *tap* is one of the K
values that a window holds of one channel; a *coefficient* is a parameter of one channel, a row of
``table``, (rows, C) float32 (see ``triton_backend.coefficients``).

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

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Every new value of these would compile a kernel anew, if it is 1 or the first multiple of 16.
SIZES = ("count", "tiles", "H", "W", "h", "w", "first_image", "first_row", "rows")
SIZES += tuple(f"{map_}_{axis}" for map_ in "xyd" for axis in ("image", "channel", "row", "column"))


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
def _coefficient(table, row, channel, in_block, C: tl.constexpr, POSITION_AXIS: tl.constexpr):
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
def _anchor(tile, ANCHOR: tl.constexpr):
    """Keep the layout in which a tile was computed up to here.

    On sm_80 the compiler moves the change to the matrix product's layout up to the loads, so that
    each warp computes the features of all: 8 times the work. It cannot move it past this copy.
    """
    if ANCHOR:  # the interpreter has no assembler
        if tile.dtype.primitive_bitwidth == 32:
            tile = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=1
            )
        else:
            tile = tl.inline_asm_elementwise(
                "mov.b16 $0, $1;", "=h,h", [tile], dtype=tile.dtype, is_pure=False, pack=1
            )
    return tile


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
    LEARNT: tl.constexpr,
    RELU: tl.constexpr,
    BIAS: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    ANCHOR: tl.constexpr,
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
            scores = ()  # what the attention multiplies the mean with
            for i in tl.static_range(K):
                scores = scores + (_coefficient(table, i, channel, in_block, C, POSITION_AXIS),)
            highest = scores[0]
            lowest = scores[0]
            for i in tl.static_range(1, K):
                highest = tl.maximum(highest, scores[i])
                lowest = tl.minimum(lowest, scores[i])
            powers = ()
            shares = ()
            for part in tl.static_range(PARTS):
                mean = taps[part * K]
                for j in tl.static_range(1, K):
                    mean += taps[part * K + j]
                mean = mean * (LOG2_E / K)
                # The largest logit, against overflow, without a pass over them.
                largest = tl.where(mean < 0, lowest, highest) * mean
                sum_of_powers = tl.zeros_like(mean)
                for i in tl.static_range(K):
                    power = tl.exp2(mean * scores[i] - largest)
                    powers = powers + (power,)
                    sum_of_powers += power
                shares = shares + (1.0 / sum_of_powers,)
            for i in tl.static_range(K):
                row_of_i = ()
                if LEARNT:
                    for j in tl.static_range(K):
                        row_of_i = row_of_i + (
                            _coefficient(
                                table, 2 * K + i * K + j, channel, in_block, C, POSITION_AXIS
                            ),
                        )
                else:
                    row_of_i = (
                        _coefficient(table, 2 * K + i, channel, in_block, C, POSITION_AXIS),
                    )
                shift = _coefficient(table, K + i, channel, in_block, C, POSITION_AXIS)
                units = ()
                for part in tl.static_range(PARTS):
                    z = tl.zeros_like(taps[part * K]) + shift
                    if LEARNT:
                        for j in tl.static_range(K):
                            z += row_of_i[j] * taps[part * K + j]
                    else:
                        z += row_of_i[0] * taps[part * K + i]
                    u = _rectify(z, RELU) * (powers[part * K + i] * shares[part])
                    units = units + (_anchor(u.to(x.dtype.element_ty), ANCHOR),)
                u = _side_by_side(units, PARTS, POSITION_AXIS)
                weights = tl.load(weight + unit + i * CG, mask=real_unit, other=0.0)
                if POSITION_AXIS == 1:
                    total = tl.dot(weights, u, total, input_precision=PRECISION)
                else:
                    total = tl.dot(u, weights, total, input_precision=PRECISION)
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
                    LEARNT,
                    POSITION_AXIS,
                )
                score = _coefficient(table, i, channel, in_block, C, POSITION_AXIS)
                share = tl.exp2(mean * LOG2_E * score - largest) / sum_of_powers
                u = _anchor((_rectify(z, RELU) * share).to(x.dtype.element_ty), ANCHOR)
                weights = tl.load(weight + unit + i * CG, mask=real_unit, other=0.0)
                if POSITION_AXIS == 1:
                    total = tl.dot(weights, u, total, input_precision=PRECISION)
                else:
                    total = tl.dot(u, weights, total, input_precision=PRECISION)

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
    C: tl.constexpr,
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
    C: tl.constexpr,
    K: tl.constexpr,
    KW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    LEARNT: tl.constexpr,
    POSITION_AXIS: tl.constexpr,
):
    """Feature i before its ReLU."""
    z = tl.zeros(mask.shape, tl.float32)
    z += _coefficient(table, K + i, channel, in_block, C, POSITION_AXIS)
    if LEARNT:
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
    else:
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
        z += tap * _coefficient(table, 2 * K + i, channel, in_block, C, POSITION_AXIS)
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
    C: tl.constexpr,
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
