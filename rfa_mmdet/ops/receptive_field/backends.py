"""Which kernels are available, and whether a layer should call the operators.

PyTorch's dispatcher picks the kernel for the device, or plain torch, block by block, if there is
none. This module decides whether to call the operator at all or to evaluate the formula instead.
"""

import functools
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfa_mmdet.ops.common.precision import autocast_dtype
from rfa_mmdet.ops.common.recompute import needs_plain_operators
from rfa_mmdet.ops.common.torch_versions import (
    COMPILES_OPERATORS,
    constant_in_graphs,
    is_compiling,
)
from rfa_mmdet.ops.receptive_field import self_check
from rfa_mmdet.ops.receptive_field.schema import NAMESPACE, OPERATORS
from rfa_mmdet.ops.receptive_field.sources import digest

BACKENDS = ("auto", "reference", "cpu", "triton")
_DEVICES = {"cpu": "cpu", "triton": "cuda"}  # device type of each backend
_HALF = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float64), "triton": _HALF}
_AUTO = {device: name for name, device in _DEVICES.items()}
BUILD_ADVICE = (
    "build it with `make env`, or `pip install` this package with a C++ compiler and torch "
    "available"
)
OTHER_SOURCES = "the C++ extension was built from different sources"
REBUILD_ADVICE = "rebuild it with `make env` or `pip install -e .`"
CAPTURED = (
    "kernels cannot be compiled and checked during CUDA graph capture; run the layer once before "
    "capturing"
)
# torch requires one of these to multiply matrices under use_deterministic_algorithms(True).
DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")


def has_kernel(operator: str, backend: str) -> bool:
    """Return whether a backend implements an operator. Call :func:`missing` first to load it.

    Example:
        >>> has_kernel("gated_conv", "triton")
        False
    """
    key = _DEVICES[backend].upper()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", key))


@constant_in_graphs
def missing(backend: str) -> str | None:
    """Return why a backend cannot be used in this process.

    Args:
        backend (str): One of :data:`BACKENDS`.

    Returns:
        str | None: The reason and the fix; None if the backend is available.

    Example:
        >>> missing("reference")
    """
    return _missing(backend)


@functools.cache
def _missing(backend: str) -> str | None:
    if backend == "cpu":
        reason = load_cpu_kernels(Path(__file__).parent)
        return reason and f"{reason}: {REBUILD_ADVICE if reason == OTHER_SOURCES else BUILD_ADVICE}"
    if backend == "triton":
        if torch.version.hip is not None:
            return "the Triton kernels support NVIDIA GPUs only, and this torch is built for AMD"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        try:
            operators = "rfa_mmdet.ops.receptive_field.triton.operators"
            importlib.import_module(operators).register("CUDA")
        except Exception as error:  # torch pins the triton version, so do not suggest another
            if isinstance(error, ModuleNotFoundError) and error.name == "triton":
                name = "triton-windows" if sys.platform == "win32" else "triton"
                return f"triton is not installed: pip install {name}"
            return f"the Triton kernels cannot be imported ({type(error).__name__}: {error})"
    return None


def load_cpu_kernels(folder: Path) -> str | None:
    """Load the C++ kernels built for this torch and the CPU capability that it selects.

    Args:
        folder (Path): Folder with the libraries.

    Returns:
        str | None: Why they cannot be used; None if they are loaded.

    Example:
        >>> load_cpu_kernels(Path("/no/such"))
        'the C++ extension is not built'
    """
    capability = torch.backends.cpu.get_cpu_capability().lower()
    for name in dict.fromkeys((capability, "default")):
        file = folder / f"_cpu_{name}.torch-{torch.__version__}.so"
        if not file.exists():
            continue
        # Check before loading: kernels that do not match the schemas abort the process.
        if not _matches_sources(folder):
            return OTHER_SOURCES
        try:
            torch.ops.load_library(file)
        except OSError as error:
            return f"{file.name} does not load: {error}"
        if not all(has_kernel(operator, "cpu") for operator in OPERATORS):
            return OTHER_SOURCES
        return None
    built = {file.name.partition(".torch-")[2][:-3] for file in folder.glob("_cpu_*.so")}
    if built:
        others = ", ".join(sorted(built))
        return (
            f"the C++ extension was built for torch {others}, but this is torch {torch.__version__}"
        )
    return "the C++ extension is not built"


def _matches_sources(folder: Path) -> bool:
    """Return whether the stamp matches the sources; a wheel has no stamp and always matches."""
    stamp = folder / f"_cpu_default.torch-{torch.__version__}.stamp"
    if not stamp.exists():
        return True
    return stamp.read_text().partition(" ")[0] == digest(folder / "csrc")


def check_backend(backend: str, operators: tuple[str, ...] = ()) -> str:
    """Check the user's choice as far as possible without an input.

    Args:
        backend (str): One of :data:`BACKENDS`.
        operators (tuple[str, ...]): Operators that the layer calls.

    Returns:
        str: ``backend``.

    Raises:
        ValueError: If there is no such backend, or it does not implement an operator.
        RuntimeError: If the backend cannot be used in this process.

    Example:
        >>> check_backend("auto")
        'auto'
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {BACKENDS}")
    if backend in ("auto", "reference"):
        return backend
    reason = missing(backend)
    if reason:
        raise RuntimeError(f"backend={backend!r}: {reason}")
    absent = [operator for operator in operators if not has_kernel(operator, backend)]
    if absent:
        raise ValueError(
            f"backend={backend!r}: does not implement {', '.join(absent)}; use backend='auto', "
            "which falls back to plain torch"
        )
    return backend


def use_operators(backend: str, operators: tuple[str, ...], x: Tensor, weight: Tensor) -> bool:
    """Decide between the operators and the formula.

    Anything that inspects operators gets the formula: tracers, exporters, torch.func transforms,
    and modes that count or fake operators. So does float64, the reference for comparisons.

    Args:
        backend (str): The user's choice, checked by :func:`check_backend`.
        operators (tuple[str, ...]): Operators that the layer would call.
        x (Tensor): (B, C, H, W).
        weight (Tensor): Weight of the final convolution.

    Returns:
        bool: Whether to call the operators.

    Raises:
        ValueError: If the named backend does not support x's device.
        TypeError: If it does not support x's dtype.
        RuntimeError: If it cannot be used in this process, or failed its self-check.

    Example:
        >>> x, weight = torch.ones(1, 1, 3, 3).double(), torch.ones(1, 1, 3, 3).double()
        >>> use_operators("auto", ("rfa_conv",), x, weight)
        False
    """
    if backend == "reference" or needs_plain_operators() or _is_watched(x, weight):
        return False
    if is_compiling() and not COMPILES_OPERATORS:
        _notice("compiling the kernels requires torch 2.4 or later")
        return False
    dtype = autocast_dtype(x)
    same = weight.device == x.device
    same = same and (weight.dtype == x.dtype or autocast_dtype(weight) == dtype)
    if backend != "auto":
        _check_input(backend, x, weight, dtype, same)
        if backend == "triton":
            _require_passed(*_case(operators, x, dtype))
        return True
    own = _AUTO.get(x.device.type, "")
    if x.is_meta or not same or dtype == torch.float64 or dtype not in _DTYPES.get(own, _HALF):
        return False
    reason = missing(own) if own else "kernels exist only for CPUs and NVIDIA GPUs"
    obstacle = None
    if own == "triton":
        obstacle = _gpu_obstacle(reason is None, *_case(operators, x, dtype))
    reason = obstacle or reason
    if reason:
        _notice(reason)
    return obstacle is None


def _case(operators: tuple[str, ...], x: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """Return the fields of a self-check case, as types that torch.compile can pass on."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.device, dtype, last, torch.is_grad_enabled(), operators


@constant_in_graphs
def _gpu_obstacle(has_kernels: bool, *of_case: Any) -> str | None:
    """Return why a GPU must run the formula; check the kernels at their first use."""
    if torch.are_deterministic_algorithms_enabled() and not _multiplies_deterministically():
        return (
            "with torch.use_deterministic_algorithms(True), matrix products on a GPU require "
            "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
        )
    if not has_kernels:
        return None
    case = self_check.Case(*of_case)
    if _is_captured_unchecked(case):
        return CAPTURED
    error = self_check.failure(case)
    if error is not None:
        _warn_once(_describe(case, error))
    return None


@constant_in_graphs
def _require_passed(*of_case: Any) -> None:
    case = self_check.Case(*of_case)
    if _is_captured_unchecked(case):
        raise RuntimeError(f"backend='triton': {CAPTURED}")
    error = self_check.failure(case)
    if error is not None:
        raise RuntimeError(f"backend='triton': {_describe(case, error)}") from error


def _is_captured_unchecked(case: self_check.Case) -> bool:
    on_gpu = case.device.type == "cuda" and not self_check.is_known(case)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _multiplies_deterministically() -> bool:
    configured = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in DETERMINISTIC_CUBLAS
    return configured or torch.is_deterministic_algorithms_warn_only_enabled()


def _describe(case: self_check.Case, error: Exception) -> str:
    remedy = ""
    if isinstance(error, subprocess.CalledProcessError) or "C compiler" in str(error):
        remedy = "; Triton needs a C compiler and Python's headers, e.g. gcc and python3-dev"
    words = " ".join(str(error).split())[:500]  # compiler errors may span pages
    return (
        f"the Triton kernels failed their self-check on {case.device} in {case.dtype}: "
        f"{type(error).__name__}: {words}{remedy}"
    )


def _is_watched(*tensors: Tensor) -> bool:
    """Return whether a mode or tensor subclass intercepts operators."""
    if is_compiling():
        return False
    modes: int = torch._C._len_torch_dispatch_stack()
    return modes > 0 or any(
        type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in tensors
    )


def _check_input(backend: str, x: Tensor, weight: Tensor, dtype: torch.dtype, same: bool) -> None:
    check_backend(backend)  # again, because the layer may come from another process
    device = _DEVICES[backend]
    if x.device.type != device:
        raise ValueError(f"backend={backend!r}: the input must be on {device}, not on {x.device}")
    if dtype not in _DTYPES[backend]:
        raise TypeError(
            f"backend={backend!r}: the input dtype must be one of {_DTYPES[backend]}, not {dtype}"
        )
    if not same:
        raise TypeError(
            f"backend={backend!r}: the input is {x.dtype} on {x.device}, but the weight is "
            f"{weight.dtype} on {weight.device}"
        )


@constant_in_graphs
def _notice(reason: str) -> None:
    _warn_once(reason)


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        "receptive-field convolutions run in plain torch, which is slower than the kernels: "
        f"{reason}",
        stacklevel=2,
    )
