"""Compile every Triton kernel for several GPUs, without one, and inspect the code.

Checks register spills, shared memory, memory accesses of a warp, and instructions per element.
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

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton.chunks import OFFSETS, takes
from tests.helpers import triton_aot as aot
from tests.helpers.ptx import barriers
from tests.helpers.triton_steps import empty_map, of_gated, of_rfa_conv

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "0",
    reason="Triton's interpreter does not compile",
)

# Bytes on the smallest supported GPUs.
SHARED = 99 * 1024
TENSOR_MEMORY = 512  # columns, of sm_100
# Per element of the output (of the input for OF_INPUT), in the loop over rows. A feature alone
# takes 81 multiply-adds, and so does a gradient. Loading the next row's units ahead, rather than
# waiting for them, takes up to 100 more in the two kernels of the backward pass.
MOST_INSTRUCTIONS = {
    "moments_kernel": 125,
    "features_kernel": 300,
    "gradient_kernel": 540,
    "products_kernel": 420,
    "fold_kernel": 160,
    "moments_gradient_kernel": 240,
}
OF_INPUT = ("fold_kernel", "moments_gradient_kernel")
# products_kernel also reads the features if there are no gates. With stride 2, a step loads two
# rows.
MOST_OF_GATES = {**MOST_INSTRUCTIONS, "products_kernel": 470}
MOST_OF_STRIDE_2 = {**MOST_INSTRUCTIONS, "moments_kernel": 150}
# Unaligned accesses touch an additional sector.
SPARE = 1.6
FEW = 2**14  # elements of a parameter


def layer(dtype, channels_last, channels=64, outputs=64, size=(40, 96), stride=1):
    """Return the operators of RFAConv with 3 x 3 windows, and the elements of input and output.

    The output counts as for a depthwise convolution.
    """
    window = Window((3, 3), (stride, stride), (1, 1))
    x = empty_map((2, channels, *size), dtype, channels_last)
    elements = {"in": x.numel(), "out": channels * window.count(x)}
    return of_rfa_conv(x, outputs, window), elements


def gated(channels_last, names):
    """Return some operators on gated and pooled features, and the elements of their maps."""
    window = Window((3, 3), (1, 1), (1, 1))
    x = empty_map((2, 64, 40, 96), torch.bfloat16, channels_last)
    elements = {"in": x.numel(), "out": 64 * window.count(x)}
    return [({name: of_gated(x, 64, window)[name]}, elements) for name in names]


def launches(functions) -> list[aot.Launch]:
    return [launch for function in functions.values() for launch in aot.recorded(function)]


def faults(capability, functions, elements, spare, allowed=MOST_INSTRUCTIONS) -> list[str]:
    """Return descriptions of the problems of a layer's kernels."""
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
                own.append(f"{took:.0f} instructions per element, at most {most} allowed")
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
        yield "uses tensor cores, which should be left to cuBLAS"
    if compiled.launch.name in MOST_INSTRUCTIONS and barriers(compiled.ptx):
        yield f"{barriers(compiled.ptx)} barriers in a loop"
    yield from places(compiled, spare)


def warps(compiled):
    """Return program and warp of the first, a middle and the last warp."""
    last = tuple(n - 1 for n in compiled.grid)
    middle = tuple(n // 2 for n in compiled.grid)
    return ((0, 0, 0), 0), (middle, 0), (last, compiled.warps - 1)


def places(compiled, spare):
    """Yield problems of the addresses in the first, a middle and the last warp."""
    middle = tuple(n // 2 for n in compiled.grid)
    for program, warp in warps(compiled):
        try:
            accesses = compiled.accesses(program, warp)
        except ValueError as error:  # addresses depend on more than integers
            yield str(error)
            return
        yield from aot.outside(compiled, accesses)
        if program == middle:
            yield from aot.scattered(compiled, [a for a in accesses if counts(compiled, a)], spare)


def counts(compiled, access) -> bool:
    """Return whether coalescing matters: not for kernels that only access parameters."""
    if compiled.launch.name in MOST_INSTRUCTIONS or not len(access.addresses):
        return True
    return compiled.launch.tensors()[compiled.tensor_of(access)].numel() >= FEW


@triton.jit
def faulty_kernel(x, y, columns, BLOCK: tl.constexpr):
    """Adds up rows by reading columns, and one column too many."""
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
        "loads of x, 4 bytes per lane, touch 8.0 times as many sectors as necessary",
        "reads outside x",
    }
    if compiled.sass:  # 129 columns, up to four per iteration
        assert 30 < aot.executed(compiled, compiled.accesses()).trips <= 129


in_both_layouts = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["nchw", "channels_last"]
)


@in_both_layouts
def test_kernels_of_a_training_step_are_efficient(channels_last):
    assert faults(90, *layer(torch.bfloat16, channels_last), SPARE) == []


# sm_90 with bfloat16: the test above.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        (torch.float32 if capability == 90 else torch.bfloat16, capability)
        for capability in aot.targets()
    ],
    ids=str,
)
@in_both_layouts
def test_kernels_are_efficient_on_every_gpu(channels_last, dtype, capability):
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
def test_kernels_of_gates_are_efficient(channels_last, names):
    operators = gated(channels_last, names)
    assert [f for one in operators for f in faults(90, *one, SPARE, MOST_OF_GATES)] == []


@pytest.mark.slow
@in_both_layouts
def test_kernels_of_strided_layers_are_efficient(channels_last):
    # In NCHW, a stride of 2 reads every second value of a row.
    spare = SPARE if channels_last else 2 * SPARE
    of_stride = layer(torch.float16, channels_last, 128, 128, (40, 64), stride=2)
    assert faults(90, *of_stride, spare, MOST_OF_STRIDE_2) == []


@pytest.mark.parametrize(
    "channels_last", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["nchw", "nhwc"]
)
def test_kernels_of_dilated_windows_compile(channels_last):
    """Their steps down share no rows with the window above, so some loops have no turns."""
    window = Window((3, 3), (1, 1), (2, 2), (2, 2))
    x = empty_map((2, 32, 20, 24), torch.float32, channels_last)
    found = launches(of_rfa_conv(x, 8, window))
    assert len({launch.name for launch in found}) == 10
    assert all(aot.compile_for(90, launch).registers for launch in aot.distinct(found))


@pytest.mark.slow
@in_both_layouts
def test_offsets_in_the_largest_maps_fit_in_32_bits(channels_last):
    """Executes the compiled 32-bit arithmetic for the first and the last chunk."""
    shape, window = (2**13, 64, 200, 20), Window((3, 3), (1, 1), (1, 1))
    x = empty_map(shape, torch.bfloat16, channels_last)
    assert takes(x, None, window)
    assert x.numel() > 0.98 * OFFSETS
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
