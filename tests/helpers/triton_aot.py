"""Compile launches for GPUs that need not exist, and inspect the code.

Triton's launcher sees a mocked GPU. It decides what to specialise, and compiles without running.
"""

import functools
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton

from rfa_mmdet.ops.receptive_field.triton import launch as backend
from tests.helpers.ptx import Access, follow

OLD = triton.__version__.startswith("2.")  # before it could compile for other targets
TENSOR_CORES = re.compile(r"\b(?:wgmma|tcgen05|mma|wmma|ldmatrix)[.\w]*")
# Size of each tensor's address range, so that addresses identify tensors.
ROOM = 1 << 44


@dataclass(frozen=True)
class Launch:
    """Arguments of a call of ``launch``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def values(self) -> dict[str, Any]:
        """Every argument by name."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.constants

    def tensors(self) -> dict[str, torch.Tensor]:
        found = self.values().items()
        return {name: value for name, value in found if isinstance(value, torch.Tensor)}

    def parameters(self) -> dict[str, Any]:
        """Return the arguments of the compiled kernel: all but constants and specialised values."""
        values, kept = self.values(), {}
        for number, name in enumerate(self.kernel.arg_names):
            one = type(values[name]) is int and values[name] == 1 and not self.is_fixed(name)
            if number not in self.kernel.constexprs and values[name] is not None and not one:
                kept[name] = values[name]
        return kept

    def is_fixed(self, name: str) -> bool:
        """Return whether one compilation serves all values of an argument."""
        number = self.kernel.arg_names.index(name)
        return bool({name, number} & set(self.kernel.do_not_specialize or ()))

    def key(self) -> tuple:
        """Return a key that is equal for launches that share a compilation."""
        found, parameters = [self.name], self.parameters()
        for name, value in self.values().items():
            if isinstance(value, torch.Tensor):
                found.append((name, value.dtype))
            elif type(value) is int and name in parameters:
                found.append((name, not self.is_fixed(name) and value % 16 == 0))
            else:  # for floats, only the type counts
                found.append((name, float if type(value) is float else value))
        return tuple(found)


def recorded(function) -> list[Launch]:
    """Return the launches of a call with meta tensors."""
    found = []

    def record(kernel, grid, x, arguments, constants):
        found.append(Launch(kernel, tuple(grid), tuple(arguments), constants))

    with mock.patch.object(backend, "launch", record):
        function()
    return found


def distinct(launches: list[Launch]) -> list[Launch]:
    """Return the first launch of each compilation."""
    return list({launch.key(): launch for launch in reversed(launches)}.values())[::-1]


def tool(name: str) -> str | None:
    """Find an NVIDIA tool in this Triton, the environment or the system."""
    here = Path(triton.__file__).parent
    folders = [here / "backends/nvidia/bin", here / "third_party/cuda/bin"]
    folders.append(Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/bin")
    found = [str(folder / name) for folder in folders if (folder / name).exists()]
    return found[0] if found else shutil.which(name)


def _as_if_on(capability: int):
    """Make Triton see a GPU with a compute capability."""
    if OLD:
        from triton.compiler import compiler

        def result(function, launcher, metadata, asm):
            return SimpleNamespace(metadata=metadata, asm=asm)

        return mock.patch.multiple(
            compiler,
            get_architecture_descriptor=lambda _: capability,
            make_stub=lambda *_: None,  # the launcher, which needs CUDA's headers and library
            CompiledKernel=result,
        )
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        # Triton caches compiled kernels by device.
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    return mock.patch("triton.runtime.jit.driver", SimpleNamespace(active=driver))


@functools.cache
def targets() -> list[int]:
    """Return which of the compute capabilities 80, 90 and 100 this Triton supports."""
    listed = subprocess.run([tool("ptxas"), "--help"], capture_output=True, text=True).stdout
    return [capability for capability in (80, 90, 100) if f"sm_{capability}" in listed]


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one kind of GPU, and its launch."""

    launch: Launch
    ptx: str
    shared: int  # bytes
    tensor_memory: int  # columns
    registers: int
    spilled: int  # bytes of stores and loads
    sass: tuple[str, ...]  # labels and instructions; none without a disassembler

    def accesses(self, program=None, warp: int = 0) -> list[Access]:
        """Return the accesses of a warp, by default of the program in the middle of the grid."""
        numbers, room = [], ROOM
        for value in self.launch.parameters().values():
            numbers.append(room if isinstance(value, torch.Tensor) else int(value))  # or no address
            room += ROOM * isinstance(value, torch.Tensor)
        program = program or tuple(n // 2 for n in self.grid)
        return follow(self.ptx, numbers, self.grid, program, warp)

    @property
    def grid(self) -> tuple[int, int, int]:
        return (*self.launch.grid, 1, 1)[:3]

    @property
    def warps(self) -> int:
        """Warps per program."""
        return self.launch.constants.get("num_warps", 4)

    def tensor_of(self, access: Access) -> str:
        """Return the name of the argument that is accessed."""
        return list(self.launch.tensors())[int(access.addresses[0] // ROOM) - 1]


_COMPILED: dict[tuple, Compiled] = {}


def compile_for(capability: int, launch: Launch) -> Compiled:
    """Compile as the launch on such a GPU would, once in a process."""
    key = (capability, *launch.key())
    if key not in _COMPILED:
        _COMPILED[key] = _compile(capability, launch)
    return replace(_COMPILED[key], launch=launch)


def _compile(capability: int, launch: Launch) -> Compiled:
    run = functools.partial(launch.kernel.run, grid=(1,), warmup=True)
    if OLD:
        run = functools.partial(run, device=capability, stream=0, device_type="cuda")
    with _as_if_on(capability):
        compiled = run(*launch.arguments, **launch.constants)
    metadata = compiled.metadata
    metadata = metadata if isinstance(metadata, dict) else metadata._asdict()
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
        said = _run(_assembler(capability), "-v", f"--gpu-name={arch}", source, "-o", binary)
        sass = _disassembled(binary)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    assert len(spills) == 2, said
    return Compiled(
        launch,
        ptx,
        metadata["shared"],
        metadata.get("tmem_size", 0) or 0,
        int(re.search(r"Used (\d+) registers", said)[1]),
        sum(map(int, spills)),
        sass,
    )


def _assembler(capability: int) -> str:
    return (tool("ptxas-blackwell") if capability >= 100 else None) or tool("ptxas")


def _run(*command) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout + done.stderr


def _disassembled(binary: Path) -> tuple[str, ...]:
    disassembler = tool("nvdisasm")
    if not disassembler:
        return ()
    lines = _run(disassembler, "-c", binary).splitlines()
    found = [re.match(r"(\.L\w+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?) *;", line) for line in lines]
    return tuple(match[1] or match[2] for match in found if match)


_GLOBAL = re.compile(r"\b(?:LDG|STG)\b[.\w]*")


def loops(sass: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the innermost loops: the instructions from a label to the branch back to it."""
    labels = {line: n for n, line in enumerate(sass) if line.startswith(".L")}
    spans = []
    for n, line in enumerate(sass):
        branch = re.search(r"\bBRA.*?(\.L\w+)", line)
        # A branch to itself ends every kernel.
        if branch and labels[branch[1]] < n - 1:
            spans.append((labels[branch[1]], n))
    inner = [s for s in spans if not any(s[0] <= a and b <= s[1] and s != (a, b) for a, b in spans)]
    return [tuple(x for x in sass[a : b + 1] if not x.startswith(".L")) for a, b in inner]


@dataclass(frozen=True)
class Executed:
    """Machine instructions that a warp executes."""

    once: float  # outside the main loop
    loop: int  # the main loop's
    trips: float

    @property
    def total(self) -> float:
        return self.once + self.loop * self.trips


def executed(compiled: Compiled, accesses: list[Access]) -> Executed:
    """How many instructions a warp executes.

    The assembler may have unrolled a loop: it went round as often as its loads and stores tell. Of
    several, the one with most of them is the main one, and the others count once.
    """

    def count(lines):
        return sum(bool(_GLOBAL.search(line)) for line in lines)

    main = max(loops(compiled.sass), key=count, default=())
    length = sum(not line.startswith(".L") for line in compiled.sass)
    if not count(main):
        return Executed(length, 0, 0)
    outside = count(compiled.sass) - count(main)
    return Executed(length - len(main), len(main), (len(accesses) - outside) / count(main))


def instructions(launches: list[Compiled], elements: int) -> float:
    """Return instructions per element, over all threads, in the main loops of launches."""
    total = 0.0
    for compiled in launches:
        warp = executed(compiled, compiled.accesses())
        total += 32 * warp.loop * warp.trips * compiled.warps * prod(compiled.grid)
    return total / elements


def scattered(compiled: Compiled, accesses: list[Access], spare: float) -> list[str]:
    """Loads and stores whose lanes are far from each other; of each argument, the worst.

    Args:
        compiled (Compiled): Whose they are.
        accesses (list[Access]): Of a warp.
        spare (float): How many times the sectors that would hold all is all right.
    """
    by_line: dict[int, list[Access]] = defaultdict(list)
    for access in accesses:
        if len(access.addresses):
            by_line[access.line].append(access)
    worst: dict[str, tuple] = {}
    for executions in by_line.values():
        one = executions[0]
        needed = sum(access.least for access in executions)
        times = sum(len(access.sectors) for access in executions) / needed
        what = f"{'stores' if one.store else 'loads'} of {compiled.tensor_of(one)}"
        worst[what] = max(worst.get(what, (0, 0)), (times, one.size))
    return [
        f"{what}, {size} bytes per lane, touch {times:.1f} times as many sectors as necessary"
        for what, (times, size) in worst.items()
        if times > spare
    ]


def outside(compiled: Compiled, accesses: list[Access]) -> list[str]:
    """Return out-of-bounds accesses of a warp, by argument."""
    found = set()
    tensors = list(compiled.launch.tensors().items())
    for access in accesses:
        if not len(access.addresses):
            continue
        number = int(access.addresses.max() // ROOM) - 1
        name, tensor = tensors[number] if 0 <= number < len(tensors) else ("none", None)
        start = (number + 1) * ROOM
        span = 0 if tensor is None else _span(tensor)
        if access.addresses.min() < start or access.addresses.max() + access.size > start + span:
            found.add(f"{'writes' if access.store else 'reads'} outside {name}")
    return sorted(found)


def _span(tensor: torch.Tensor) -> int:
    """Return the bytes from a tensor's first value to its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0


_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def widths(compiled: Compiled) -> Counter:
    """Count global loads and stores by bytes per lane, e.g. '2 ld'."""
    found = Counter()
    for line in compiled.sass:
        match = _GLOBAL.search(line)
        if match:
            parts = match[0].split(".")
            size = next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)
            found[f"{size} {'st' if parts[0] == 'STG' else 'ld'}"] += 1
    return found
