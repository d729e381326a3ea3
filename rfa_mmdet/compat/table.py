"""The table of patches: what is replaced in other packages at run time, and why."""

from collections.abc import Callable
from typing import NamedTuple

from rfa_mmdet.compat import (
    flop_counts,
    mmseg_plugins,
    safe_loading,
    torchvision_weights,
    whole_files,
)
from rfa_mmdet.errors import UserError

VARIABLE = "RFA_MMDET_COMPAT"


class Patch(NamedTuple):
    """One replacement in another package.

    Attributes:
        name (str): Name in :data:`VARIABLE` and :func:`apply`.
        target (str): The replaced function or class.
        reason (str): What goes wrong without the patch.
        versions (str): Versions that need it.
        apply (Callable): Applies the patch in this process; calling it twice is harmless.
        on_import (bool): Whether ``import rfa_mmdet`` applies it, rather than only on request.
    """

    name: str
    target: str
    reason: str
    versions: str
    apply: Callable[[], None]
    on_import: bool


# To remove a patch once its versions are no longer supported, delete its entry and its module.
PATCHES = (
    Patch(
        "safe_loading",
        "mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint, and torch.load inside it; "
        "resume of Runner and FlexibleRunner, CheckpointHook.before_train, "
        "BaseInferencer._init_model; OneDL's _safe_torch_load",
        "torch 2.6 and later refuse MMEngine's training checkpoints, so --resume fails; older "
        "versions run any code that a checkpoint contains. Resuming executes the text in "
        "meta['config'], accepts state that does not fit the run, and removes the file that the "
        "checkpoint names as the best; an inferencer without a config executes the text in cfg. "
        "The tools use MMEngine's loader too, so they need the patch or another safe loader",
        "mmengine 0.10, on any torch",
        safe_loading.apply,
        on_import=True,
    ),
    Patch(
        "whole_files",
        "backend 'local' of mmengine.fileio",
        "a run killed while saving leaves a truncated checkpoint; on import, because this affects "
        "every trainer",
        "mmengine 0.10",
        whole_files.apply,
        on_import=True,
    ),
    Patch(
        "torchvision_weights",
        "MMEngine's loader for torchvision://",
        "MMDetection's ResNet-50 starts from torchvision://resnet50, for which MMEngine imports "
        "the package torchvision, which nothing else needs; it also does not check the file's hash",
        "mmengine 0.10",
        torchvision_weights.apply,
        on_import=True,
    ),
    Patch(
        "mmseg_plugins",
        "mmseg.models.backbones.resnet.Bottleneck.forward_plugin, where mmseg is installed",
        "each of several plug-ins at one place gets the same input, so that only the last one "
        "counts; MMDetection chains them",
        "mmsegmentation 1.x",
        mmseg_plugins.apply,
        on_import=True,
    ),
    Patch(
        "flop_counts",
        "default tables of mmengine.analysis.complexity_analysis",
        "MMDetection's get_flops.py cannot count the operators of attention layers; on request, "
        "because our own tool uses MMEngine's public API instead",
        "mmengine 0.10",
        flop_counts.apply,
        on_import=False,
    ),
)


def apply(name: str) -> None:
    """Apply one patch in this process, regardless of the environment variable.

    Args:
        name (str): Name of a patch in :data:`PATCHES`.

    Raises:
        UserError: The name is unknown.

    Example:
        >>> apply("flop_count")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: 'flop_count': no such patch; choose from safe_loading, ...
    """
    _named(name).apply()


def apply_on_import(choice: str) -> None:
    """Apply the default patches, plus or minus those that the user chooses.

    Args:
        choice (str): Comma-separated names: 'flop_counts' adds a patch, '-whole_files' removes one.
            '' applies the defaults.

    Raises:
        UserError: A name is unknown.

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
    raise UserError(f"{name!r}: no such patch; choose from {names}")
