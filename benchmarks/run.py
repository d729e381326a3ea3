"""Measure the ops of this package against the authors' formulas and the plain convolution.

Measures the time of inference and of forward + backward, the bytes kept for the backward pass, and
peak memory, with all candidates in one process, in alternation. First compares an op's outputs and
gradients with the formula; an op that does not match is reported and not timed, and the exit code
is 1. Writes JSON, which benchmarks/report.py turns into a table and a plot.
"""

import dataclasses
import json
import math
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.baselines import Formula, plain_conv
from benchmarks.candidates import OPS, builders, is_plugin
from benchmarks.detector import measure_detector
from benchmarks.measure import interleaved, peak_bytes, ratio, saved_bytes, spread
from benchmarks.parity import PARITY_SHAPES, differences, make_input
from benchmarks.sizes import SIZES, InputSize
from rfa_mmdet.analysis.machine import describe_machine
from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def parse_args(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example:\n  python -m benchmarks.run --ops RFAConv SE --shapes small "
        "--device cpu --dtype float32 --threads 2 --out benchmarks/results/cpu.json",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--ops",
        nargs="*",
        choices=OPS,
        default=list(OPS),
        metavar="OP",
        help=f"any of {', '.join(OPS)} (default: all); without a value: only the detector",
    )
    add(
        "--shapes",
        nargs="+",
        choices=SIZES,
        default=["r50-800x1333", "r50-512x512", "small"],
        help="lists of shapes (default: all but few, gpu and tiny)",
    )
    add(
        "--kernel-size",
        type=int,
        default=3,
        metavar="K",
        help="for every op (default: %(default)s)",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="half precision uses autocast")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--channels-last", action="store_true", help="memory format of inputs and convolutions")
    add(
        "--compile",
        nargs="*",
        choices=OPS,
        metavar="OP",
        help="also time the formulas of these ops (default: all) with torch.compile; takes up to a "
        "minute more per shape",
    )
    add(
        "--seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="time for each mode of each shape (default: %(default)s)",
    )
    add("--rounds", type=int, default=3, help="minimum number of rounds (default: %(default)s)")
    add(
        "--stop-after",
        type=float,
        default=math.inf,
        metavar="S",
        help="after S seconds, start nothing new and list what is left (default: no limit)",
    )
    add(
        "--candidate",
        action="append",
        default=[],
        metavar="OP=MODULE:CLASS",
        help="also time another class that takes the arguments of OP",
    )
    add(
        "--detector",
        type=int,
        default=0,
        metavar="SIZE",
        help="also time a training iteration of RetinaNet R50-FPN on images of SIZE x SIZE, plain "
        "and with RFAConv",
    )
    add("--out", type=Path, required=True, help="JSON to write; creates its folder")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error(f"--rounds {args.rounds} --threads {args.threads}: must be at least 1")
    if args.kernel_size < 1 or args.kernel_size % 2 == 0:
        parser.error(f"--kernel-size {args.kernel_size}: must be odd")
    if args.detector and (args.detector < 64 or args.detector % 32):
        parser.error(f"--detector {args.detector}: must be a multiple of 32, at least 64")
    args.compile = () if args.compile is None else tuple(args.compile or args.ops)
    if left_out := set(args.compile) - set(args.ops):
        parser.error(f"--compile {' '.join(sorted(left_out))}: is not among --ops")
    try:
        args.device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device {args.device}: must be cpu or cuda")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no CUDA device here")
    others = [c.partition("=") for c in args.candidate]
    for op, _, name in others:
        if op not in args.ops or ":" not in name:
            parser.error(f"--candidate {op}={name}: must be OP=MODULE:CLASS with OP in --ops")
    args.candidate = {op: name for op, _, name in others}
    return args


class Case:
    """One op and one shape: the modules to time in alternation, and their input.

    Args:
        op (str): Name of the op.
        shape (InputSize): Size of the input.
        layers (dict[str, nn.Module]): The candidates, on their device.
        args (Namespace): The command line.
    """

    def __init__(
        self, op: str, shape: InputSize, layers: dict[str, nn.Module], args: Namespace
    ) -> None:
        self.device, dtype = args.device, DTYPES[args.dtype]
        self.half = dtype if dtype in (torch.bfloat16, torch.float16) else None
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        formula = Formula(op, next(iter(layers.values())))
        plain = plain_conv(shape.channels, shape.stride, shape.kernel_size)
        modules = {"plain": plain, "formula": formula, **layers}
        weights = torch.float32 if self.half else dtype
        self.modules = {
            name: module.to(self.device, weights).to(memory_format=layout)
            for name, module in modules.items()
        }
        self.compiled = {}
        if op in args.compile:
            torch._dynamo.reset()  # compile for this shape, not a dynamic one
            self.compiled = {"compiled formula": torch.compile(self.modules["formula"])}
        self.x = make_input(shape, dtype, self.device).to(memory_format=layout)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run a module, with autocast for half precision."""
        with torch.autocast(self.device.type, dtype=self.half, enabled=self.half is not None):
            return module(x)

    def runs(self, training: bool) -> dict[str, Callable[[], object]]:
        """Return what to time in a mode, by name."""
        runs = {}
        for name, module in {**self.modules, **self.compiled}.items():
            module.train(training)
            runs[name] = self._step(module) if training else self._inference(module)
        return runs

    def _inference(self, module: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return self.forward(module, self.x)

        return run

    def _step(self, module: nn.Module) -> Callable[[], tuple]:
        x = self.x.detach().requires_grad_()
        with torch.no_grad():
            upstream = torch.randn_like(self.forward(module, self.x))
        inputs = [x, *module.parameters()]
        return lambda: torch.autograd.grad(self.forward(module, x), inputs, upstream)

    def saved(self) -> dict[str, int]:
        """Count the bytes that each module keeps for the backward pass."""
        x = self.x.detach().requires_grad_()
        return {
            name: saved_bytes(lambda module=module: self.forward(module.train(), x), module)
            for name, module in self.modules.items()
        }


def measure_case(case: Case, args: Namespace) -> dict:
    """Measure one op on one shape in both modes.

    Returns:
        dict: For each mode, times, ratios to the baselines and peak bytes; and the saved bytes.
    """
    result: dict = {"saved_bytes": case.saved()}
    for mode in ("inference", "training"):
        runs = case.runs(mode == "training")
        times = interleaved(runs, args.seconds, args.rounds, case.device)
        result[mode] = {
            "ratios": {
                name: {
                    baseline: ratio(times[name], times[baseline])
                    for baseline in ("plain", "formula", "compiled formula")
                    if baseline in times and baseline != name
                }
                for name in times
                if name != "plain"
            },
            "seconds": {name: {**spread(t), "rounds": len(t)} for name, t in times.items()},
            "peak_bytes": {name: peak_bytes(runs[name], case.device) for name in case.modules},
        }
    return result


def check(
    op: str, make: Callable[[InputSize], nn.Module], shapes: list[InputSize], args: Namespace
) -> list:
    """Compare a candidate with the formula in float64, on small shapes, then on the measured ones.

    Returns:
        list[str]: The differences, or the error that was raised; empty if the candidate matches.
    """
    dtype = DTYPES[args.dtype]
    try:
        found = []
        for shape in sized(parity_shapes(args.kernel_size), args):
            layer = make(shape).to(args.device, torch.promote_types(dtype, torch.float32))
            found += differences(op, layer, shape, dtype)
        for shape in () if found else shapes:
            layer = make(shape).to(args.device, torch.promote_types(dtype, torch.float32))
            found += differences(op, layer, shape, dtype, large=True)
    except Exception as error:  # candidates may raise anything
        found = [f"{type(error).__name__}: {error}"]
    return found


def parity_shapes(kernel_size: int) -> list[InputSize]:
    """Return the small shapes, with about the same number of features for any window.

    With many more, rounding might move one across ReLU's kink.
    """
    channels = 64 if kernel_size == 3 else 16
    return [dataclasses.replace(shape, channels=channels) for shape in PARITY_SHAPES]


def sized(shapes: Iterable[InputSize], args: Namespace) -> list[InputSize]:
    """Return the shapes with the kernel size of the command line."""
    return [dataclasses.replace(shape, kernel_size=args.kernel_size) for shape in shapes]


def main(argv: list[str]) -> int:
    """Measure according to the command line; return 1 if an op does not match its formula."""
    args = parse_args(argv)
    end = time.monotonic() + args.stop_after
    torch.set_num_threads(args.threads)
    shapes = sized((shape for name in args.shapes for shape in SIZES[name]), args)
    results, failed, missing, left_out = [], [], {}, []
    content = {
        **describe_machine(args.device),
        "device": args.device.type,
        "dtype": args.dtype,
        "threads": args.threads,
        "kernel_size": args.kernel_size,
        "channels_last": args.channels_last,
        "command": shlex.join(["python", "-m", "benchmarks.run", *argv]),
        "failed": failed,
        "not_available": missing,
        "no_time_left": left_out,
        "results": results,
        "detector": None,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Holds the results of an interrupted run.
    unfinished = args.out.with_name(f"{args.out.name}.unfinished")

    def keep() -> None:
        with written_whole(unfinished) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def is_over(*what: str) -> bool:
        if over := time.monotonic() >= end:
            left_out.extend(what)
        return over

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        own = {op: [s for s in shapes if s.stride == 1 or not is_plugin(op)] for op in args.ops}
        total = sum(map(len, own.values())) + bool(args.detector)
        task = progress.add_task("", total=total)
        for op in args.ops:
            progress.update(task, description=f"{op}: parity")
            if is_over(*(f"{op} {shape}" for shape in own[op])):
                continue
            makers, not_here = builders(op, args.candidate, args.device)
            missing |= not_here
            for name in list(makers):
                if reasons := check(op, makers[name], own[op], args):
                    del makers[name]
                    failed.append({"op": op, "candidate": name, "reasons": reasons})
                    keep()
            for shape in own[op]:
                progress.update(task, description=f"{op} {shape}")
                if makers and not is_over(f"{op} {shape}"):
                    layers = {name: make(shape) for name, make in makers.items()}
                    result = measure_case(Case(op, shape, layers, args), args)
                    results.append({"op": op, "shape": vars(shape), **result})
                    keep()
                progress.advance(task)
        if args.detector and not is_over("RetinaNet"):
            progress.update(task, description=f"RetinaNet {args.detector} x {args.detector}")
            content["detector"] = measure_detector(
                args.detector, args.device, DTYPES[args.dtype], 10 * args.seconds, args.rounds
            )
            progress.advance(task)
    keep()
    unfinished.replace(args.out)
    if left_out:
        print(f"no time left: {', '.join(left_out)}")
    for name, reason in missing.items():
        print(f"not available: {name}: {reason}")
    for failure in failed:
        print(
            f"error: {failure['candidate']} differs from the formula of {failure['op']}; not timed:"
        )
        print("".join(f"  {reason}\n" for reason in failure["reasons"][:6]), end="")
    print(f"wrote: {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    with user_errors(UserError):
        raise SystemExit(main(sys.argv[1:]))
