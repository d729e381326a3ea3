"""What the pickles of MMEngine's training checkpoints may call, besides torch's.

NumPy's and MMEngine's own functions would let a pickle rewrite an array's memory, or change the
methods of a class. It gets stand-ins instead, which only keep checked plain data; :func:`resolve`
puts the real objects in their places when the pickle has ended.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from rfa_mmdet.checkpoints.tensors import Storage, resolve_storage
from rfa_mmdet.checkpoints.unpickler import Callee, Refused, StandIn, require
from rfa_mmdet.ops.common.torch_versions import safe_globals

# Real, fixed-size and free of structure; "O8" is object.
_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "O8")
_STATISTICS = ("min", "max", "current", "mean")
_ANNEALING = ("_annealing_cos", "_annealing_linear")
_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_ONE_CYCLE = "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler"


class _DType(StandIn):
    path = "numpy.dtype"

    def __init__(self, code: Any, *_: Any):
        require(type(code) is str and code in _DTYPES)
        self.value = np.dtype(code)

    def build(self, state: Any) -> None:
        require(
            type(state) is tuple
            and len(state) == 8
            and state[1] in ("<", ">", "|", "=")
            and state[2:5] == (None, None, None)
        )
        self.value = self.value.newbyteorder(state[1])


class _Array(StandIn):
    path = "numpy.ndarray"
    value: Any = None  # np.ndarray

    def build(self, state: Any) -> None:
        require(type(state) is tuple and len(state) == 5, "with odd state")
        _, shape, dtype, fortran, data = state
        require(
            type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape),
            "of odd shape",
        )
        require(type(dtype) is _DType, "of odd type")
        dtype, size = dtype.value, math.prod(shape)
        if dtype.hasobject:
            require(type(data) is list and len(data) == size, "of odd size")
            flat = np.empty(size, dtype)
            for i, item in enumerate(data):  # one by one: NumPy would look into sequences
                flat[i] = item
        else:
            require(
                type(data) is bytes and len(data) == size * dtype.itemsize,
                "of odd size",
            )
            flat = np.frombuffer(bytearray(data), dtype)  # bytearray: writable
        self.value = flat.reshape(shape, order="F" if fortran else "C")

    def resolve(self, seen: dict) -> np.ndarray:
        require(self.value is not None, "numpy.ndarray without content")
        if self.value.dtype.hasobject and id(self) not in seen:
            seen[id(self)] = self
            for index, item in np.ndenumerate(self.value):
                self.value[index] = _resolve(item, seen)
        return self.value


class _History(StandIn):
    path = "HistoryBuffer"
    state: Any = None
    value: Any = None  # HistoryBuffer

    def build(self, state: Any) -> None:
        self.state = state

    def resolve(self, seen: dict) -> HistoryBuffer:
        if self.value is None:
            require(type(self.state) is dict, "HistoryBuffer with odd state")
            # "statistics_methods" is left out: HistoryBuffer has its own.
            log, count = (self.state.get(key) for key in ("_log_history", "_count_history"))
            max_length = self.state.get("max_length")
            require(
                type(log) is _Array and type(count) is _Array and type(max_length) is int,
                "HistoryBuffer with odd state",
            )
            log, count = log.resolve(seen), count.resolve(seen)
            require(log.ndim == 1 and log.shape == count.shape, "HistoryBuffer of odd size")
            self.value = HistoryBuffer(max_length=max_length)
            self.value._log_history, self.value._count_history = log, count
        return self.value


def _reconstruct(kind: Any, *_: Any) -> _Array:
    require(isinstance(kind, Callee) and kind.path == "numpy.ndarray")
    return _Array()


def _scalar(dtype: Any, data: Any) -> np.generic:
    require(type(dtype) is _DType and not dtype.value.hasobject and type(data) is bytes)
    require(len(data) == dtype.value.itemsize)
    return np.frombuffer(data, dtype.value)[0]


def _getattr(owner: Any, name: Any) -> Any:
    """Hand out one of two functions of floats, or nothing.

    Nothing for a history's statistics: they only appear in ``statistics_methods``, see above.
    """
    require(isinstance(owner, Callee) and type(name) is str)
    if owner.path == _ONE_CYCLE and name in _ANNEALING:
        return getattr(OneCycleParamScheduler, name)
    require(owner.path == _HISTORY and name in _STATISTICS)
    return None


NAMES = {
    callee.path: callee
    for callee in (
        Callee(_HISTORY, new=_History),
        Callee(_ONE_CYCLE),
        Callee("builtins.getattr", _getattr),
        Callee("numpy.dtype", _DType),
        Callee("numpy.ndarray"),
        Callee("numpy.core.multiarray._reconstruct", _reconstruct),  # NumPy 1
        Callee("numpy.core.multiarray.scalar", _scalar),
        Callee("numpy._core.multiarray._reconstruct", _reconstruct),  # NumPy 2
        Callee("numpy._core.multiarray.scalar", _scalar),
    )
}

BUILDERS: dict[type, Callable[[Any, Any], None]] = {
    _DType: _DType.build,
    _Array: _Array.build,
    _History: _History.build,
}


def resolve(value: Any) -> Any:
    """Put the real objects in the places of the stand-ins.

    Args:
        value (Any): What a pickle made; its dicts and lists are changed, and stay the same objects.

    Returns:
        Any: The value, or what it stood for.

    Raises:
        Refused: A stand-in has no content, or the data is nested too deeply.

    Example:
        >>> resolve([1, Callee("a.b", value=str)])
        [1, <class 'str'>]
    """
    try:
        return _resolve(value, {})
    except ValueError as error:
        raise Refused(f"asks for {error}") from error
    except RecursionError as error:
        raise Refused("nests its data too deeply") from error


def _resolve(value: Any, seen: dict) -> Any:
    if isinstance(value, _DType):
        return value.value
    if isinstance(value, (_Array, _History)):
        return value.resolve(seen)
    if isinstance(value, Storage):
        return resolve_storage(value)
    if isinstance(value, Callee):
        require(value.value is not None, f"{value.path} as a value")
        return value.value
    if type(value) is tuple:
        if id(value) not in seen:
            items = tuple(_resolve(item, seen) for item in value)
            same = all(a is b for a, b in zip(items, value, strict=True))
            seen[id(value)] = value if same else items, value  # which keeps the id its own
        return seen[id(value)][0]
    if isinstance(value, (dict, list)) and id(value) not in seen:
        seen[id(value)] = value
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _resolve(item, seen)
        if type(value) is OrderedDict:
            _resolve(vars(value), seen)
    return value


def user_names() -> dict[str, Callee]:
    """Return what the user allowed by ``torch.serialization.add_safe_globals``, where torch has it.

    Modules that torch never allows are left out.
    """
    named = (
        item if isinstance(item, tuple) else (item, f"{item.__module__}.{item.__qualname__}")
        for item in safe_globals()
    )
    return {
        path: _real(path, target)
        for target, path in named
        if path.rpartition(".")[0] not in ("sys", "os", "posix", "nt")
    }


def _real(path: str, target: Any) -> Callee:
    def call(*args: Any) -> Any:
        return target(*resolve(args))

    def new(*args: Any) -> Any:
        return target.__new__(target, *resolve(args))

    return Callee(path, call, new if isinstance(target, type) else None, target)


def build_real(target: Any, state: Any) -> None:
    """Give an object of a class that the user allowed its state, as pickle does."""
    state = resolve(state)
    if hasattr(target, "__setstate__"):
        target.__setstate__(state)
        return
    slots = None
    if type(state) is tuple and len(state) == 2:
        state, slots = state
    vars(target).update(state or {})
    for name, value in (slots or {}).items():
        setattr(target, name, value)
