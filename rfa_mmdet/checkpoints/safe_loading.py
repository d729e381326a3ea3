"""Load MMEngine's training checkpoints under ``weights_only=True``, and nothing more than those.

Since PyTorch 2.6 ``torch.load`` refuses the NumPy arrays and the ``HistoryBuffer`` that MMEngine
0.10 puts in a training checkpoint, so ``--resume`` fails. :func:`load_safely` fixes that for loads
through MMEngine, and makes them as strict on older PyTorch; plain ``torch.load`` stays as it is.

What a hostile file can reach: torch's own list, and the names in ``_ALLOWED``. Those do not lead to
NumPy, MMEngine or ``getattr`` themselves (allowing ``numpy.ndarray`` and ``numpy.dtype`` would let
a pickle rewrite array memory, and ``HistoryBuffer`` would let it change methods of the class) but
to stand-ins that only keep checked plain data; the real objects are made after unpickling ended.
"""

import errno
import functools
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from rfa_mmdet.errors import UserError

# Real, fixed-size and free of structure; "O8" is object.
_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "O8")
_STATISTICS = ("min", "max", "current", "mean")
_ANNEALING = ("_annealing_cos", "_annealing_linear")


class UnsafeCheckpointError(UserError):
    """The checkpoint asks for more than tensors and plain data."""


class BrokenCheckpointError(UserError):
    """The file is cut off, or no checkpoint."""


def _require(condition: bool, called: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(called[:200])


class _DType:
    """What the pickle gets for ``numpy.dtype``."""

    value = np.dtype("f8")  # what remains if the pickle skips __init__

    def __init__(self, code: Any, *_: Any):
        _require(type(code) is str and code in _DTYPES, f"numpy.dtype({code!r})")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _require(
            type(state) is tuple
            and len(state) == 8
            and state[1] in ("<", ">", "|", "=")
            and state[2:5] == (None, None, None),
            f"numpy.dtype with state {state!r}",
        )
        self.value = self.value.newbyteorder(state[1])

    def resolve(self, seen: set) -> np.dtype:
        return self.value


class _Array:
    """What the pickle gets for ``numpy.ndarray``."""

    value: Any = None  # np.ndarray

    def __init__(self, *args: Any):
        _require(not args, f"numpy.ndarray{args!r}")

    def __setstate__(self, state: Any) -> None:
        _require(type(state) is tuple and len(state) == 5, "numpy.ndarray with odd state")
        _, shape, dtype, fortran, data = state
        _require(
            type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape),
            "numpy.ndarray of odd shape",
        )
        _require(type(dtype) is _DType, f"numpy.ndarray of {type(dtype)}")
        dtype, size = dtype.value, math.prod(shape)
        if dtype.hasobject:
            _require(type(data) is list and len(data) == size, "numpy.ndarray of odd size")
            flat = np.empty(size, dtype)
            for i, item in enumerate(data):  # one by one: NumPy would look into sequences
                flat[i] = item
        else:
            _require(
                type(data) is bytes and len(data) == size * dtype.itemsize,
                "numpy.ndarray of odd size",
            )
            flat = np.frombuffer(bytearray(data), dtype)  # bytearray: writable
        self.value = flat.reshape(shape, order="F" if fortran else "C")

    def resolve(self, seen: set) -> np.ndarray:
        _require(self.value is not None, "numpy.ndarray without content")
        if self.value.dtype.hasobject and id(self) not in seen:
            seen.add(id(self))
            for index, item in np.ndenumerate(self.value):
                self.value[index] = _resolve(item, seen)
        return self.value


class _History:
    """What the pickle gets for ``HistoryBuffer``."""

    state: Any = None
    value = None

    def __init__(self, *args: Any):
        _require(not args, f"HistoryBuffer{args!r}")

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def resolve(self, seen: set) -> HistoryBuffer:
        if self.value is None:
            _require(type(self.state) is dict, "HistoryBuffer with odd state")
            # "statistics_methods" is left out: HistoryBuffer has its own.
            keys = ("_log_history", "_count_history")
            log, count = (self.state.get(key) for key in keys)
            max_length = self.state.get("max_length")
            _require(
                type(log) is _Array and type(count) is _Array and type(max_length) is int,
                "HistoryBuffer with odd state",
            )
            log, count = log.resolve(seen), count.resolve(seen)
            _require(log.ndim == 1 and log.shape == count.shape, "HistoryBuffer of odd size")
            self.value = HistoryBuffer(log, count, max_length)
        return self.value


def _reconstruct(*args: Any) -> _Array:
    _require(len(args) == 3 and args[0] is _Array, f"numpy _reconstruct{args!r}")
    return _Array()


def _scalar(*args: Any) -> Any:
    _require(
        len(args) == 2
        and type(args[0]) is _DType
        and not args[0].value.hasobject
        and type(args[1]) is bytes
        and len(args[1]) == args[0].value.itemsize,
        f"numpy scalar{args!r}",
    )
    return np.frombuffer(args[1], args[0].value)[0]


class _OneCycle:
    """What the pickle gets for the one-cycle schedule, of which it asks the annealing function."""

    def __init__(self, *args: Any):
        _require(False, f"OneCycleParamScheduler{args!r}")


def _getattr(*args: Any) -> Any:
    """Hand out one of two functions of floats, or nothing.

    Nothing for a history's statistics: they only ever appear in ``statistics_methods``, see above.
    """
    _require(len(args) == 2 and type(args[1]) is str, f"builtins.getattr{args!r}")
    if args[0] is _OneCycle and args[1] in _ANNEALING:
        return getattr(OneCycleParamScheduler, args[1])
    _require(args[0] is _History and args[1] in _STATISTICS, f"builtins.getattr{args!r}")
    return None


def _encode(*args: Any) -> bytes:
    _require(
        len(args) == 2 and type(args[0]) is str and args[1] == "latin1", f"_codecs.encode{args!r}"
    )
    return args[0].encode("latin1")


def _empty_bytes(*args: Any) -> bytes:
    _require(not args, f"builtins.bytes{args!r}")
    return b""


def _named(path: str, target: Any) -> Any:
    """Give ``target`` the name under which torch will look for it.

    (object, name) pairs say the same, but not to PyTorch 2.4 and 2.5.
    """
    if not isinstance(target, type):
        target = functools.partial(target)
    target.__module__, _, target.__qualname__ = path.rpartition(".")
    target.__name__ = target.__qualname__
    return target


_ALLOWED = {
    path: _named(path, target)
    for path, target in {
        "mmengine.logging.history_buffer.HistoryBuffer": _History,
        "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler": _OneCycle,
        "builtins.getattr": _getattr,
        "_codecs.encode": _encode,  # bytes; torch has it from 2.5 on
        "builtins.bytes": _empty_bytes,  # how pickle writes the data of an empty array
        "numpy.dtype": _DType,
        "numpy.ndarray": _Array,
        "numpy.core.multiarray._reconstruct": _reconstruct,  # NumPy 1
        "numpy.core.multiarray.scalar": _scalar,
        "numpy._core.multiarray._reconstruct": _reconstruct,  # NumPy 2
        "numpy._core.multiarray.scalar": _scalar,
    }.items()
}


def _resolve(value: Any, seen: set) -> Any:
    """Put the real objects in the place of the stand-ins; dicts and lists are kept."""
    if isinstance(value, (_DType, _Array, _History)):
        return value.resolve(seen)
    if type(value) is tuple:
        items = tuple(_resolve(item, seen) for item in value)
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    if isinstance(value, (dict, list)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _resolve(item, seen)
    return value


@contextmanager
def _weights_only() -> Iterator[None]:
    """Have every ``torch.load`` inside use ``weights_only=True`` with :data:`_ALLOWED`.

    The environment variable is torch's own switch. It reaches the loads that MMEngine's loaders
    make with no argument (False before PyTorch 2.6) and those of ``torch.hub`` (False in all).
    """
    force, dont = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    environ = {name: os.environ.pop(name, None) for name in (force, dont)}
    before = torch.serialization.get_safe_globals()
    # What the user allowed stays allowed, except under our names: stand-ins and real ones don't mix
    others = [
        g
        for g in before
        if (g[1] if isinstance(g, tuple) else f"{g.__module__}.{g.__qualname__}") not in _ALLOWED
    ]
    try:
        os.environ[force] = "1"
        # not safe_globals(): PyTorch 2.4 lacks it, and it would forget what was allowed before
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*others, *_ALLOWED.values()])
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
        del os.environ[force]
        os.environ.update({name: value for name, value in environ.items() if value is not None})


def _unsafe(path: str, error: Exception) -> UnsafeCheckpointError:
    names = re.findall(r"GLOBAL (\S+) ", str(error))[:1]
    if names:
        # all of them, where torch (>= 2.6) can tell: not of a URL, nor of the format before 1.6
        with suppress(AttributeError, OSError, RuntimeError, ValueError, pickle.UnpicklingError):
            file = os.path.expanduser(path)
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)) or names
    called = ", ".join(names) or _reason(error)
    allow = ", or allow them by torch.serialization.add_safe_globals" if names else ""
    return UnsafeCheckpointError(
        f"{path}: not loaded, as its pickle asks for {called}; nothing of it was run. Right are "
        "tensors, numbers, strings, dicts, lists, tuples, NumPy arrays and MMEngine's log history. "
        "If the file comes from someone else, do not trust it. If it is yours, save it again with "
        f"plain values in their place{allow}."
    )


def _damaged(path: str, error: Exception) -> BrokenCheckpointError:
    file = os.path.expanduser(path)
    size = f" ({os.path.getsize(file)} bytes)" if os.path.isfile(file) else ""
    return BrokenCheckpointError(
        f"{path}{size} is incomplete, or no checkpoint of torch.save: {_reason(error)}. Was the "
        "run killed while it was saving, or the download cut? Take an earlier checkpoint, or "
        "fetch it again."
    )


def _reason(error: Exception) -> str:
    """Return what torch says, without the advice that it wraps around."""
    text = str(error).split("\n\nCheck the documentation")[0]
    text = text.rpartition("WeightsUnpickler error:")[2].strip()
    lines = text.splitlines() or [""]
    text = lines[-1 if text.startswith("Weights only") else 0].partition(". ")[0].rstrip(".")
    if isinstance(error, pickle.UnpicklingError):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def _is_damage(path: str, error: Exception) -> bool:
    if isinstance(error, RuntimeError):  # others, such as a missing CUDA device, are not the file's
        words = (
            "PytorchStreamReader|unexpected EOF|corrupt|wrong byte|protocol version|``weights_only"
        )
        return re.search(words, str(error)) is not None
    if isinstance(error, (EOFError, struct.error)):
        return True
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: seek by a cut index
        return False
    # Bytes that are no pickle make torch fail in any way; a URL also has other reasons to fail.
    is_file = isinstance(path, str) and os.path.isfile(os.path.expanduser(path))
    return is_file and not isinstance(error, MemoryError)


def load_safely(load_checkpoint: Callable) -> Callable:
    """Wrap MMEngine's ``CheckpointLoader.load_checkpoint`` so that it runs no code from a file.

    Args:
        load_checkpoint (Callable): The function of the class method; takes the class first.

    Returns:
        Callable: With the same signature. It raises :class:`UnsafeCheckpointError` for a file that
        asks for more than plain data, :class:`BrokenCheckpointError` for one that is truncated.
    """

    @functools.wraps(load_checkpoint)
    def load(cls, filename, map_location=None, logger="current"):
        with _weights_only():
            try:
                return _resolve(load_checkpoint(cls, filename, map_location, logger), set())
            except pickle.UnpicklingError as error:
                if "Unsupported operand" in str(error):  # no pickle of torch.save
                    raise _damaged(filename, error) from error
                raise _unsafe(filename, error) from error
            except Exception as error:
                if _is_damage(filename, error):
                    raise _damaged(filename, error) from error
                raise

    return load
