"""Load MMEngine's training checkpoints without running code from them, with any version of torch.

Before PyTorch 2.6, ``torch.load`` runs any code in a file; since then, it refuses the NumPy arrays
and the ``HistoryBuffer`` that MMEngine 0.10 saves in training checkpoints, so ``--resume`` fails.
Loads through MMEngine, and only those, use :func:`load` instead. It creates tensors, plain data and
the types listed in :mod:`~rfa_mmdet.checkpoints.tensors` and
:mod:`~rfa_mmdet.checkpoints.stand_ins`, the same way on every version.
"""

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

from rfa_mmdet.checkpoints import stand_ins, tensors
from rfa_mmdet.checkpoints.contents import check_weights
from rfa_mmdet.checkpoints.resume import taken_up
from rfa_mmdet.checkpoints.torch_files import Tables, read
from rfa_mmdet.checkpoints.unpickler import Callee, Damaged, Refused, UnknownNames
from rfa_mmdet.errors import UserError
from rfa_mmdet.ops.common.torch_versions import HAS_SAFE_GLOBALS
from rfa_mmdet.texts import shown


class _Loading(NamedTuple):
    """The checkpoint that MMEngine loads in this thread.

    Attributes:
        name (str): The name the user gave.
        allowed (dict[str, Callee]): Types that the user allowed, recorded before MMEngine runs:
            OneDL's loader temporarily adds to torch's list, e.g. ``getattr``.
    """

    name: str
    allowed: dict[str, Callee]


_LOADING: ContextVar[_Loading | None] = ContextVar("loading", default=None)
# The Runner resuming in this thread, and whether it resumes its optimizer and schedulers.
_RESUMING: ContextVar[tuple[Any, bool, bool] | None] = ContextVar("resuming", default=None)


class UnsafeCheckpointError(UserError):
    """The checkpoint contains more than tensors and plain data."""


class BrokenCheckpointError(UserError):
    """The file is truncated, or not a checkpoint."""


def load(
    file: Any,
    map_location: Any = None,
    encoding: str = "utf-8",
    name: str = "",
    allowed: dict[str, Callee] | None = None,
) -> Any:
    """Load a file written by ``torch.save`` without running code from it.

    Types allowed with ``torch.serialization.add_safe_globals`` are allowed here too, except for the
    names in our own tables.

    Args:
        file (Any): Path or open binary file.
        map_location (Any): As for ``torch.load``.
        encoding (str): Encoding of strings from Python 2. Defaults to 'utf-8'.
        name (str): Name of the file, for errors. Defaults to ``file``.
        allowed (dict[str, Callee] | None): Types allowed by the user. Defaults to torch's list.

    Returns:
        Any: The content.

    Raises:
        UnsafeCheckpointError: The file contains more than plain data.
        BrokenCheckpointError: The file is truncated, or not written by ``torch.save``.

    Example:
        >>> import io, torch
        >>> file = io.BytesIO()
        >>> torch.save(dict(a=torch.ones(2)), file)
        >>> load(file)
        {'a': tensor([1., 1.])}
    """
    is_path = isinstance(file, (str, os.PathLike))
    name = name or str(file)
    user = stand_ins.user_names() if allowed is None else allowed
    # Ours last, because real objects do not mix with stand-ins.
    tables = Tables(
        {**user, **tensors.NAMES, **stand_ins.NAMES},
        {
            **{c.value: stand_ins.build_real for c in user.values() if isinstance(c.value, type)},
            **tensors.BUILDERS,
            **stand_ins.BUILDERS,
        },
    )
    with open(file, "rb") if is_path else nullcontext(file) as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        try:
            return stand_ins.resolve(read(opened, map_location, tables, encoding))
        except Refused as error:
            raise _unsafe(name, error) from error
        except Damaged as error:
            raise _broken(name, size, error) from error


def _unsafe(name: str, error: Refused) -> UnsafeCheckpointError:
    allow = ""
    if isinstance(error, UnknownNames) and HAS_SAFE_GLOBALS:
        allow = ", or allow the types with torch.serialization.add_safe_globals"
    return UnsafeCheckpointError(
        f"{name}: not loaded, because its pickle {error}; no code from it was run. A checkpoint "
        "may contain tensors, numbers, strings, dicts, lists, tuples, NumPy arrays and MMEngine's "
        "log history. If the file comes from someone else, do not trust it. If it is yours, save "
        f"it again with plain values instead{allow}."
    )


def _broken(name: str, size: int, error: Damaged) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"{name} ({size} bytes) is truncated or not a checkpoint of torch.save: {error}. The run "
        "may have been killed while saving, or the download interrupted; use an earlier "
        "checkpoint, or download it again."
    )


def load_safely(load_checkpoint: Callable) -> Callable:
    """Wrap MMEngine's ``CheckpointLoader.load_checkpoint`` so that it uses :func:`load`.

    It then returns validated weights or, when a Runner resumes, a validated training state.

    Args:
        load_checkpoint (Callable): Function of the class method; takes the class first.

    Returns:
        Callable: The wrapper, with the same signature; requires :func:`safe_while_loading`.
    """

    @functools.wraps(load_checkpoint)
    def wrapped(cls, filename, map_location=None, logger="current"):
        token = _LOADING.set(_Loading(str(filename), stand_ins.user_names()))
        try:
            content = load_checkpoint(cls, filename, map_location, logger)
        finally:
            _LOADING.reset(token)
        try:
            check_weights(content)
            resuming = _RESUMING.get()
            return content if resuming is None else taken_up(content, *resuming)
        except Damaged as error:
            raise BrokenCheckpointError(f"{filename}: {error}") from error

    return wrapped


def resume_safely(resume: Callable) -> Callable:
    """Wrap ``resume`` of MMEngine's Runner so that it only takes what it needs from a checkpoint.

    Args:
        resume (Callable): The method to wrap.

    Returns:
        Callable: The wrapper, with the same signature; requires :func:`load_safely`.
    """

    @functools.wraps(resume)
    def wrapped(
        self, filename, resume_optimizer=True, resume_param_scheduler=True, *args, **kwargs
    ):
        token = _RESUMING.set((self, resume_optimizer, resume_param_scheduler))
        try:
            return resume(self, filename, resume_optimizer, resume_param_scheduler, *args, **kwargs)
        except UserError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            what = shown(f"{type(error).__name__}: {error}", 300)
            raise BrokenCheckpointError(f"{filename}: cannot be resumed: {what}") from error
        finally:
            _RESUMING.reset(token)

    return wrapped


def safe_while_loading(torch_load: Callable) -> Callable:
    """Wrap ``torch.load`` so that it is :func:`load` while MMEngine loads a checkpoint.

    This only affects the loading thread.

    Args:
        torch_load (Callable): Called with the original arguments at any other time.

    Returns:
        Callable: The wrapper, with the same signature; :func:`load` only gets ``f``,
        ``map_location`` and ``encoding``.
    """

    def load_here(loading, f, map_location=None, *_, encoding="utf-8", **__):
        return load(f, map_location, encoding, *loading)

    @functools.wraps(torch_load)
    def wrapped(*args, **kwargs):
        loading = _LOADING.get()
        if loading is None:
            return torch_load(*args, **kwargs)
        return load_here(loading, *args, **kwargs)

    return wrapped
