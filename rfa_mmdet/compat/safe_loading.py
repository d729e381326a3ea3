"""Safe loading for every checkpoint that MMEngine loads."""

from functools import cache

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints.safe_loading import load_safely, safe_while_loading


@cache  # wrap once
def apply() -> None:
    """Wrap MMEngine's loader, and ``torch.load``, which acts differently only inside of that.

    Every registered loader, including those registered later, is called by
    ``CheckpointLoader.load_checkpoint``, and calls ``torch.load``, some of them by ``torch.hub``.

    Example:
        >>> apply()
        >>> apply()
    """
    original = CheckpointLoader.load_checkpoint.__func__
    CheckpointLoader.load_checkpoint = classmethod(load_safely(original))
    # under both of its names, so that pickle, which looks for the second, still finds the first
    torch.load = torch.serialization.load = safe_while_loading(torch.load)
