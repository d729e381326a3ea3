"""Safe loading for every checkpoint that MMEngine loads."""

from functools import cache

from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints.safe_loading import load_safely


@cache  # wrap once
def apply() -> None:
    """Wrap MMEngine's loader.

    Every registered loader, including those registered later, is called by
    ``CheckpointLoader.load_checkpoint``, so wrapping this one method is enough.

    Example:
        >>> apply()
        >>> apply()
    """
    original = CheckpointLoader.load_checkpoint.__func__
    CheckpointLoader.load_checkpoint = classmethod(load_safely(original))
