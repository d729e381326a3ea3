"""The types beyond torch's own that pickles of MMEngine's training checkpoints may contain.

With NumPy's and MMEngine's own functions, a pickle could overwrite an array's memory or change the
methods of a class. It gets stand-ins instead, which only keep validated plain data;
:func:`resolve` replaces them by the real objects at the end.
"""

import math
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from rfa_mmdet.checkpoints.tensors import Storage, resolve_storage
from rfa_mmdet.checkpoints.unpickler import Callee, Refused, StandIn, require
from rfa_mmdet.ops.common.torch_versions import safe_globals

# Numbers, strings of a fixed size, and objects; no structured types.
_DTYPES = re.compile("b1|[iu][1248]|f[248]|c8|c16|O8|[US][1-9][0-9]{0,4}")
# Well above the data of any run. MMEngine walks through it recursively, and visits a shared part
# once per reference.
_DEEPEST, _MOST = 100, 2**24
_STATISTICS = ("min", "max", "current", "mean")
_ANNEALING = ("_annealing_cos", "_annealing_linear")
_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_ONE_CYCLE = "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler"


class _DType(StandIn):
    path = "numpy.dtype"

    def __init__(self, code: Any, *_: Any):
        require(type(code) is str and _DTYPES.fullmatch(code) is not None)
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
        require(type(state) is tuple and len(state) == 5, "with invalid state")
        _, shape, dtype, fortran, data = state
        require(
            type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape),
            "of invalid shape",
        )
        require(type(dtype) is _DType, "of invalid type")
        dtype, size = dtype.value, math.prod(shape)
        if dtype.hasobject:
            require(type(data) is list and len(data) == size, "of invalid size")
            flat = np.empty(size, dtype)
            for i, item in enumerate(data):  # one by one, because NumPy unpacks sequences
                flat[i] = item
        else:
            require(
                type(data) is bytes and len(data) == size * dtype.itemsize,
                "of invalid size",
            )
            flat = np.frombuffer(bytearray(data), dtype)  # bytearray: writable
        self.value = flat.reshape(shape, order="F" if fortran else "C")
        if dtype.kind == "U":
            self.value.tolist()  # fails for invalid characters


class _History(StandIn):
    path = "HistoryBuffer"
    state: Any = None
    value: Any = None  # HistoryBuffer

    def build(self, state: Any) -> None:
        self.state = state

    def resolve(self) -> HistoryBuffer:
        require(type(self.state) is dict, "HistoryBuffer with invalid state")
        # "statistics_methods" is ignored: HistoryBuffer has its own.
        arrays = [self.state.get(key) for key in ("_log_history", "_count_history")]
        max_length = self.state.get("max_length")
        require(type(max_length) is int, "HistoryBuffer with invalid state")
        require(
            all(
                type(a) is _Array and a.value is not None and a.value.dtype.kind in "biuf"
                for a in arrays
            ),
            "HistoryBuffer with invalid state",
        )
        log, count = (array.value for array in arrays)
        require(log.ndim == 1 and log.shape == count.shape, "HistoryBuffer of invalid size")
        if self.value is None:
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


def _config_dict(items: Any) -> ConfigDict:
    require(type(items) is dict)
    made = ConfigDict()
    dict.update(made, items)  # ConfigDict's own update copies the values
    return made


def _getattr(owner: Any, name: Any) -> Any:
    """Return one of two functions of floats, or None.

    None is for a history's statistics, which only appear in the ignored ``statistics_methods``.
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
        Callee("mmengine.config.config.ConfigDict", _config_dict),
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
    """Replace stand-ins by the real objects.

    Args:
        value (Any): The result of a pickle; dicts and lists are changed in place.

    Returns:
        Any: The value, or the object that it stands for.

    Raises:
        Refused: A stand-in has no content, or the data is nested too deeply, contains itself, or
            has too many shared references to be traversed.

    Example:
        >>> resolve([1, Callee("a.b", value=str)])
        [1, <class 'str'>]
    """
    try:
        return _Resolver().real(value)
    except ValueError as error:
        raise Refused(f"asks for {error}") from error


class _Resolver:
    """Visits each object once, and counts the objects, shared ones once per reference.

    Attributes:
        seen (dict): Id of an object -> the object (kept alive so that its id stays unique), the
            resolved object, and the number of values in it; None while it is being visited.
    """

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Any, Any, int] | None] = {}
        self.depth = 0

    def real(self, value: Any) -> Any:
        return self.visit(value)[0]

    def visit(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, _DType):
            return value.value, 1
        if isinstance(value, _History):
            return value.resolve(), 1
        if isinstance(value, Storage):
            return resolve_storage(value), 1
        if isinstance(value, Callee):
            require(value.value is not None, f"{value.path} as a value")
            return value.value, 1
        if not isinstance(value, (tuple, dict, list, deque, _Array)):
            return value, 1
        if id(value) in self.seen:
            found = self.seen[id(value)]
            if found is None:
                raise Refused("asks for data that contains itself")
            return found[1:]
        self.seen[id(value)] = None
        self.depth += 1
        if self.depth > _DEEPEST:
            raise Refused("nests its data too deeply")
        made, count = self.inside(value)
        if count > _MOST:
            raise Refused("repeats its data too often")
        self.depth -= 1
        self.seen[id(value)] = value, made, count
        return made, count

    def inside(self, value: Any) -> tuple[Any, int]:
        if isinstance(value, _Array):
            require(value.value is not None, "numpy.ndarray without content")
            if value.value.dtype.hasobject:
                return value.value, self.replace(value.value, np.ndenumerate(value.value))
            return value.value, 1
        if isinstance(value, tuple):
            items = list(value)
            count = self.replace(items, enumerate(value))
            same = all(a is b for a, b in zip(items, value, strict=True))
            return value if same else tuple(items), count
        if isinstance(value, dict):
            count = self.replace(value, list(dict.items(value)))
            if type(value) is OrderedDict:
                count += self.visit(vars(value))[1]
            return value, count
        return value, self.replace(value, list(enumerate(value)))

    def replace(self, target: Any, items: Iterable) -> int:
        count = 1
        put = dict.__setitem__ if isinstance(target, dict) else type(target).__setitem__
        for key, item in items:
            made, number = self.visit(item)
            count += number
            if made is not item:
                put(target, key, made)
        return count


def user_names() -> dict[str, Callee]:
    """Return the types allowed with ``torch.serialization.add_safe_globals``, if torch has it.

    Excludes modules that torch never allows, and types of process groups that torch adds itself.
    """
    named = (
        item if isinstance(item, tuple) else (item, f"{item.__module__}.{item.__qualname__}")
        for item in safe_globals()
    )
    return {
        path: _real(path, target)
        for target, path in named
        if path.rpartition(".")[0] not in ("sys", "os", "posix", "nt")
        and not path.startswith("torch.distributed.")
    }


def _real(path: str, target: Any) -> Callee:
    def call(*args: Any) -> Any:
        return target(*resolve(args))

    def new(*args: Any) -> Any:
        return target.__new__(target, *resolve(args))

    return Callee(path, call, new if isinstance(target, type) else None, target)


def build_real(target: Any, state: Any) -> None:
    """Set the state of an object whose class the user allowed, as pickle does."""
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
