"""Every checkpoint that is loaded through MMEngine is loaded safely."""

from functools import cache

from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints.safe_loading import load_safely


@cache  # a second wrapper would do the same once more
def apply() -> None:
    """Wrap MMEngine's loader.

    All of its loaders, also those that are registered later, run inside
    ``CheckpointLoader.load_checkpoint``, so this one method is enough.

    Example:
        >>> apply()
        >>> apply()
    """
    original = CheckpointLoader.load_checkpoint.__func__
    CheckpointLoader.load_checkpoint = classmethod(load_safely(original))
