"""Load MMEngine's training checkpoints and run nothing of them, on any version of torch.

Before PyTorch 2.6 ``torch.load`` runs whatever a file asks for; since then it refuses the NumPy
arrays and the ``HistoryBuffer`` that MMEngine 0.10 puts in a training checkpoint, so ``--resume``
fails. Loads through MMEngine, and they alone, go to :func:`load` here: it makes tensors, plain data
and what the tables of :mod:`~rfa_mmdet.checkpoints.tensors` and
:mod:`~rfa_mmdet.checkpoints.stand_ins` name, in the same way everywhere.
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
        name (str): As the user named it.
        allowed (dict[str, Callee]): By the user, before MMEngine: OneDL's loader adds to torch's
            list, ``getattr`` among others, while it loads.
    """

    name: str
    allowed: dict[str, Callee]


_LOADING: ContextVar[_Loading | None] = ContextVar("loading", default=None)
# The Runner that resumes in this thread, and whether with its optimizer and schedulers.
_RESUMING: ContextVar[tuple[Any, bool, bool] | None] = ContextVar("resuming", default=None)


class UnsafeCheckpointError(UserError):
    """The checkpoint asks for more than tensors and plain data."""


class BrokenCheckpointError(UserError):
    """The file is cut off, or no checkpoint."""


def load(
    file: Any,
    map_location: Any = None,
    encoding: str = "utf-8",
    name: str = "",
    allowed: dict[str, Callee] | None = None,
) -> Any:
    """Load a file of ``torch.save``, and run nothing of it.

    What the user allowed by ``torch.serialization.add_safe_globals`` is allowed here too, except
    under the names in our own tables.

    Args:
        file (Any): Path, or open binary file.
        map_location (Any): As of ``torch.load``.
        encoding (str): Of Python 2's strings.
        name (str): Of the file, for errors.
        allowed (dict[str, Callee] | None): What the user allowed. Defaults to torch's list.

    Returns:
        Any: Its content.

    Raises:
        UnsafeCheckpointError: It asks for more than plain data.
        BrokenCheckpointError: It is truncated, or no such file.

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
    # ours last: real objects would not mix with stand-ins
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
        allow = ", or allow them by torch.serialization.add_safe_globals"
    return UnsafeCheckpointError(
        f"{name}: not loaded, as its pickle {error}; nothing of it was run. A "
        "checkpoint may hold tensors, numbers, strings, dicts, lists, tuples, NumPy arrays and "
        "MMEngine's log history. If the file comes from someone else, do not trust it. If it is "
        f"yours, save it again with plain values in their place{allow}."
    )


def _broken(name: str, size: int, error: Damaged) -> BrokenCheckpointError:
    return BrokenCheckpointError(
        f"{name} ({size} bytes) is incomplete, or no checkpoint of torch.save: {error}. Was the "
        "run killed while it was saving, or the download cut? Take an earlier checkpoint, or "
        "fetch it again."
    )


def load_safely(load_checkpoint: Callable) -> Callable:
    """Wrap MMEngine's ``CheckpointLoader.load_checkpoint``, which then loads by :func:`load`.

    What it returns are weights, and where a Runner resumes, the state of one that fits to it.

    Args:
        load_checkpoint (Callable): The function of the class method; takes the class first.

    Returns:
        Callable: With the same signature, for a torch with :func:`safe_while_loading`.
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
    """Wrap ``resume`` of MMEngine's Runner, which takes what it needs of a checkpoint and no more.

    Args:
        resume (Callable): The method.

    Returns:
        Callable: With the same signature, for a loader with :func:`load_safely`.
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
    """Wrap ``torch.load``: while MMEngine loads a checkpoint in this thread it is :func:`load`.

    Args:
        torch_load (Callable): Is called at any other time, with just what the wrapper is given.

    Returns:
        Callable: With the same signature; of the arguments, :func:`load` sees ``f``,
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
