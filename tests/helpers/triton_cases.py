"""Test cases of the Triton kernels: inputs, the formula in float64, and the device."""

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field import WindowFeatures, backends, fold_batch_norm
from tests.helpers.paths import ROOT

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None

runs = pytest.mark.skipif(
    DEVICE is None, reason="no CUDA device; in_the_interpreter() runs this without one"
)
# Factors on the tolerances: the interpreter does not use TF32; half precision also rounds the units
# and their gradients.
SHARE = {
    torch.float32: 0.2 if INTERPRETED else 1,
    torch.float16: 2,
    torch.bfloat16: 2,
}


@functools.cache
def register_instead_of_cpu_kernels() -> None:
    from rfa_mmdet.ops.receptive_field.triton import operators

    backends.check_backend("cpu")
    operators.register("CPU")


def in_the_interpreter(selection: str, least: int, *files: str | Path) -> None:
    """Run tests of files in Triton's interpreter, and check that there are at least ``least``.

    Uses a separate process, because Triton reads TRITON_INTERPRET when it is imported, which torch
    may do early.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)  # those of this session, such as deselected tests
    done = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1900,  # less than faulthandler_timeout, which would end this session
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= least, done.stdout


@dataclass(frozen=True)
class Case:
    batch: int = 2
    channels: int = 2
    outputs: int = 3
    size: tuple = (5, 4)
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    relu: bool = True
    bias: bool = True
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0

    @property
    def window(self) -> tuple:
        return self.kernel, self.stride, self.padding, self.dilation

    def make(self) -> dict[str, Tensor | None]:
        """Return the inputs; x is part of a larger tensor of NaN, to detect reads outside of x."""
        random = torch.Generator().manual_seed(0)
        c, k = self.channels, self.kernel[0] * self.kernel[1]

        def normal(*shape):
            return torch.randn(shape, generator=random)

        height, width = self.size
        if self.channels_last:  # dense, because that determines the layout; NaN before and after
            whole = torch.full((self.batch + 2, height, width, c), torch.nan)
            x = whole[1:-1].permute(0, 3, 1, 2)
        else:
            whole = torch.full((self.batch + 1, c + 1, height + 2, width + 3), torch.nan)
            x = whole[1:, :c, 1:-1, 1:-2]
        whole = whole.to(self.dtype).to(DEVICE)
        x = whole.as_strided(x.shape, x.stride(), x.storage_offset())
        x.copy_(normal(*x.shape) * self.magnitude)
        return dict(
            x=x,
            # Logits do not depend on the magnitude.
            attention=(normal(c * k, 1, 1, 1) / self.magnitude).to(DEVICE),
            feature=(normal(c * k, 1, *self.kernel) / self.magnitude).to(DEVICE),
            shift=normal(c * k).to(DEVICE),
            weight=normal(self.outputs, c // self.groups, *self.kernel).to(self.dtype).to(DEVICE),
            bias=normal(self.outputs).to(self.dtype).to(DEVICE) if self.bias else None,
        )

    def forward(self, x, attention, feature, shift, weight, bias) -> Tensor:
        """Evaluate the formula in any dtype."""
        u = windows(x, self)  # (B, C, K, P)
        c, k = self.channels, u.shape[2]
        logits = attention.view(c, k, 1) * u.mean(2, keepdim=True)
        f = torch.einsum("cij,bcjp->bcip", feature.view(c, k, k), u) + shift.view(c, k, 1)
        f = torch.where(f > 0, f, 0.0) if self.relu else f
        u = (f * torch.softmax(logits, 2)).unflatten(1, (self.groups, -1))
        w = weight.flatten(2).unflatten(0, (self.groups, -1))
        y = torch.einsum("goci,bgcip->bgop", w, u).flatten(1, 2)
        y = y if bias is None else y + bias[:, None]
        return y.unflatten(2, out_size(self))


def out_size(case: Case) -> tuple[int, int]:
    one = torch.empty(1, 1, *case.size, device="meta")
    kernel = torch.empty(1, 1, *case.kernel, device="meta")
    out = F.conv2d(one, kernel, None, case.stride, case.padding, case.dilation)
    return tuple(out.shape[2:])


def in_chunks(case: Case, rows: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Limit chunks to a number of output rows, and count the launches of each kernel."""
    from rfa_mmdet.ops.receptive_field.triton import chunks, launch

    row_bytes = prod(case.kernel) * case.channels * out_size(case)[1] * case.dtype.itemsize
    run, launched = launch.launch, Counter()

    def count(kernel, *others):
        launched[kernel.fn.__name__] += 1
        run(kernel, *others)

    monkeypatch.setattr(chunks, "CHUNK_BYTES", rows * row_bytes)
    monkeypatch.setattr(launch, "launch", count)
    return launched


KINDS = ("attention", "channels", "rows")


def train(kind: str, inputs: dict[str, Tensor], window: Window) -> list[Tensor]:
    """Return output and batch statistics of a layer in training.

    ``kind`` selects the weights of the features: RFAConv's attention, channel and position gates,
    or row and column gates.
    """
    x, weight, bias = (inputs[name] for name in ("x", "weight", "bias"))
    norm = inputs["scale"], inputs["offset"]
    same, feature, shift, *statistics = fold_batch_norm(x, inputs["feature"], *norm, 1e-5, window)
    features = WindowFeatures(same, feature, shift, True, window)
    if kind == "attention":
        return [features.attend(inputs["attention"], weight, bias, 1), *statistics]
    if kind == "channels":
        gates = x.mean((2, 3)), features.max_and_mean().mean(1)
    else:
        gates = features.coordinate_means()
    gates = tuple(gate.to(torch.float32).sigmoid() for gate in gates)
    return [features.convolve(gates, weight, bias, 1), *statistics]


def windows(x: Tensor, case: Case) -> Tensor:
    u = F.unfold(x, case.kernel, case.dilation, case.padding, case.stride)
    return u.unflatten(1, (x.shape[1], -1))


def exact(inputs: dict) -> dict:
    """Return the inputs in float64 on the CPU, requiring gradients."""
    return {
        name: None if t is None else t.detach().cpu().double().requires_grad_()
        for name, t in inputs.items()
    }


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert found.isfinite().all()
    expected = expected.detach()
    largest = expected.abs().max().clamp_min(1e-30)
    return float((found.cpu().double() - expected).abs().max() / largest)


def names(case: Any) -> str:
    if not isinstance(case, Case):
        return str(case)
    changed = (f"{k}={v}" for k, v in vars(case).items() if v != getattr(Case(), k))
    return " ".join(changed).replace("torch.", "") or "plain"
