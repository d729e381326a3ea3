"""Every Triton kernel, compiled for GPUs that need not be there, as the launchers would run it.

What is looked at: registers that had to be spilled, shared memory, where the lanes of a warp read
and write, and how many instructions an element takes.
"""

import importlib.util
import itertools
import os
from collections import defaultdict

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton import operators
from tests.helpers import triton_aot as aot
from tests.helpers.ptx import barriers

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "0",
    reason="in Triton's interpreter there is nothing to compile",
)

LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
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
    "moments_gradient_kernel": 220,
}
OF_INPUT = ("fold_kernel", "moments_gradient_kernel")
# A stride of 2 loads two rows a step: three addresses, masks, loads, conversions and shifts more.
MOST_OF_STRIDE_2 = {**MOST_INSTRUCTIONS, "moments_kernel": 150}
# What begins in the middle of a sector ends in the next one.
SPARE = 1.6
FEW = 2**14  # numbers of a parameter


def layer(dtype, channels_last, channels=64, outputs=64, size=(40, 96), stride=1):
    """The functions of a layer with 3 x 3 windows, and the elements of its maps, in and out.

    The output's as of a depthwise convolution.
    """
    k = 9

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    window = Window((3, 3), (stride, stride), (1, 1))
    x = empty(2, channels, *size, dtype=dtype).contiguous(memory_format=LAYOUTS[channels_last])
    grad_y = empty(2, outputs, *window.output_size(size), dtype=dtype)
    grad_y = grad_y.contiguous(memory_format=LAYOUTS[channels_last])
    attention, shift = empty(channels * k, 1, 1, 1), empty(channels * k)
    feature = empty(channels * k, 1, 3, 3)
    weight = empty(outputs, channels, 3, 3, dtype=dtype)
    parameters = (x, attention, feature, shift, True, weight)
    slope, constant = empty(channels, k, k), empty(channels, k)
    bias, needs = empty(outputs, dtype=dtype), (True,) * 4
    mean, covariance, wide = empty(channels, k), empty(channels, k, k), empty(channels * k)
    functions = {
        "fold": lambda: operators.fold_moments(mean, covariance, feature, wide, wide, 1e-5, 99),
        "of_fold": lambda: operators.fold_moments_backward(
            feature, wide, feature, wide, mean, covariance, wide, wide, 99
        ),
        "forward": lambda: operators.rfa_conv(*parameters, bias, *window, 1),
        "moments": lambda: operators.window_moments(x, *window),
        "backward": lambda: operators.rfa_conv_backward(grad_y, *parameters, needs, *window, 1),
        "correct": lambda: operators.window_moments_backward(x, slope, constant, *window),
    }
    return functions, {"in": x.numel(), "out": channels * window.count(x)}


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


def places(compiled, spare):
    """What is wrong with the addresses of the first, the middle and the last program."""
    last = tuple(n - 1 for n in compiled.grid)
    middle = tuple(n // 2 for n in compiled.grid)
    for program, warp in ((0, 0, 0), 0), (middle, 0), (last, compiled.warps - 1):
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


# What is wrong with channels_last there, today.
KNOWN = {
    "3.8": "registers of the products are spilled for sm_90",
}
known = KNOWN.get(".".join(triton.__version__.split(".")[:2]))
maybe = pytest.mark.xfail(known is not None, reason=str(known), strict=False)


@pytest.mark.parametrize(
    "channels_last",
    [pytest.param(False, id="nchw"), pytest.param(True, id="channels_last", marks=maybe)],
)
def test_kernels_of_a_training_step_are_shaped_for_the_gpu(channels_last):
    assert faults(90, *layer(torch.bfloat16, channels_last), SPARE) == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", aot.targets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@in_both_layouts
def test_kernels_are_shaped_for_every_gpu(channels_last, dtype, capability):
    assert faults(capability, *layer(dtype, channels_last), SPARE) == []


@pytest.mark.slow
@in_both_layouts
def test_kernels_are_shaped_for_other_layers(channels_last):
    # In NCHW, a stride reads every second value of a row.
    spare = SPARE if channels_last else 2 * SPARE
    of_stride = layer(torch.float16, channels_last, 128, 128, (40, 64), stride=2)
    assert faults(90, *of_stride, spare, MOST_OF_STRIDE_2) == []


@pytest.mark.parametrize(("channels_last", "most"), [(False, 3), (True, 1)])
def test_sizes_of_maps_hardly_compile_anew(channels_last, most):
    """A detector's maps change their size from image to image; tiles of NCHW have three widths."""
    keys = defaultdict(set)
    for high, wide in itertools.product((3, 64, 99, 400), (5, 32, 84, 151, 168, 333)):
        functions, _ = layer(torch.float16, channels_last, size=(high, wide))
        for launch in launches(functions):
            keys[launch.name].add(launch.key())
    assert {name: len(found) for name, found in keys.items() if len(found) > most} == {}
