"""Shared by tests of the accelerated backends."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.ops.receptive_field.backends import missing
from tests.helpers.formulas import Case
from tests.helpers.paths import ROOT


def require(backend: str) -> None:
    """Skip if the backend is not possible; a CPU backend that can be built must exist."""
    reason = missing(backend)
    if not reason:
        return
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if backend == "cpu" and compiler and os.environ.get("RFA_MMDET_BUILD") != "0":
        pytest.fail(f"{reason}; or in place, `python setup.py build_ext --inplace`")
    pytest.skip(reason)


def copy_without_kernels(folder: Path) -> None:
    """Copy the package without its C++ kernels."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "_cpu_*.stamp")
    shutil.copytree(ROOT / "rfa_mmdet", folder / "rfa_mmdet", ignore=built)


def build(case: Case, **kwargs) -> RFAConv:
    return case.build(RFAConv, act_cfg=case.act and dict(type=case.act), **kwargs)


def run(layer: nn.Module, x: Tensor, seed: int = 0) -> list[Tensor]:
    """Return output and gradients of input and parameters for a random upstream gradient."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(y.shape, generator=generator).to(y.dtype)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)]
