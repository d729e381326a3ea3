"""What differs between the supported versions of torch; nothing else asks for a version."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._compile
import torch._utils
from torch.nn.modules import module as _module

# Whether torch.compile traces what runs now. The old name is known to the old compilers only.
is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling  # 2.2

# Whether torch.compile takes operators with kernels for Meta and Autograd that are written in
# Python: since 2.4, which brought register_fake.
COMPILES_OPERATORS = hasattr(torch.library, "register_fake")

# As torch.compiler.disable, which imports the compiler when it decorates. torch.optim's own.
not_compiled = torch._compile._disable_dynamo

# Arguments by which torch.onnx.export traces. The exporter that is the default since 2.9 needs
# onnxscript; before 2.5 there is no choice.
TRACES_TO_ONNX: dict[str, Any] = (
    {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
)

# The list of what weights_only=True allows besides torch's own, with names or without: since 2.4.
HAS_SAFE_GLOBALS = hasattr(torch.serialization, "get_safe_globals")
safe_globals: Callable[[], list[Any]] = getattr(torch.serialization, "get_safe_globals", list)


def autocast_dtype_on(device: str) -> torch.dtype | None:
    """Return the type that autocast lowers convolutions to, by the type of the device.

    Args:
        device (str): Such as 'cpu' or 'cuda'.

    Returns:
        torch.dtype | None: None where autocast is off, or the device has none.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     autocast_dtype_on("cpu"), autocast_dtype_on("meta")
        (torch.bfloat16, None)
    """
    if hasattr(torch.amp, "is_autocast_available"):  # 2.4
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return None
    if device == "cpu" and torch.is_autocast_cpu_enabled():
        return torch.get_autocast_cpu_dtype()
    if device == "cuda" and torch.is_autocast_enabled():
        return torch.get_autocast_gpu_dtype()
    return None


def is_exporting() -> bool:
    """Whether torch.export traces what runs now; before 2.7 it cannot be told.

    Example:
        >>> is_exporting()
        False
    """
    exporting = getattr(torch.compiler, "is_exporting", None)
    return bool(exporting and exporting())


# Hooks on every module of the process. Before 2.5 there is no function that asks for them all.
has_global_hooks = getattr(
    _module,
    "_has_any_global_hook",
    lambda: bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    ),
)


# Settings of TF32 by operation, with others to inherit from: since 2.9, where to read the old ones
# raises once the two differ. Both are of the whole process.
_HAS_PRECISIONS = hasattr(torch.backends, "fp32_precision")


def convolves_in_tf32() -> bool:
    """Whether cuDNN may round the operands of float32 convolutions to TF32: unless told otherwise.

    Example:
        >>> convolves_in_tf32()
        True
    """
    if _HAS_PRECISIONS:
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
    return torch.backends.cudnn.allow_tf32


def products_as_convolutions(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context in which matrix products on a GPU round as its convolutions do.

    A layer that is a convolution to its user follows cuDNN's switch of TF32, which is on by
    default, and not that of matrix products, which is off.

    Args:
        dtype (torch.dtype): Of the products; those of float32 alone have a choice.

    Example:
        >>> with products_as_convolutions(torch.float32):
        ...     y = torch.ones(2, 3) @ torch.ones(3, 4)
    """
    if dtype != torch.float32 or _multiplies_in_tf32() == convolves_in_tf32():
        return nullcontext()
    return _products_in_tf32(convolves_in_tf32())


def _multiplies_in_tf32() -> bool:
    if _HAS_PRECISIONS:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    return bool(torch.backends.cuda.matmul.allow_tf32)


@contextmanager
def _products_in_tf32(allowed: bool) -> Iterator[None]:
    if not _HAS_PRECISIONS:
        before = torch.get_float32_matmul_precision()  # 'medium' says more than the switch
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = "none"  # inherits
        if products.fp32_precision != before:
            products.fp32_precision = before


def cache_bytes(device: torch.device) -> int:
    """Return the size of a GPU's second-level cache; 0 where torch does not know it."""
    size: int = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return size
