"""A restricted unpickler for untrusted files.

Python's own unpickler imports and calls whatever a pickle names, and sets attributes of any object
on its stack. Here, only the operations that pickling plain data writes are allowed, and every name
must be in a table. On the stack, a function or class is a :class:`Callee`, which can only be
called, and validates its arguments.

A pickle is read twice: :class:`Scanner` finds everything that it refers to without creating
objects, then :class:`Maker` creates them.
"""

import pickle
import pickletools
from _compat_pickle import NAME_MAPPING
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from rfa_mmdet.texts import shown

_SCALARS = (str, bytes, int, float, bool, type(None))


class _Told(Exception):
    """An error that quotes a file in a printable form."""

    def __init__(self, what: str):
        super().__init__(shown(what, 800))


class Refused(_Told):
    """The pickle asks for something not allowed; the message continues 'its pickle'."""


class UnknownNames(Refused):
    """The pickle only asks for unknown names, which the user could allow."""

    def __init__(self, names: list[str]):
        more = f" and {len(names) - 9} more" if len(names) > 9 else ""
        super().__init__(f"asks for {', '.join(map(shown, names[:9]))}{more}")


class Damaged(_Told):
    """The file is truncated, or not a checkpoint."""


class Callee:
    """Stand-in for a function or class in the pickle.

    Args:
        path (str): Its qualified name.
        call (Callable | None): Function to run for a call; it may raise anything for invalid
            arguments. Defaults to None: not callable.
        new (Callable | None): Function to run for ``__new__``. Defaults to None: not allowed.
        value (Any): Replaces the name itself in the data. Defaults to None: an error.
    """

    def __init__(
        self,
        path: str,
        call: Callable[..., Any] | None = None,
        new: Callable[..., Any] | None = None,
        value: Any = None,
    ):
        self.path, self.call, self.new, self.value = path, call, new, value


class StandIn:
    """Base class of stand-ins for objects that are created after unpickling.

    Attributes:
        path (str): Name of the object's class.
    """

    path: str


class StorageKind(NamedTuple):
    """Stand-in for a storage class in the pickle."""

    dtype: torch.dtype


class StorageId(NamedTuple):
    """A reference to a storage in the pickle.

    Attributes:
        dtype (torch.dtype): Type of its elements.
        key (str): Key in the file.
        location (str): Device that it was saved from.
        numel (int): Number of elements of the whole storage.
        view (tuple[int, int] | None): Start and length of a view, in elements.
    """

    dtype: torch.dtype
    key: str
    location: str
    numel: int
    view: tuple[int, int] | None

    @property
    def nbytes(self) -> int:
        """Size of the whole storage."""
        return self.numel * self.dtype.itemsize


def require(condition: bool, what: str = "with invalid arguments") -> None:
    """Raise an error, used for invalid arguments of a call in the pickle."""
    if not condition:
        raise ValueError(what)


def is_plain(value: Any) -> bool:
    """Return whether a value is a scalar such as a number or string, or a tuple of scalars.

    Deeper tuples are not allowed as keys: hashing them recurses in C without a limit.
    """
    if isinstance(value, np.generic) or type(value) in _SCALARS:
        return True
    return type(value) is tuple and all(type(item) in _SCALARS for item in value)


def set_attributes(target: Any, state: Any, plain: bool = False) -> None:
    """Set attributes of an object, unless they hide attributes of its class.

    Args:
        target (Any): The object.
        state (Any): Attributes by name; anything but a dict is an error.
        plain (bool): Whether only plain values are allowed. Defaults to False.
    """
    require(type(state) is dict, "with invalid attributes")
    for name, value in state.items():
        what = f"with attribute {shown(name)!r}"
        require(type(name) is str and not hasattr(type(target), name), what)
        require(not plain or is_plain(value), what)
    target.__dict__.update(state)


def _show(value: Any) -> str:
    if type(value) in _SCALARS:
        return repr(value[:60] if isinstance(value, (str, bytes)) else value)[:60]
    return value.path if isinstance(value, (Callee, StandIn)) else type(value).__name__


def _asked(path: str, args: Any) -> str:
    shown = ", ".join(map(_show, args[:9])) if type(args) is tuple else _show(args)
    return f"asks for {path}({shown})"


def _storage_id(saved: Any) -> StorageId:
    if type(saved) is tuple and len(saved) in (5, 6) and saved[0] == "storage":
        _, kind, key, location, numel, view = (*saved, None)[:6]
        if view is not None:
            view = view[1:] if type(view) is tuple and len(view) == 3 else ()
        if (
            type(kind) is StorageKind
            and type(key) is type(location) is str
            and type(numel) is int
            and numel >= 0
            and (view is None or (view and all(type(n) is int and n >= 0 for n in view)))
        ):
            return StorageId(kind.dtype, key, location, numel, view)
    raise Refused("asks for an external object that is not a tensor storage")


class _Operations(dict):
    def __missing__(self, code: int) -> None:
        for operation in pickletools.opcodes:
            if operation.code == chr(code):
                raise Refused(f"asks for the operation {operation.name}")
        raise Damaged(f"its pickle contains the invalid operation {code}")


class _Machine(pickle._Unpickler):
    """Operations that create numbers, strings and tuples, and that look up names."""

    # Missing in the base class's type stub.
    stack: list[Any]
    append: Callable[[Any], None]
    readline: Callable[[], bytes]
    pop_mark: Callable[..., list]

    dispatch = _Operations(
        (code, pickle._Unpickler.dispatch[code])
        for code in b"".join(
            (
                *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
                *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
                *(pickle.BINGET, pickle.LONG_BINGET),
                *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
                *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
                *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
                *(pickle.BINSTRING, pickle.SHORT_BINSTRING),
                *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
                *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
                *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET),
            )
        )
    )

    def __init__(self, file: BinaryIO, names: Mapping[str, Any], encoding: str = "utf-8"):
        super().__init__(file, encoding=encoding)
        self.names = names

    def _find(self) -> None:
        module, name = (self.readline()[:-1].decode() for _ in range(2))
        self._name(module, name)

    def _find_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not type(name) is type(module) is str:
            raise Refused("asks for a name that is not a string")
        self._name(module, name)

    def _name(self, module: str, name: str) -> None:
        # Python 3 also writes Python 2's names, up to protocol 2.
        module, name = NAME_MAPPING.get((module, name), (module, name))
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        self.append(self._named(path))

    def _named(self, path: str) -> Any:
        raise NotImplementedError

    dispatch[pickle.GLOBAL[0]] = _find
    dispatch[pickle.STACK_GLOBAL[0]] = _find_on_stack


class Scanner(_Machine):
    """Find what a pickle refers to, without creating objects.

    Attributes:
        unknown (dict[str, None]): Names missing in the table, in order.
        storages (dict[str, StorageId]): Key -> first reference to a storage.
    """

    dispatch = _Operations(_Machine.dispatch)

    def __init__(self, file: BinaryIO, names: Mapping[str, Any], encoding: str = "utf-8"):
        super().__init__(file, names, encoding)
        self.unknown: dict[str, None] = {}
        self.storages: dict[str, StorageId] = {}

    def _named(self, path: str) -> Any:
        if path not in self.names:
            self.unknown[path] = None
        return self.names.get(path)

    def _drop_one(self) -> None:
        self.stack.pop()

    def _drop_two(self) -> None:
        del self.stack[-2:]

    def _made(self) -> None:
        del self.stack[-2:]
        self.append(None)

    def _made_of_marked(self) -> None:
        self.pop_mark()
        self.append(None)

    def _binpersid(self) -> None:
        found = _storage_id(self.stack.pop())
        self.storages.setdefault(found.key, found)
        self.append(None)

    dispatch |= {
        pickle.APPEND[0]: _drop_one,
        pickle.APPENDS[0]: _Machine.pop_mark,
        pickle.SETITEM[0]: _drop_two,
        pickle.SETITEMS[0]: _Machine.pop_mark,
        pickle.ADDITEMS[0]: _Machine.pop_mark,
        pickle.FROZENSET[0]: _made_of_marked,
        pickle.REDUCE[0]: _made,
        pickle.NEWOBJ[0]: _made,
        pickle.BUILD[0]: _drop_one,
        pickle.BINPERSID[0]: _binpersid,
    }


class Maker(_Machine):
    """Create the objects of a pickle.

    Args:
        file (BinaryIO): File, positioned at the pickle.
        names (Mapping[str, Any]): Name -> :class:`Callee` or plain value.
        builders (Mapping[type, Callable]): Exact type of an object -> function that sets its state.
        storage (Callable): Returns the storage for a :class:`StorageId`.
        budget (int): Maximum number of characters and items passed to all calls together. Without
            it, a pickle could pass the same long string to many calls, each of which copies it.
        encoding (str): Encoding of strings from Python 2. Defaults to 'utf-8'.
    """

    dispatch = _Operations(_Machine.dispatch)

    def __init__(
        self,
        file: BinaryIO,
        names: Mapping[str, Any],
        builders: Mapping[type, Callable[[Any, Any], None]],
        storage: Callable[[StorageId], Any],
        budget: int,
        encoding: str = "utf-8",
    ):
        super().__init__(file, names, encoding)
        self.builders, self.storage, self.budget = builders, storage, budget

    def _named(self, path: str) -> Any:
        if path not in self.names:
            raise Refused(f"asks for {path}")
        return self.names[path]

    def _run(self, path: str, function: Callable | None, args: Any) -> Any:
        if function is None or type(args) is not tuple:
            raise Refused(_asked(path, args))
        sized = (str, bytes, list, tuple, dict)
        parts = [part for arg in args for part in (arg if type(arg) is tuple else (arg,))]
        self.budget -= sum(len(part) for part in parts if isinstance(part, sized))
        if self.budget < 0:
            asked = _asked(path, args)
            raise Refused(f"{asked} too often, for more data than the file contains")
        try:
            return function(*args)
        except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
            reason = shown((str(error).splitlines() or [""])[0], 150)
            raise Refused(f"{_asked(path, args)}: {reason}") from error

    def _reduce(self) -> None:
        args, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Callee):
            raise Refused(f"asks for a call of a {type(callee).__name__}")
        self.append(self._run(callee.path, callee.call, args))

    def _newobj(self) -> None:
        args, callee = self.stack.pop(), self.stack.pop()
        if not isinstance(callee, Callee):
            raise Refused(f"asks for an instance of a {type(callee).__name__}")
        self.append(self._run(f"{callee.path}.__new__", callee.new, args))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        builder = self.builders.get(type(target))
        if builder is None:
            raise Refused(f"asks for new attributes of {_show(target)}")
        self._run(f"{_show(target)}.__setstate__", builder, (target, state))

    def _binpersid(self) -> None:
        self.append(self.storage(_storage_id(self.stack.pop())))

    def _append(self) -> None:
        item = self.stack.pop()
        self._target(list, deque).append(item)

    def _appends(self) -> None:
        items = self.pop_mark()
        self._target(list, deque).extend(items)

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _additems(self) -> None:
        items = self.pop_mark()
        self._target(set).update(map(self._key, items))

    def _frozen_set(self) -> None:
        items = self.pop_mark()  # this also replaces self.append
        self.append(frozenset(map(self._key, items)))

    def _set_items(self, items: list) -> None:
        target = self._target(dict, OrderedDict, Counter, defaultdict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value

    def _target(self, *types: type) -> Any:
        if type(self.stack[-1]) not in types:
            raise Refused(f"asks for new items of {_show(self.stack[-1])}")
        return self.stack[-1]

    @staticmethod
    def _key(value: Any) -> Any:
        if not is_plain(value):
            raise Refused(f"asks for a {type(value).__name__} as a key")
        return value

    dispatch |= {
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozen_set,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.BUILD[0]: _build,
        pickle.BINPERSID[0]: _binpersid,
    }
