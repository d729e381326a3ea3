"""Which implementation of an operator runs: the plain-torch reference, or an accelerated one."""

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from rfa_mmdet.ops.common.precision import autocast_dtype
from rfa_mmdet.ops.common.recompute import reference_only

BACKENDS = ("auto", "reference", "cpu", "triton")
_MODULES = {
    "cpu": "rfa_mmdet.ops.receptive_field.cpu",
    "triton": "rfa_mmdet.ops.receptive_field.triton.launch",
}
_AUTO = {"cpu": "cpu", "cuda": "triton"}  # by the type of the device
_AUTO_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
BUILD_ADVICE = (
    "build it with `make env`, or with `pip install --no-build-isolation` of this package where a "
    "C++ compiler and torch are installed"
)


def load_backend(name: str) -> ModuleType:
    """Import the module of an accelerated backend.

    Args:
        name (str): 'cpu' or 'triton'; must be available.
    """
    return importlib.import_module(_MODULES[name])


@torch.compiler.assume_constant_result  # torch.compile calls it, and looks no further
def missing(name: str) -> str | None:
    """Tell why a backend cannot be used in this process.

    Args:
        name (str): Of :data:`BACKENDS`.

    Returns:
        str | None: The reason and the remedy. None: it can.

    Example:
        >>> missing("reference")
    """
    return _missing(name)


@functools.cache
def _missing(name: str) -> str | None:
    if name == "cpu":
        reason = load_backend("cpu").load()
        return reason and f"{reason}: {BUILD_ADVICE}"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        if importlib.util.find_spec(_MODULES["triton"]) is None:
            return "this version has no Triton kernels"
        if not (torch.cuda.is_available() or _interpreted()):
            return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels without, slowly)"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_backend(name: str) -> str:
    """Check a user's choice as far as that can be done without an input.

    Args:
        name (str): Of :data:`BACKENDS`.

    Returns:
        str: The same.

    Raises:
        ValueError: There is no such backend.
        RuntimeError: It cannot be used in this process.

    Example:
        >>> check_backend("auto")
        'auto'
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: must be one of {BACKENDS}")
    reason = missing(name)
    if reason:
        raise RuntimeError(f"backend={name!r}: {reason}")
    return name


def choose_backend(name: str, x: Tensor, weight: Tensor) -> str:
    """Choose the backend for an input.

    Args:
        name (str): The user's choice, checked by :func:`check_backend`.
        x (Tensor): (B, C, H, W).
        weight (Tensor): Of the convolution.

    Returns:
        str: 'reference', 'cpu' or 'triton'.

    Raises:
        ValueError: The backend asked for by name does not run on the device of ``x``.
        TypeError: It does not compute in the type of ``x``.
        RuntimeError: It is not available in this process.

    Example:
        >>> choose_backend("auto", torch.ones(1, 1, 3, 3).double(), torch.ones(1, 1, 3, 3).double())
        'reference'
    """
    if name == "reference" or reference_only():
        return "reference"
    device, dtype = x.device.type, autocast_dtype(x)
    if name == "auto":
        chosen = _AUTO.get(device)
        fits = dtype in _AUTO_DTYPES and dtype in _DTYPES.get(chosen, ())
        if not fits or weight.device != x.device or autocast_dtype(weight) != dtype:
            return "reference"
        if missing(chosen):
            _notice(chosen)
            return "reference"
        return chosen
    check_backend(name)  # again: the layer may come from another process
    wanted = ("cpu",) if name == "cpu" else ("cuda", "cpu") if _interpreted() else ("cuda",)
    if device not in wanted:
        raise ValueError(f"backend={name!r}: the input must be on {wanted[0]}, not on {x.device}")
    if dtype not in _DTYPES[name]:
        raise TypeError(
            f"backend={name!r}: the input must be of one of {_DTYPES[name]}, not {dtype}"
        )
    if autocast_dtype(weight) != dtype or weight.device != x.device:
        raise TypeError(
            f"backend={name!r}: the input is {x.dtype} on {x.device}, the weight {weight.dtype} on "
            f"{weight.device}; they must be the same"
        )
    return name


@torch.compiler.assume_constant_result
def _notice(name: str) -> None:
    """Say once that the slow way is taken."""
    if name not in _noticed:
        _noticed.add(name)
        warnings.warn(
            "the receptive-field convolutions run in plain torch, several times slower: "
            f"{missing(name)}",
            stacklevel=2,
        )


_noticed: set[str] = set()
