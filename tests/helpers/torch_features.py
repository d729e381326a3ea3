"""Features that tests need and this environment's torch may lack."""

import warnings
from importlib import metadata

import pytest
import torch
from packaging.version import Version

from rfa_mmdet.ops.common.torch_versions import COMPILES_OPERATORS


def _autocasts(dtype: torch.dtype) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.autocast("cpu", dtype=dtype)._enabled


def _convolves(dtype: torch.dtype) -> bool:
    try:
        torch.nn.Conv2d(1, 1, 1, dtype=dtype)(torch.zeros(1, 1, 1, 1, dtype=dtype))
    except RuntimeError:
        return False
    return True


HALF = (torch.bfloat16, torch.float16)
# Half precision dtypes of autocast and of convolutions on a CPU: torch 2.1 only has bfloat16.
AUTOCAST_TYPES = [dtype for dtype in HALF if _autocasts(dtype)]
CONV_TYPES = [dtype for dtype in HALF if _convolves(dtype)]
FILLS_MEMORY = hasattr(torch.utils, "deterministic")  # 2.2


def _lacks_triton() -> str | None:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed"
    # Checked without importing it: Triton 2.1 fails to import with some versions of setuptools.
    return None if Version(version) >= Version("3.4") else f"Triton {version} is too old"


LACKS_TRITON = _lacks_triton()

compiles_operators = pytest.mark.skipif(not COMPILES_OPERATORS, reason="needs torch 2.4")
fills_memory = pytest.mark.skipif(not FILLS_MEMORY, reason="needs torch 2.2")
has_opcheck = pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="needs torch 2.4")
exports = pytest.mark.skipif(
    not hasattr(torch, "export") or not hasattr(torch.export, "Dim"), reason="needs torch 2.2"
)
