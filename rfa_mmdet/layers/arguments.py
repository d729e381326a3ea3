"""Check the arguments and inputs of layers, and show inherited arguments in signatures."""

import inspect
from collections.abc import Callable
from functools import wraps
from numbers import Integral
from typing import Any, TypeVar

from torch import Tensor

Init = TypeVar("Init", bound=Callable[..., None])

LARGEST = 2**20  # limit of every int, so that products of a few of them do not overflow
LARGEST_WINDOW = 2**15  # positions; a channel has a weight for each pair of them
LARGEST_SIDE = 181  # side of a square window


def with_arguments_of(parent: type) -> Callable[[Init], Init]:
    """Show a parent's arguments in the signature of a constructor that forwards them.

    For a constructor with ``*args``, its own keyword arguments and ``**kwargs``,
    :func:`inspect.signature` and :func:`help` list the parent's arguments, with defaults and
    annotations, instead of ``*args`` and ``**kwargs``. Positional-only arguments of the parent are
    not listed. Unknown keyword arguments raise a :class:`TypeError` that lists the valid ones.

    Args:
        parent (type): The class whose constructor gets ``*args`` and ``**kwargs``.

    Returns:
        Callable: Decorator for ``__init__``.

    Example:
        >>> class Pool:
        ...     def __init__(self, size: int, stride: int = 1) -> None: ...
        >>> class SoftPool(Pool):
        ...     @with_arguments_of(Pool)
        ...     def __init__(self, *args, beta: float = 1.0, **kwargs) -> None: ...
        >>> inspect.signature(SoftPool)
        <Signature (size: int, stride: int = 1, *, beta: float = 1.0) -> None>
    """
    inherited = [
        p for p in inspect.signature(parent).parameters.values() if p.kind is not p.POSITIONAL_ONLY
    ]

    def decorate(init: Init) -> Init:
        own = inspect.signature(init).parameters.values()
        first = [p for p in own if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        last = [p for p in own if p.kind is p.KEYWORD_ONLY]
        signature = inspect.Signature([*first, *inherited, *last], return_annotation=None)

        valid = list(signature.parameters)[1:]
        owner = init.__qualname__.removesuffix(".__init__")

        @wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            # Otherwise, Python's error would name a base class.
            for name in kwargs:
                if name not in valid:
                    raise TypeError(
                        f"{owner}() got an unexpected keyword argument {name!r}; valid: "
                        f"{', '.join(valid)}"
                    )
            init(self, *args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


def positive_int(name: str, value: Any, largest: int = LARGEST) -> int:
    """Return an int or NumPy integer as an int.

    Raises:
        TypeError: The value is not an int.
        ValueError: The value is not from 1 to ``largest``.

    Example:
        >>> positive_int("groups", 0)
        Traceback (most recent call last):
        ValueError: groups=0: must be at least 1
    """
    return _int_from(1, name, value, largest)


def odd_int(name: str, value: Any, largest: int = LARGEST) -> int:
    """Return an odd int, for a kernel size that can keep the size of the map.

    Raises:
        TypeError, ValueError: See :func:`positive_int`; or the value is even.

    Example:
        >>> odd_int("kernel_size", 4)
        Traceback (most recent call last):
        ValueError: kernel_size=4: must be odd, to keep the size
    """
    number = positive_int(name, value, largest)
    if number % 2 == 0:
        raise ValueError(f"{name}={number}: must be odd, to keep the size")
    return number


def int_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Return an int or a pair of ints as a pair (vertical, horizontal).

    Raises:
        TypeError: The value is neither an int nor a pair of ints.
        ValueError: One of the ints is below ``minimum`` or above 2**20.

    Example:
        >>> int_pair("stride", 2, minimum=1)
        (2, 2)
        >>> int_pair("padding", (0, 1), minimum=0)
        (0, 1)
    """
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise TypeError(f"{name}={value!r}: must be an int or a pair of ints")
        return _int_from(minimum, name, value[0]), _int_from(minimum, name, value[1])
    if isinstance(value, str):  # as Conv2d's padding="same"
        raise TypeError(f"{name}={value!r}: must be an int or a pair of ints")
    return (_int_from(minimum, name, value),) * 2


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool, because strings such as "False" are true.

    Raises:
        TypeError: The value is not a bool.

    Example:
        >>> boolean("bias", "False")
        Traceback (most recent call last):
        TypeError: bias='False': must be a bool, not str
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be a bool, not {type(value).__name__}")
    return value


def check_feature_map(layer: str, x: Any, in_channels: int) -> None:
    """Raise unless ``x`` is a floating-point tensor (B, in_channels, H, W) with H, W > 0.

    Raises:
        TypeError: The input is not a floating-point tensor.
        ValueError: The input has the wrong rank, the wrong number of channels, or an empty map.

    Example:
        >>> import torch
        >>> check_feature_map("EMA", torch.rand(2, 8, 4, 4), 16)
        Traceback (most recent call last):
        ValueError: EMA: input has 8 channels (shape (2, 8, 4, 4)), but in_channels=16
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{layer}: input must be a floating-point tensor, not {found}")
    shape = tuple(x.shape)
    if len(shape) != 4:
        raise ValueError(f"{layer}: input has shape {shape}; must be (B, C, H, W)")
    if shape[1] != in_channels:
        raise ValueError(
            f"{layer}: input has {shape[1]} channels (shape {shape}), but in_channels={in_channels}"
        )
    if shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{layer}: input has an empty map (shape {shape})")


def _int_from(minimum: int, name: str, value: Any, largest: int = LARGEST) -> int:
    # bool is a subclass of int, but a misplaced bias=True is not a kernel_size.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}: must be an int, not {type(value).__name__}")
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name}={number}: must be at least {minimum}")
    if number > largest:
        raise ValueError(f"{name}={number}: must be from {minimum} to {largest}")
    return number
