"""The types that pickles of ``torch.save`` may contain: tensors and a few built-in types.

The arguments are checked here rather than by torch, which enlarges a storage if a tensor exceeds
it, and puts some checks off to a process-wide list.
"""

import math
import os
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rfa_mmdet.checkpoints.unpickler import (
    Callee,
    StorageKind,
    is_plain,
    require,
    set_attributes,
)


class Storage(NamedTuple):
    """Stand-in for a storage in the pickle."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


def _are_sizes(values: Any) -> bool:
    return (
        type(values) in (tuple, torch.Size)
        and len(values) <= 64
        and all(type(n) is int and 0 <= n < 2**63 for n in values)
    )


def _require_inside(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> None:
    require(type(storage) is Storage and type(dtype) is torch.dtype, "without a storage")
    require(
        _are_sizes((offset,)) and _are_sizes(size) and _are_sizes(stride), "with an invalid shape"
    )
    require(len(size) == len(stride), "with an invalid shape")
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if 0 in size:
        end = offset
    require(end * dtype.itemsize <= storage.untyped.nbytes(), "out of its storage")


def _require_no_hooks(hooks: Any) -> None:
    require(type(hooks) is OrderedDict and not hooks and not vars(hooks), "with hooks")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    require(type(storage) is Storage, "without a storage")
    return _view(storage, storage.dtype, offset, size, stride)


def _view(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> Tensor:
    _require_inside(storage, dtype, offset, size, stride)
    tensor = torch.empty(0, dtype=dtype, device=storage.untyped.device)
    return tensor.set_(storage.untyped, offset, size, stride)


def _tensor_v2(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> Tensor:
    require(type(storage) is Storage, "without a storage")
    view = storage, offset, size, stride
    return _tensor_v3(*view, requires_grad, hooks, storage.dtype, metadata)


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    require(type(requires_grad) is bool and not metadata)
    _require_no_hooks(hooks)
    return _view(storage, dtype, offset, size, stride).requires_grad_(requires_grad)


def _quantized(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    quantizer: Any,
    requires_grad: Any,
    hooks: Any,
) -> Tensor:
    require(type(requires_grad) is bool)
    _require_no_hooks(hooks)
    require(type(storage) is Storage, "without a storage")
    _require_inside(storage, storage.dtype, offset, size, stride)
    # torch allocates this size before it uses the storage.
    require(math.prod(size) * storage.dtype.itemsize <= storage.untyped.nbytes(), "of invalid size")
    typed = _typed(storage)
    return torch._utils._rebuild_qtensor(
        typed, offset, size, stride, quantizer, requires_grad, hooks
    )


def _sparse(layout: Any, data: Any) -> Tensor:
    require(type(data) is tuple and len(data) in (3, 4))
    if layout is torch.sparse_coo:
        indices, values, size, *coalesced = data
        parts = [indices, values]
        options = {"is_coalesced": coalesced[0]} if coalesced else {}
        require(all(type(flag) is bool for flag in coalesced))
    else:
        require(type(layout) is torch.layout and len(data) == 4)
        *parts, size = data
        options = {"layout": layout}
    require(_are_sizes(size) and all(type(part) is Tensor for part in parts))
    coo = layout is torch.sparse_coo
    function: Any = torch.sparse_coo_tensor if coo else torch.sparse_compressed_tensor
    return function(*parts, size, check_invariants=True, **options)


def _meta(dtype: Any, size: Any, stride: Any, requires_grad: Any) -> Tensor:
    require(type(dtype) is torch.dtype and type(requires_grad) is bool)
    require(_are_sizes(size) and _are_sizes(stride))
    return torch.empty_strided(
        size, stride, dtype=dtype, device="meta", requires_grad=requires_grad
    )


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> nn.Parameter:
    require(isinstance(data, Tensor) and type(requires_grad) is bool, "without a tensor")
    _require_no_hooks(hooks)
    parameter = nn.Parameter(data, requires_grad)
    _attributes(parameter, state)
    return parameter


def _attributes(tensor: Tensor, state: Any) -> None:
    if type(state) is tuple and len(state) == 2 and not state[1]:  # of __slots__
        state = state[0]
    if state:
        set_attributes(tensor, state, plain=True)


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Tensor:
    """Create a tensor that has attributes, or whose class the user allowed."""
    require(isinstance(function, Callee) and function.path in _TENSORS and type(args) is tuple)
    require(isinstance(kind, Callee))
    tensor = _TENSORS[function.path](*args)
    if kind.path != "torch.Tensor":
        require(isinstance(kind.value, type) and issubclass(kind.value, Tensor), kind.path)
        tensor = tensor.as_subclass(kind.value)
    _attributes(tensor, state)
    return tensor


def _layout(name: Any) -> torch.layout:
    require(type(name) is str)
    layout = getattr(torch, name.removeprefix("torch."), None)
    require(isinstance(layout, torch.layout))
    return cast(torch.layout, layout)


def _typed(storage: Storage) -> torch.TypedStorage:
    return torch.storage.TypedStorage(
        wrap_storage=storage.untyped, dtype=storage.dtype, _internal=True
    )


def resolve_storage(storage: Storage) -> torch.TypedStorage:
    """Return torch's object for a storage that is a value by itself."""
    return _typed(storage)


def _size(values: Any) -> torch.Size:
    require(_are_sizes(values))
    return torch.Size(values)


def _device(kind: Any, index: Any = None) -> torch.device:
    require(type(kind) is str and (index is None or type(index) is int))
    return torch.device(kind) if index is None else torch.device(kind, index)


def _ordered_dict(items: Any = ()) -> OrderedDict:
    require(type(items) in (tuple, list))
    require(all(type(i) in (tuple, list) and len(i) == 2 and is_plain(i[0]) for i in items))
    return OrderedDict(items)


def _counter(counts: Any) -> Counter:
    require(type(counts) is dict and all(type(n) is int for n in counts.values()))
    return Counter(counts)


_FACTORIES = (list, dict, int, float, str, bool, tuple, set, OrderedDict)


def _default_dict(factory: Any = None) -> defaultdict:
    if factory is None:
        return defaultdict()
    require(isinstance(factory, Callee))
    kinds = {f"{kind.__module__}.{kind.__name__}": kind for kind in _FACTORIES}
    require(factory.path in kinds, factory.path)
    return defaultdict(kinds[factory.path])


def _deque(items: Any = (), maxlen: Any = None) -> deque:
    require(items == () and (maxlen is None or type(maxlen) is int))
    return deque(maxlen=maxlen)


def _set(items: Any) -> set:
    require(type(items) is list and all(map(is_plain, items)))
    return set(items)


def _frozen_set(items: Any) -> frozenset:
    return frozenset(_set(items))


def _of_scalars(kind: type) -> Callable[..., Any]:
    """Wrap a standard library class that only keeps its arguments, so that they must be plain."""

    def make(*args: Any) -> Any:
        require(all(is_plain(arg) or type(arg) in (timedelta, timezone) for arg in args))
        return kind(*args)

    return make


def _complex(real: Any, imag: Any) -> complex:
    require(type(real) is type(imag) is float)
    return complex(real, imag)


def _encode(text: Any, encoding: Any) -> bytes:
    require(type(text) is str and encoding in ("latin1", "latin-1"))
    return text.encode("latin1")


def _bytes(*args: Any) -> bytes:
    require(not args)  # protocol 2 writes empty bytes like this
    return b""


def _bytearray(data: Any = b"", *encoding: Any) -> bytearray:
    if encoding:
        data = _encode(data, *encoding)
    require(type(data) is bytes)
    return bytearray(data)


_STORAGES = dict(
    Double=torch.float64,
    Float=torch.float32,
    Half=torch.float16,
    BFloat16=torch.bfloat16,
    Long=torch.int64,
    Int=torch.int32,
    Short=torch.int16,
    Char=torch.int8,
    Byte=torch.uint8,
    Bool=torch.bool,
    ComplexDouble=torch.complex128,
    ComplexFloat=torch.complex64,
    QInt8=torch.qint8,
    QInt32=torch.qint32,
    QUInt8=torch.quint8,
    QUInt4x2=torch.quint4x2,
    QUInt2x4=torch.quint2x4,
)

_TENSORS: dict[str, Callable[..., Tensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

# Paths of the other system become pure paths, without file access.
_PATHS = {
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    "PosixPath": pathlib.Path if os.name == "posix" else pathlib.PurePosixPath,
    "WindowsPath": pathlib.Path if os.name == "nt" else pathlib.PureWindowsPath,
}

_OTHERS: dict[str, Callable[..., Any] | None] = {
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Tensor": None,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.frozenset": _frozen_set,
    "collections.deque": _deque,
    "collections.defaultdict": _default_dict,
    # default factories of defaultdict
    **{f"builtins.{kind.__name__}": None for kind in _FACTORIES[:-2]},
    **{
        f"{kind.__module__}.{kind.__name__}": _of_scalars(kind)
        for kind in (slice, range, date, datetime, time, timedelta, timezone)
    },
    **{f"pathlib.{name}": _of_scalars(kind) for name, kind in _PATHS.items()},
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,  # bytes in protocol 2
}

NAMES: dict[str, Any] = {
    **{path: Callee(path, function) for path, function in {**_TENSORS, **_OTHERS}.items()},
    **{f"torch.{name}Storage": StorageKind(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageKind(torch.uint8),
    **{
        str(value): value
        for value in vars(torch).values()
        if isinstance(value, (torch.dtype, torch.qscheme))
    },
}

# OrderedDict: a state dict's _metadata
BUILDERS: dict[type, Callable[[Any, Any], None]] = {OrderedDict: set_attributes}
