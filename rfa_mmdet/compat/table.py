"""The table of all patches: what of somebody else's is replaced at run time, and why."""

from collections.abc import Callable
from typing import NamedTuple

from rfa_mmdet.compat import flop_counts, safe_loading, whole_files
from rfa_mmdet.errors import UserError

VARIABLE = "RFA_MMDET_COMPAT"


class Patch(NamedTuple):
    """One replacement in another package.

    Attributes:
        name (str): By which :data:`VARIABLE` and :func:`apply` know it.
        target (str): What is replaced.
        reason (str): What happens without it.
        versions (str): Those that need it.
        apply (Callable): Replaces it in this process; repeating it is harmless.
        on_import (bool): Whether ``import rfa_mmdet`` applies it; if not, it waits to be asked for.
    """

    name: str
    target: str
    reason: str
    versions: str
    apply: Callable[[], None]
    on_import: bool


# A patch goes when the last of its versions does: its line here, and the module that it names.
PATCHES = (
    Patch(
        "safe_loading",
        "mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint",
        "torch 2.6 and later refuse MMEngine's training checkpoints, so --resume fails; earlier "
        "ones run whatever code a file brings",
        "mmengine 0.10, on any torch",
        safe_loading.apply,
        on_import=True,
    ),
    Patch(
        "whole_files",
        "the backend 'local' of mmengine.fileio",
        "a run that is killed while it saves leaves half a checkpoint, whichever tool trains",
        "mmengine 0.10",
        whole_files.apply,
        on_import=True,
    ),
    Patch(
        "flop_counts",
        "the default tables of mmengine.analysis.complexity_analysis",
        "MMDetection's get_flops.py makes its analyzers itself, and they do not know the operators "
        "of attention; our own tool tells its analyzer without this",
        "mmengine 0.10",
        flop_counts.apply,
        on_import=False,
    ),
)


def apply(name: str) -> None:
    """Apply one patch in this process, whatever the environment says.

    Args:
        name (str): Of :data:`PATCHES`.

    Raises:
        UserError: There is no such patch.

    Example:
        >>> apply("flop_count")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: 'flop_count': no such patch; there are safe_loading, ...
    """
    _named(name).apply()


def apply_on_import(choice: str) -> None:
    """Apply what ``import rfa_mmdet`` does, as changed by the user.

    Args:
        choice (str): Names with commas between: 'flop_counts' applies it as well, '-whole_files'
            leaves it out. '': no change.

    Raises:
        UserError: There is no such patch.

    Example:
        >>> apply_on_import("-no_such")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: RFA_MMDET_COMPAT='-no_such': 'no_such': no such patch; ...
    """
    wanted = {patch.name: patch.on_import for patch in PATCHES}
    for word in filter(None, (part.strip() for part in choice.split(","))):
        try:
            wanted[_named(word.removeprefix("-")).name] = not word.startswith("-")
        except UserError as error:
            raise UserError(f"{VARIABLE}={choice!r}: {error}") from error
    for patch in PATCHES:
        if wanted[patch.name]:
            patch.apply()


def _named(name: str) -> Patch:
    for patch in PATCHES:
        if patch.name == name:
            return patch
    names = ", ".join(patch.name for patch in PATCHES)
    raise UserError(f"{name!r}: no such patch; there are {names}")
