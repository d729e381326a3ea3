"""Every Triton kernel, compiled for GPUs that need not be there, as the launchers would run it.

What is looked at: registers that had to be spilled, shared memory, where the lanes of a warp read
and write, and how many instructions an element takes.
"""

import importlib.util
import os
from collections import defaultdict

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from benchmarks.modelled import on_an_h100
from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton.chunks import OFFSETS, takes
from tests.helpers import triton_aot as aot
from tests.helpers.ptx import barriers
from tests.helpers.triton_steps import empty_map, of_gated, of_rfa_conv

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "0",
    reason="in Triton's interpreter there is nothing to compile",
)

# Of the smallest GPUs that the kernels are for.
SHARED = 99 * 1024
TENSOR_MEMORY = 512  # columns, of sm_100
# An element of the output, in the loop down the rows; or of the input, which two kernels go down.
# Multiply-adds alone: 81 of a feature, and of a gradient.
MOST_INSTRUCTIONS = {
    "moments_kernel": 125,
    "features_kernel": 300,
    "gradient_kernel": 420,
    "products_kernel": 325,
    "fold_kernel": 160,
    "moments_gradient_kernel": 240,
}
OF_INPUT = ("fold_kernel", "moments_gradient_kernel")
# A stride of 2 loads two rows a step: three addresses, masks, loads, conversions and shifts more.
# Without gates, the kernel of products reads the features, too.
MOST_OF_GATES = {**MOST_INSTRUCTIONS, "products_kernel": 375}
MOST_OF_STRIDE_2 = {**MOST_INSTRUCTIONS, "moments_kernel": 150}
# What begins in the middle of a sector ends in the next one.
SPARE = 1.6
FEW = 2**14  # numbers of a parameter


def layer(dtype, channels_last, channels=64, outputs=64, size=(40, 96), stride=1):
    """The operators of RFAConv with 3 x 3 windows, and the elements of its maps, in and out.

    The output's as of a depthwise convolution.
    """
    window = Window((3, 3), (stride, stride), (1, 1))
    x = empty_map((2, channels, *size), dtype, channels_last)
    elements = {"in": x.numel(), "out": channels * window.count(x)}
    return of_rfa_conv(x, outputs, window), elements


def gated(channels_last, names):
    """Some operators of gated and pooled features, and the elements of their maps."""
    window = Window((3, 3), (1, 1), (1, 1))
    x = empty_map((2, 64, 40, 96), torch.bfloat16, channels_last)
    elements = {"in": x.numel(), "out": 64 * window.count(x)}
    return [({name: of_gated(x, 64, window)[name]}, elements) for name in names]


def launches(functions) -> list[aot.Launch]:
    return [launch for function in functions.values() for launch in aot.recorded(function)]


def faults(capability, functions, elements, spare, allowed=MOST_INSTRUCTIONS) -> list[str]:
    """What is wrong with the kernels of a layer, as sentences."""
    found = []
    by_name = defaultdict(list)
    for launch in launches(functions):
        by_name[launch.name].append(aot.compile_for(capability, launch))
    for name, compiled in by_name.items():
        own = [*faults_of(compiled[0], spare)]
        most = allowed.get(name)
        if most and compiled[0].sass:
            took = aot.instructions(compiled, elements["in" if name in OF_INPUT else "out"])
            if took > most:
                own.append(f"{took:.0f} instructions an element, {most} are allowed")
        found += [f"{name}, sm_{capability}: {fault}" for fault in own]
    return found


def faults_of(compiled, spare):
    if compiled.spilled:
        yield f"{compiled.spilled} bytes of spilled registers"
    if compiled.shared > SHARED:
        yield f"{compiled.shared} bytes of shared memory"
    if compiled.tensor_memory > TENSOR_MEMORY:
        yield f"{compiled.tensor_memory} columns of tensor memory"
    if aot.TENSOR_CORES.search(compiled.ptx):
        yield "products on tensor cores, which are cuBLAS's"
    if compiled.launch.name in MOST_INSTRUCTIONS and barriers(compiled.ptx):
        yield f"{barriers(compiled.ptx)} barriers in a loop"
    yield from places(compiled, spare)


def warps(compiled):
    """The first, one in the middle, and the last."""
    last = tuple(n - 1 for n in compiled.grid)
    middle = tuple(n // 2 for n in compiled.grid)
    return ((0, 0, 0), 0), (middle, 0), (last, compiled.warps - 1)


def places(compiled, spare):
    """What is wrong with the addresses of the first, the middle and the last program."""
    middle = tuple(n // 2 for n in compiled.grid)
    for program, warp in warps(compiled):
        try:
            accesses = compiled.accesses(program, warp)
        except ValueError as error:  # more than integers decides where it reads
            yield str(error)
            return
        yield from aot.outside(compiled, accesses)
        if program == middle:
            yield from aot.scattered(compiled, [a for a in accesses if counts(compiled, a)], spare)


def counts(compiled, access) -> bool:
    """Whether it matters where the lanes are: not where parameters alone are worked on."""
    if compiled.launch.name in MOST_INSTRUCTIONS or not len(access.addresses):
        return True
    return compiled.launch.tensors()[compiled.tensor_of(access)].numel() >= FEW


@triton.jit
def faulty_kernel(x, y, columns, BLOCK: tl.constexpr):
    """Adds up rows by reading columns, one more than there are."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for column in range(columns):
        total += tl.load(x + (lane * BLOCK + column))
        tl.debug_barrier()
    tl.store(y + lane, total)


def test_faults_are_found():
    x, y = torch.empty(128, 128, device="meta"), torch.empty(128, device="meta")
    launch = aot.Launch(faulty_kernel, (1,), (x, y, 129), dict(BLOCK=128, num_warps=4))
    compiled = aot.compile_for(80, launch)
    assert barriers(compiled.ptx) >= 1
    assert set(places(compiled, SPARE)) == {
        "loads of x, 4 bytes a lane, touch 8.0 times the sectors that would do",
        "reads beside x",
    }
    if compiled.sass:  # 129 columns, at most four at a time
        assert 30 < aot.executed(compiled, compiled.accesses()).trips <= 129


in_both_layouts = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["nchw", "channels_last"]
)


@in_both_layouts
def test_kernels_of_a_training_step_are_shaped_for_the_gpu(channels_last):
    assert faults(90, *layer(torch.bfloat16, channels_last), SPARE) == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.targets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@in_both_layouts
def test_kernels_are_shaped_for_every_gpu(channels_last, dtype, capability):
    assert faults(capability, *layer(dtype, channels_last), SPARE) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels_last", "names"),
    [
        (False, ["channels", "channels, backward", "pool, backward"]),
        (True, ["rows", "rows, backward"]),
    ],
    ids=["nchw", "channels_last"],
)
def test_kernels_of_gates_are_shaped_for_the_gpu(channels_last, names):
    operators = gated(channels_last, names)
    assert [f for one in operators for f in faults(90, *one, SPARE, MOST_OF_GATES)] == []


@pytest.mark.slow
@in_both_layouts
def test_kernels_are_shaped_for_other_layers(channels_last):
    # In NCHW, a stride reads every second value of a row.
    spare = SPARE if channels_last else 2 * SPARE
    of_stride = layer(torch.float16, channels_last, 128, 128, (40, 64), stride=2)
    assert faults(90, *of_stride, spare, MOST_OF_STRIDE_2) == []


@pytest.mark.slow
@in_both_layouts
def test_offsets_in_the_largest_maps_fit_into_32_bits(channels_last):
    """The code's own arithmetic, which wraps around, of the first and the last chunk."""
    shape, window = (2**13, 64, 200, 20), Window((3, 3), (1, 1), (1, 1))
    x = empty_map(shape, torch.bfloat16, channels_last)
    assert takes(x, None, window)
    assert x.numel() > 0.98 * OFFSETS
    with on_an_h100():
        by_name = defaultdict(list)
        for launch in launches(of_rfa_conv(x, 16, window)):
            by_name[launch.name].append(launch)
    found = set()
    for name, of_name in by_name.items():
        for launch in (of_name[0], of_name[-1]):
            compiled = aot.compile_for(90, launch)
            for program, warp in warps(compiled):
                accesses = compiled.accesses(program, warp)
                found |= {f"{name} {fault}" for fault in aot.outside(compiled, accesses)}
    assert found == set()
