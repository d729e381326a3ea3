"""Estimate the time of RFAConv's Triton kernels on an H100, without a GPU.

Compiles the kernels, traces the instructions and memory accesses of one warp of each, and counts
what PyTorch's operators read and write. The results are modelled, not measured: use them to compare
designs and find bottlenecks.
"""

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from statistics import geometric_mean
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.sizes import SIZES, InputSize
from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field import WindowFeatures, fold_batch_norm
from rfa_mmdet.ops.receptive_field.triton import launch as backend
from rfa_mmdet.ops.receptive_field.triton import operators
from tests.helpers.triton_aot import Compiled, Executed, Launch, compile_for, executed, widths

# An H100 SXM, from its data sheet.
MEMORY = 3.35e12  # bytes per second
CACHE = 5.5e12  # bytes per second of the L2 cache
CACHE_BYTES = 50e6
PROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
TENSOR_CORES = {torch.float32: 494e12, torch.bfloat16: 989e12}  # TF32, cuDNN's default
# Achieved fractions: of the tensor cores' peak, by cuDNN and cuBLAS; and of the issue slots of a
# scheduler. A single warp can issue at most every second cycle.
PRODUCTS = 0.6
ISSUE = 0.75
ALONE = 2
START = 2e-6  # seconds of an empty kernel, back to back
HOST = 2.5e-6  # seconds that the CPU needs per launch

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = [
    (torch.bfloat16, "channels_last"),
    (torch.bfloat16, "NCHW"),
    (torch.float32, "channels_last"),
    (torch.float32, "NCHW"),
]
BATCH = 2
COMPILED: dict[tuple, "Kernel"] = {}
PRODUCT = ("mm", "addmm", "bmm", "baddbmm")
NO_LAUNCH = (
    *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    *("detach", "_unsafe_view"),
)


@dataclass(frozen=True)
class Kernel:
    """A compiled launch, and what one of its warps does."""

    compiled: Compiled
    executed: Executed
    sectors: dict[str, int]  # sectors of 32 bytes read or written, by argument


@dataclass(frozen=True)
class Step:
    """The work of a launch."""

    name: str
    memory: float  # bytes
    cache: float
    computing: float = 0.0  # seconds
    instructions: float = 0.0  # over all threads
    kernel: Kernel | None = None

    @property
    def seconds(self) -> float:
        """Time of the slowest resource."""
        return max(START, self.memory / MEMORY, self.cache / CACHE, self.computing)


def nbytes(tensor: Tensor) -> int:
    """Return the size of a tensor in bytes."""
    return tensor.numel() * tensor.element_size()


class Recorder(TorchDispatchMode):
    """Records the launches of operators that run on meta tensors.

    Args:
        outside (list[Tensor]): Tensors that are read from memory. Small intermediate tensors are
            assumed to stay in the cache.
    """

    def __init__(self, outside: list[Tensor]) -> None:
        super().__init__()
        self.outside = {t.untyped_storage()._cdata for t in outside}
        self.keep = outside  # keeps tensors alive, so that identities stay unique
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operator and record it."""
        name = func._schema.name.partition("::")[2].rstrip("_")
        if func.namespace == "rfa_mmdet":
            with self, mock.patch.object(backend, "launch", self.launch):
                args = [tuple(a) if isinstance(a, list) else a for a in args]
                return getattr(operators, name)(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        outs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        self.keep += outs
        if func.is_view or name in NO_LAUNCH or not outs:
            return result
        ins = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]
        computing = 0.0
        if name in PRODUCT:
            a, b = ins[-2:]
            computing = 2 * a.numel() * b.shape[-1] / (PRODUCTS * TENSOR_CORES[a.dtype])
        memory = sum(nbytes(t) for t in ins + outs if self.from_memory(t))
        self.steps.append(Step(name, memory, sum(map(nbytes, ins + outs)), computing))
        return result

    def from_memory(self, tensor: Tensor) -> bool:
        """Return whether a tensor is not in the cache: an input, or too large."""
        storage = tensor.untyped_storage()
        return storage._cdata in self.outside or storage.nbytes() > CACHE_BYTES / 2

    def launch(self, kernel, grid, x, arguments, constants) -> None:
        """Replace ``launch.launch``."""
        launch = Launch(kernel, tuple(grid), tuple(arguments), constants)
        found = look_at(launch)
        compiled, warp = found.compiled, found.executed.total
        programs = prod(grid)
        memory = cache = 0
        for name, tensor in launch.tensors().items():
            moved = 32 * found.sectors[name] * compiled.warps * programs
            cache += moved
            if self.from_memory(tensor):
                memory += min(moved, nbytes(tensor))
        # Warps of the busiest scheduler.
        warps = ceil(programs / PROCESSORS) * compiled.warps / SCHEDULERS
        computing = warp * max(warps / ISSUE, ALONE) / CLOCK
        instructions = 32 * warp * compiled.warps * programs
        self.steps.append(Step(launch.name, memory, cache, computing, instructions, found))


def look_at(launch: Launch) -> Kernel:
    """Compile a launch, and trace a warp in the middle of its grid."""
    sizes = tuple(a for a in launch.arguments if not isinstance(a, Tensor))
    key = (launch.key(), launch.grid, sizes)
    if key not in COMPILED:
        compiled = compile_for(90, launch)
        accesses = compiled.accesses()
        # A warp's repeated reads hit its L1 cache.
        touched: dict[tuple[str, bool], set[int]] = defaultdict(set)
        for access in accesses:
            if len(access.addresses):
                touched[compiled.tensor_of(access), access.store].update(access.sectors.tolist())
        sectors: dict[str, int] = defaultdict(int)
        for (name, _), found in touched.items():
            sectors[name] += len(found)
        COMPILED[key] = Kernel(compiled, executed(compiled, accesses), sectors)
    return COMPILED[key]


def layer(size: InputSize, dtype: torch.dtype, layout: str, training: bool) -> list[Step]:
    """Return the launches of an RFAConv with as many outputs as inputs.

    For inference, or for a training step with batch statistics.
    """
    c, k = size.channels, 9

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=training)

    x = empty(size.batch, c, size.height, size.width, dtype=dtype).detach()
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_(training)
    feature, attention, shift = empty(c * k, 1, 3, 3), empty(c * k, 1, 1, 1), empty(c * k)
    norm = [empty(c * k), empty(c * k)]
    weight = empty(c, c, 3, 3)
    window = Window((3, 3), (size.stride,) * 2, (1, 1))
    inputs = [x, feature, attention, *norm, weight]
    outside = [t.detach() for t in (*inputs, shift)]
    with Recorder(outside) as recorder:
        if training:
            x, feature, shift, *_ = fold_batch_norm(x, feature, *norm, 1e-5, window)
        y = WindowFeatures(x, feature, shift, True, window).attend(attention, weight, None, 1)
        recorder.outside.add(y.untyped_storage()._cdata)
        if training:
            gradient = torch.empty_like(y)
            recorder.outside.add(gradient.untyped_storage()._cdata)
            torch.autograd.grad(y, inputs, gradient)
    return recorder.steps


def plain(size: InputSize, dtype: torch.dtype, training: bool) -> list[Step]:
    """Return the launches of the plain convolution; for training, also those of its gradients."""
    c, window = size.channels, Window((3, 3), (size.stride,) * 2, (1, 1))
    positions = size.batch * prod(window.output_size((size.height, size.width)))
    numbers = size.batch * c * size.height * size.width + positions * c + 9 * c * c
    moved = numbers * torch.empty((), dtype=dtype).element_size()
    computing = 2 * positions * c * 9 * c / (PRODUCTS * TENSOR_CORES[dtype])
    return [Step("convolution", moved, moved, computing)] * (3 if training else 1)


def seconds(steps: list[Step]) -> float:
    """Return the total time, limited by the GPU or by the CPU's launches."""
    return max(sum(step.seconds for step in steps), HOST * len(steps))


def times(dtype: torch.dtype, layout: str, sizes: Sequence[InputSize]) -> list[str]:
    """Return the rows of the table of times, with geometric means."""
    rows = [
        "| input | plain forward, µs | RFAConv | ratio | plain forward + backward, µs | RFAConv "
        "| ratio | launches, forward | and backward |",
        "| --- " + "| ---: " * 8 + "|",
    ]
    ratios: tuple[list[float], list[float]] = ([], [])
    for size in sizes:
        row, launches = [str(size)], []
        for training in (False, True):
            steps = layer(size, dtype, layout, training)
            base, own = seconds(plain(size, dtype, training)), seconds(steps)
            ratios[training].append(own / base)
            row += [f"{base * 1e6:.0f}", f"{own * 1e6:.0f}", f"{own / base:.1f}"]
            launches.append(str(len(steps)))
        rows.append("| " + " | ".join(row + launches) + " |")
    forward, both = (f"{geometric_mean(of_mode):.1f}" for of_mode in ratios)
    rows.append(f"| geometric mean | | | {forward} | | | {both} | | |")
    return rows


def kernels(dtype: torch.dtype, layout: str, size: InputSize) -> list[str]:
    """Return the rows of the table of a training step's compiled kernels."""
    window = Window((3, 3), (size.stride,) * 2, (1, 1))
    elements = BATCH * size.channels * prod(window.output_size((size.height, size.width)))
    rows = [
        "| kernel | launches | µs | registers | spilled, bytes | shared memory, bytes "
        "| instructions per element | of these in the main loop | cache bytes per element "
        "| memory bytes per element | bytes per lane of loads and stores |",
        "| --- " + "| ---: " * 9 + "| --- |",
    ]
    by_name: dict[str, list[Step]] = defaultdict(list)
    for step in layer(size, dtype, layout, True):
        by_name[step.name if step.kernel or step.name in PRODUCT else "other operators"].append(
            step
        )
    for name, steps in by_name.items():
        row = [name, str(len(steps)), f"{sum(step.seconds for step in steps) * 1e6:.0f}"]
        kernel = steps[0].kernel
        if kernel is None:
            row += [""] * 5
        else:
            own, all_ = kernel.executed, sum(step.instructions for step in steps) / elements
            of_loop = all_ * own.loop * own.trips / own.total
            row += map(str, (kernel.compiled.registers, kernel.compiled.spilled))
            row += [str(kernel.compiled.shared), f"{all_:.0f}", f"{of_loop:.0f}"]
        row += [f"{sum(step.cache for step in steps) / elements:.0f}"]
        row += [f"{sum(step.memory for step in steps) / elements:.0f}"]
        found = widths(kernel.compiled) if kernel else {}
        row += [", ".join(f"{n} {what}" for what, n in sorted(found.items()))]
        rows.append("| " + " | ".join(row) + " |")
    return rows


ASSUMPTIONS = f"""\
Modelled, not measured: no GPU ran this. RFAConv with 3 x 3 windows, batch norm and as many outputs
as inputs, on {BATCH} images of 800 x 1333. Forward is inference; forward + backward uses batch
statistics. Assumptions about an H100:

- {MEMORY / 1e12:.2f} TB/s from memory, and {CACHE / 1e12:.1f} TB/s from the L2 cache, which holds
  intermediate tensors of up to {CACHE_BYTES / 2e6:.0f} MB;
- {PROCESSORS} x {SCHEDULERS} schedulers at {CLOCK / 1e9:.3f} GHz that use {ISSUE:.0%} of their
  issue slots; a single warp uses one slot in {ALONE};
- cuDNN and cuBLAS reach {PRODUCTS:.0%} of the tensor cores' peak (float32: TF32), and cuDNN
  converts NCHW for free;
- a launch takes as long as its slowest resource, at least {START * 1e6:.0f} µs, and the CPU
  needs at least {HOST * 1e6:.1f} µs per launch.
"""


def parse_args(argv: Sequence[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example:\n  python -m benchmarks.modelled --table benchmarks/modelled.md",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", type=Path, help="Markdown to write; default: print it")
    parser.add_argument(
        "--shapes", type=int, default=7, metavar="N", help="model only the first N shapes"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Model all shapes, and print the tables."""
    args = parse_args(sys.argv[1:])
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("TRITON_INTERPRET is set; unset it, so that kernels are compiled")
    sizes = [replace(size, batch=BATCH) for size in SIZES["r50-800x1333"]][: args.shapes]
    lines = [ASSUMPTIONS]
    for dtype, layout in CASES:
        name = f"{str(dtype).removeprefix('torch.')}, {layout}"
        lines += [f"## {name}", "", *times(dtype, layout, sizes), ""]
        lines += [f"Kernels of {sizes[0]}, forward + backward:", ""]
        lines += [*kernels(dtype, layout, sizes[0]), ""]
        print(f"{name}: done", file=sys.stderr)
    text = "\n".join(lines)
    if args.table:
        with written_whole(args.table) as part:
            part.write_text(text, encoding="utf-8")
        print(f"wrote: {args.table}")
    else:
        print(text, end="")


if __name__ == "__main__":
    with user_errors(UserError):
        main()
