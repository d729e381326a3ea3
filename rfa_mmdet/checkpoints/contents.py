"""Validate the content of checkpoints before MMEngine uses it."""

from numbers import Real
from typing import Any

from torch import Tensor

from rfa_mmdet.checkpoints.unpickler import Damaged
from rfa_mmdet.texts import shown

_LONGEST = 1000


def check_weights(content: Any) -> None:
    """Check that MMEngine and MMDetection can load weights from a file's content and print it.

    Args:
        content (Any): The file's content.

    Raises:
        Damaged: It is not a dict of weights, and has none under 'state_dict'.

    Example:
        >>> check_weights([1, 2])
        Traceback (most recent call last):
        rfa_mmdet.checkpoints.unpickler.Damaged: contains a list, not a dict
    """
    if not isinstance(content, dict):
        raise Damaged(f"contains a {type(content).__name__}, not a dict")
    state = content
    if "state_dict" in content:
        state = require_dict(content["state_dict"], "its state_dict")
        meta = content.get("meta")
        meta = {} if meta is None else require_dict(meta, "its meta")
        if meta.get("dataset_meta") is not None:
            require_names(meta["dataset_meta"], "its meta['dataset_meta']")
    require_names(state, "its state dict")
    versions = require_dict(getattr(state, "_metadata", {}), "its state_dict._metadata")
    for key, value in versions.items():
        if not isinstance(key, str):
            raise Damaged(f"its state_dict._metadata has the key {shown(repr(key))}")
        version = require_dict(value, f"its state_dict._metadata[{key!r}]").get("version")
        if not isinstance(version, (int, type(None))):
            raise Damaged(f"its state_dict._metadata[{key!r}] has the version {version!r}")


def require_dict(value: Any, what: str) -> dict:
    """Return a dict, or raise :class:`Damaged` for anything else, calling it ``what``."""
    if not isinstance(value, dict):
        raise Damaged(f"{what} is a {type(value).__name__}, not a dict")
    return value


def require_names(value: Any, what: str) -> dict:
    """Return a dict whose keys are printable names, or raise :class:`Damaged`."""
    for key in require_dict(value, what):
        if not is_name(key):
            raise Damaged(
                f"{what} has the key {shown(repr(key))}; keys must be short printable strings"
            )
    return value


def is_name(key: Any) -> bool:
    r"""Return whether a key is a printable name, safe for logs.

    Example:
        >>> is_name("backbone.conv1.weight"), is_name("\n"), is_name(3)
        (True, False, False)
    """
    return type(key) is str and key.isprintable() and len(key) <= _LONGEST


def is_number(value: Any) -> bool:
    """Return whether a value is a number, including tensors and NumPy scalars of one element."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def alike(value: Any, own: Any) -> bool:
    """Return whether a value could replace an optimizer's or scheduler's own one."""
    if own is None or isinstance(own, bool):
        return value is None or is_number(value)
    if is_number(own):
        return is_number(value)
    if isinstance(own, (list, tuple)):
        return isinstance(value, (list, tuple)) and all(alike(v, o) for o in own[:1] for v in value)
    return type(value) is type(own)


def shape_of(value: Any) -> Any:
    """Return the shape of a tensor with data, or a description of anything else."""
    if not isinstance(value, Tensor) or value.is_meta:
        return f"a {type(value).__name__}, not a tensor"
    return tuple(value.shape)


def such_as(names: list) -> str:
    """Return the first of many names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
