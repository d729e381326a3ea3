"""Every Triton kernel, compiled for GPUs that need not be there, as the launchers would run it.

ptxas, which Triton brings along, tells how many registers it had to spill. It must be none in the
kernels of a 3 x 3 window, in any type and layout.
"""

import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.torch_features import LACKS_TRITON

if LACKS_TRITON:
    pytest.skip(LACKS_TRITON, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rfa_mmdet.ops.receptive_field.triton import launch as backend

pytestmark = pytest.mark.skipif(
    backend.INTERPRETED, reason="in Triton's interpreter there is nothing to compile"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages")


def launches(function, monkeypatch) -> list[tuple]:
    """What a call launches, with tensors that have shapes and no memory."""
    found = []

    def record(kernel, grid, x, arguments, constants):
        found.append((kernel, arguments, constants))

    monkeypatch.setattr(backend, "launch", record)
    monkeypatch.setattr(backend, "check", lambda name, x: None)
    function()
    return found


def layer(dtype, channels_last, channels=64, outputs=128, kernel=3, size=(100, 168), groups=1):
    """Arguments of the backend's functions for a layer of a detector."""
    k = kernel * kernel

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = empty(2, channels, *size, dtype=dtype).contiguous(memory_format=layout)
    grad_y = empty(2, outputs, *size, dtype=dtype).contiguous(memory_format=layout)
    window = ((kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1))
    attention, shift = empty(channels * k, 1, 1, 1), empty(channels * k)
    feature = empty(channels * k, 1, kernel, kernel)
    weight = empty(outputs, channels // groups, kernel, kernel, dtype=dtype)
    parameters = (x, attention, feature, shift, True, weight)
    slope, constant = empty(channels, k, k), empty(channels, k)
    needs = (True,) * 4
    return {
        "forward": lambda: backend.rfa_conv(*parameters, empty(outputs), *window, groups),
        "moments": lambda: backend.window_moments(x, *window),
        "backward": lambda: backend.rfa_conv_backward(grad_y, *parameters, needs, *window, groups),
        "correct": lambda: backend.window_moments_backward(x, slope, constant, *window),
    }


def compile_for(capability: int, kernel, arguments, constants):
    """Compile as a launch on such a GPU would: pointers aligned, sizes specialised likewise."""
    signature, constexprs, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constexprs[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {name: constants[name] for name in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(compiled, folder: Path) -> int:
    """Bytes of spilled registers, stores and loads, by ptxas."""
    source, capability = folder / "kernel.ptx", compiled.metadata.target.arch
    source.write_text(compiled.asm["ptx"])
    arch = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    command = [TOOLS / "ptxas", "-v", f"--gpu-name={arch}", source, "-o", folder / "kernel.cubin"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert len(numbers) == 2, done.stderr
    return sum(map(int, numbers))


def check(functions, capability, folder, monkeypatch, spills_allowed=False) -> set[str]:
    names = set()
    for function in functions:
        for kernel, arguments, constants in launches(function, monkeypatch):
            compiled = compile_for(capability, kernel, arguments, constants)
            names.add(kernel.fn.__name__)
            if not spills_allowed:
                what = f"{kernel.fn.__name__} for sm_{capability}, {constants}"
                assert spilled(compiled, folder) == 0, what
    return names


@pytest.mark.slow
def test_bfloat16_forward_and_moments_compile_without_spills(tmp_path, monkeypatch):
    functions = layer(torch.bfloat16, channels_last=True)
    functions = [functions[name] for name in ("forward", "moments")]
    names = check(functions, 90, tmp_path, monkeypatch)
    assert names == {"forward_kernel", "moments_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_spills_for_a_3x3_window(dtype, channels_last, capability, tmp_path, monkeypatch):
    functions = layer(dtype, channels_last)
    names = check(functions.values(), capability, tmp_path, monkeypatch)
    assert names == {
        "forward_kernel",
        "moments_kernel",
        "product_kernel",
        "window_gradient_kernel",
        "fold_kernel",
        "correct_kernel",
    }
    for channels, outputs in ((256, 256), (512, 512), (16, 24)):
        functions = layer(dtype, channels_last, channels, outputs)
        check([functions["forward"]], capability, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_windows_groups_and_large_maps_compile(
    channels_last, capability, tmp_path, monkeypatch
):
    functions = layer(torch.bfloat16, channels_last, 32, 32, kernel=5, groups=4)
    names = check(functions.values(), capability, tmp_path, monkeypatch, spills_allowed=True)
    assert {"large_window_gradient_kernel", "large_products_kernel", "large_taps_kernel"} < names
    # Offsets of 64 bits.
    functions = layer(torch.float16, channels_last, size=(4096, 4112))
    recorded = launches(functions["forward"], monkeypatch)
    assert recorded[0][2]["LARGE"]
    check(functions.values(), capability, tmp_path, monkeypatch, spills_allowed=True)


def test_sizes_of_maps_do_not_compile_anew(monkeypatch):
    """A detector's maps change their size from image to image."""
    for channels_last in (False, True):
        keys = []
        for size in ((100, 168), (99, 151), (64, 64), (3, 5)):
            key = []
            functions = layer(torch.float16, channels_last, size=size)
            for function in functions.values():
                for kernel, arguments, constants in launches(function, monkeypatch):
                    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
                    for parameter in kernel.params:
                        value = values[parameter.name]
                        if parameter.is_constexpr:
                            key.append((parameter.name, value))
                        elif isinstance(value, int) and not parameter.do_not_specialize:
                            kind = 1 if value == 1 else value % 16 == 0
                            key.append((parameter.name, kind))
            keys.append(key)
        for size, key in itertools.pairwise(keys):
            assert size == key
