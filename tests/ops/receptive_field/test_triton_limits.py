"""Grids and 32-bit offsets stay within limits for the largest supported maps, on meta tensors."""

import importlib.util
import os

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton import chunks
from rfa_mmdet.ops.receptive_field.triton.chunks import BLOCKS, takes
from tests.helpers import triton_aot as aot
from tests.helpers.triton_steps import empty, empty_map, of_gated, of_rfa_conv

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "0",
    reason="Triton's interpreter needs tensors with memory",
)
SQUARE = Window((3, 3), (1, 1), (1, 1))


def recorded(functions):
    """Return the launches of all functions, with large chunks, so that there are few.

    Chunks of several images in half precision have up to 1.4 values of partial sums per byte of
    features, so in larger chunks the sums alone would exceed 32 bits.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", 2**30)
        return [launch for function in functions.values() for launch in aot.recorded(function)]


def beyond(launch):
    """Yield what exceeds the limits of a GPU or of 32 bits in a launch."""
    across, *others = launch.grid
    if not 0 < across < 2**31 or not all(0 < n <= 65_535 for n in others):
        yield f"{launch.name}: a grid of {launch.grid}"
    for name, value in launch.values().items():
        if isinstance(value, torch.Tensor):
            last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            if last >= 2**31:
                yield f"{launch.name}: {name} of {tuple(value.shape)}"
        elif isinstance(value, int) and not -(2**31) <= value < 2**31:
            yield f"{launch.name}: {name} = {value}"


def of_all(x, outputs, window):
    return of_rfa_conv(x, outputs, window) | of_gated(x, outputs, window)


@st.composite
def maps(draw):
    """Draw a map of about the largest supported size, with a window and outputs."""
    bits = draw(st.integers(26, 31))
    shape = [1, 1, 1, 1]
    for axis in draw(st.permutations(range(4))):
        part = draw(st.integers(0, bits))
        shape[axis] = max(1, 2**part + draw(st.integers(-3, 3)))
        bits -= part
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 9), (4, 2)]))
    pairs = [
        (draw(st.integers(*limits)), draw(st.integers(*limits)))
        for limits in ((1, 3), (0, 4), (1, 3))
    ]
    window = Window(kernel, *pairs)
    assume(min(window.output_size(shape[2:])) > 0)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return empty_map(shape, dtype, draw(st.booleans())), draw(st.sampled_from([1, 64])), window


@settings(max_examples=30)
@given(maps())
@example((empty_map((1, 1, 1, 2**31 - 2**24 - 1), torch.float32, False), 1, Window((1, 1))))
@example((empty_map((2, 64, 4079, 4080), torch.bfloat16, True), 64, SQUARE))
@example((empty_map((2, 32, 1, 1_600_000), torch.bfloat16, True), 64, SQUARE))  # partial sums
def test_launches_stay_within_limits(drawn):
    x, outputs, window = drawn
    weight = empty(outputs, x.shape[1], *window.kernel_size)
    assume(takes(x, weight, window))
    found = recorded(of_all(x, outputs, window))
    assert {launch.name for launch in found} >= {"features_kernel", "gradient_kernel"}
    assert sorted({fault for launch in found for fault in beyond(launch)}) == []


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((1, 1, 2**17, 2**14), Window((3, 3), (2**14, 2**12))),
        ((1, BLOCKS + 1, 4, 4), SQUARE),
        ((1, 4, 6, 5), Window((2, 5))),
        ((1, 2, 3, 3), Window((3, 3), (2**19, 2**19), (2**20 + 1, 2**20 + 1))),
        ((1, 2**12, 1, 2**16), SQUARE),  # features of a row
        ((1, 1, 2, 2), Window((3, 3), (1, 1), (2**13, 2**13))),  # outputs
        ((2**14, 2**13, 1, 2), SQUARE),  # partial sums
    ],
)
def test_larger_maps_fall_back_to_plain_torch(shape, window):
    x = empty_map(shape, torch.float32, False)
    assert not takes(x, None, window)
    functions = of_all(x, 1, window)
    assert (
        recorded({name: functions[name] for name in ("forward", "moments", "rows", "pool")}) == []
    )
