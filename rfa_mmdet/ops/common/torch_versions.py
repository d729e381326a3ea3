"""Differences between the supported versions of torch; no other module checks the version."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch._compile
import torch._utils
from torch.nn.modules import module as _module

_F = TypeVar("_F", bound=Callable[..., Any])

# Whether torch.compile is tracing. Old compilers only support the old name.
is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling  # 2.2

# Whether torch.compile supports operators with Meta and Autograd kernels in Python: since 2.4,
# which introduced register_fake.
COMPILES_OPERATORS = hasattr(torch.library, "register_fake")

# Like torch.compiler.disable, which imports the compiler when it decorates; torch.optim uses this.
not_compiled = torch._compile._disable_dynamo


def constant_in_graphs(function: _F) -> _F:
    """Mark a function that torch.compile calls while tracing, instead of tracing into it.

    Like torch.compiler.assume_constant_result, which imports the compiler when it decorates.

    Example:
        >>> constant_in_graphs(lambda: 1)()
        1
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Arguments that make torch.onnx.export trace. The default exporter since 2.9 needs onnxscript;
# before 2.5 there is no choice.
TRACES_TO_ONNX: dict[str, Any] = (
    {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
)

# The list of types that weights_only=True additionally allows, with or without names: since 2.4.
HAS_SAFE_GLOBALS = hasattr(torch.serialization, "get_safe_globals")
safe_globals: Callable[[], list[Any]] = getattr(torch.serialization, "get_safe_globals", list)


def autocast_dtype_on(device: str) -> torch.dtype | None:
    """Return the dtype that autocast uses for convolutions on a type of device.

    Args:
        device (str): E.g. 'cpu' or 'cuda'.

    Returns:
        torch.dtype | None: None if autocast is off or not available on the device.

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
    """Return whether torch.export is tracing; always False before 2.7, which cannot tell.

    Example:
        >>> is_exporting()
        False
    """
    exporting = getattr(torch.compiler, "is_exporting", None)
    return bool(exporting and exporting())


# Global module hooks. Before 2.5, there is no single function for all of them.
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


# Settings of TF32 per operation, with inheritance: since 2.9, where reading the old settings raises
# an error once they differ from the new ones. Both are process-wide.
_HAS_PRECISIONS = hasattr(torch.backends, "fp32_precision")


def register_fake(library: torch.library.Library, name: str, function: Callable[..., Any]) -> None:
    """Register a function that tells fake tensors what an operator of a library returns."""
    if COMPILES_OPERATORS:
        # Unlike a Meta kernel, it sees the device, on which a layout may depend.
        torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
    else:
        library.impl(name, function, "Meta")


def convolves_in_tf32() -> bool:
    """Return whether cuDNN may round operands of float32 convolutions to TF32, its default.

    Example:
        >>> convolves_in_tf32()
        True
    """
    if _HAS_PRECISIONS:
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
    return torch.backends.cudnn.allow_tf32


def products_as_convolutions(dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context in which matrix products on a GPU use the TF32 setting of convolutions.

    A layer that users see as a convolution follows cuDNN's TF32 setting, which is on by default,
    rather than that of matrix products, which is off.

    Args:
        dtype (torch.dtype): Dtype of the products; only float32 has this choice.

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
        before = torch.get_float32_matmul_precision()  # 'medium' is more than on or off
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
