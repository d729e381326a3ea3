"""Checks of the receptive-field layers on a device, run as steps by benchmarks/gpu.py.

compile: compile the kernels of all measured layers in parallel, to keep it out of later steps.
cases: every layer forward and backward on small inputs, e.g. under compute-sanitizer.
graphs: the layers compute the same in CUDA graphs as without.
training: tools/train.py on drawn shapes; the loss must fall.
"""

import copy
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.candidates import build
from benchmarks.parity import PARITY_SHAPES, inference, make_input, outputs_and_gradients
from benchmarks.sizes import SIZES, InputSize
from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.cpus import available_cpus
from rfa_mmdet.data.shapes import make_shapes
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

ROOT = Path(__file__).resolve().parents[1]
OPS = ("RFAConv", "RFCBAMConv", "RFCAConv")
SHAPES = (InputSize(2, 16, 9, 7), InputSize(1, 64, 13, 10, 2))
CONFIG = "configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py"
TOLERANCE = 1e-3  # rounding of TF32 when the same kernels run in another order


def layers(device: torch.device) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield name, layer and input, for every layer, small shape and memory format."""
    for op in OPS:
        for shape in SHAPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                layer = build(op, shape).to(device, memory_format=layout)
                x = make_input(shape, torch.float32, device).contiguous(memory_format=layout)
                yield f"{op} {shape} {str(layout).removeprefix('torch.')}", layer, x


def compile_kernels(device: torch.device) -> str:
    """Run every layer on all sizes that later steps use, in parallel processes.

    Returns:
        str: The number of processes that ran; Triton keeps what they compiled.
    """
    halves = (None, torch.bfloat16)
    layouts = (torch.contiguous_format, torch.channels_last)
    jobs = [
        *itertools.product(OPS, halves, layouts),
        ("RFAConv", torch.float16, torch.contiguous_format),  # of the RetinaNet
    ]
    processes = min(len(jobs), available_cpus())
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(processes, context) as pool:
        for future in [pool.submit(_run_sizes, device, *job) for job in jobs]:
            future.result()
    return f"{len(jobs)} combinations of layer, dtype and layout in {processes} processes"


def _run_sizes(
    device: torch.device, op: str, half: torch.dtype | None, layout: torch.memory_format
) -> None:
    torch.set_num_threads(1)
    for shape in (*SHAPES, *PARITY_SHAPES, *SIZES["gpu" if device.type == "cuda" else "tiny"]):
        layer = build(op, shape).to(device, memory_format=layout)
        x = make_input(shape, torch.float32, device).contiguous(memory_format=layout)
        inference(layer, x, half)
        outputs_and_gradients(layer, x, True, half)


def check_cases(device: torch.device) -> str:
    """Run every layer in both modes, in float32 and bfloat16; return a summary.

    Raises:
        UserError: If an output or gradient is not finite.
    """
    count = 0
    for name, layer, x in layers(device):
        for half in (None, torch.bfloat16):
            values = {
                "evaluation": inference(layer, x, half),
                "training": outputs_and_gradients(layer, x, True, half),
            }
            for mode, found in values.items():
                for key, value in found.items():
                    if not value.isfinite().all():
                        raise UserError(
                            f"{name}, {half or torch.float32}, {mode}: {key}: not finite"
                        )
            count += len(values)
    return f"{count} small cases"


def check_graphs(device: torch.device) -> str:
    """Capture inference and a training step of every layer, and replay them with another input.

    Raises:
        UserError: If a replay differs from the layer without a graph.
    """
    count = 0
    for name, layer, x in layers(device):
        other = torch.rand_like(x)
        held = x.clone()
        layer.eval()
        with torch.no_grad():
            graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                layer(held)  # compile and allocate before the capture
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                output = layer(held)
            held.copy_(other)
            graph.replay()
            _compare(f"{name}, evaluation", {"output": output}, {"output": layer(other)})
        eager = copy.deepcopy(layer)
        sample = x.clone().requires_grad_()
        graphed = torch.cuda.make_graphed_callables(layer.train(), (sample,))
        found = outputs_and_gradients(graphed, other, True, None)
        _compare(f"{name}, training", found, outputs_and_gradients(eager, other, True, None))
        count += 2
    return f"{count} graphs"


def _compare(what: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        error = float((found[key] - value).norm() / value.norm().clamp_min(1e-6))
        if not error <= TOLERANCE:  # NaN counts
            raise UserError(f"{what}: {key} in a CUDA graph: error {error:.1e}")


def check_training(device: torch.device, tiny: bool, out: Path) -> str:
    """Train a small detector with RFAConv on drawn shapes, and write times and losses to ``out``.

    Raises:
        UserError: If the tool fails, or the loss is not finite or does not fall.
    """
    images, size, epochs = (24, 64, 3) if tiny else (480, 160, 3)
    with TemporaryDirectory() as folder:
        make_shapes(f"{folder}/shapes", images, images // 6, (size, size), max_objects=3)
        options = [
            f"train_cfg.max_epochs={epochs}",
            "default_hooks.logger.interval=1",
            "model.test_cfg.score_thr=0.0",  # without detections there are no metrics
        ]
        command = [sys.executable, "tools/train.py", CONFIG, "--work-dir", f"{folder}/run"]
        environment = {**os.environ, "DATA_ROOT": f"{folder}/shapes"}
        if device.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run([*command, "--cfg-options", *options], cwd=ROOT, env=environment)
        if done.returncode:
            raise UserError(f"tools/train.py failed with exit code {done.returncode}")
        (path,) = Path(folder, "run").glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    first, last = steps[0]["loss"], steps[-1]["loss"]
    found = {
        "config": CONFIG,
        "iterations": len(steps),
        "first_loss": first,
        "last_loss": last,
        "seconds_of_an_iteration": median(line["time"] for line in steps),
        "ap50": lines[-1].get("coco/bbox_mAP_50"),
    }
    with written_whole(out) as part:
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not all(math.isfinite(line["loss"]) for line in steps) or not last < first:
        raise UserError(f"the loss went from {first:.3f} to {last:.3f}")
    return f"{len(steps)} iterations, loss {first:.3f} to {last:.3f}"


def main() -> None:
    """Run a check; the last line printed summarises it."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["compile", "cases", "graphs", "training"])
    parser.add_argument("--device", type=torch.device, default="cuda", help="(%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="training: only a few iterations")
    parser.add_argument("--out", type=Path, help="training: JSON to write")
    args = parser.parse_args()
    if args.check == "training":
        if not args.out:
            parser.error("training needs --out")
        print(check_training(args.device, args.tiny, args.out))
    else:
        checks = {"compile": compile_kernels, "cases": check_cases, "graphs": check_graphs}
        print(checks[args.check](args.device))


if __name__ == "__main__":
    with user_errors(UserError):
        main()
