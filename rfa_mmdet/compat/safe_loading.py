"""Make MMEngine treat the content of checkpoints as data that it does not run or trust."""

from functools import cache, wraps

import torch
from mmengine.hooks import CheckpointHook
from mmengine.infer import BaseInferencer
from mmengine.runner import FlexibleRunner, Runner, checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints.run_files import keep_to_own_files
from rfa_mmdet.checkpoints.safe_loading import load_safely, resume_safely, safe_while_loading
from rfa_mmdet.errors import ConfigError


def _with_config(init_model):
    @wraps(init_model)
    def wrapped(self, cfg, weights, *args, **kwargs):
        if not cfg:
            raise ConfigError(
                f"{type(self).__name__}(weights={weights!r}): without a config, MMEngine would "
                "execute the config text in the checkpoint; pass the config that the run wrote to "
                "its work dir, model='CONFIG.py'"
            )
        return init_model(self, cfg, weights, *args, **kwargs)

    return wrapped


@cache  # wrap once
def apply() -> None:
    """Wrap MMEngine's loader, and ``torch.load``, which only changes its behaviour inside it.

    ``CheckpointLoader.load_checkpoint`` calls every registered loader, including those registered
    later, and these call ``torch.load``, some through ``torch.hub``. Also wrap everything that
    takes more than weights from a checkpoint.

    Example:
        >>> apply()
        >>> apply()
    """
    original = CheckpointLoader.load_checkpoint.__func__
    CheckpointLoader.load_checkpoint = classmethod(load_safely(original))
    # Under both names, so that torch.load can still be pickled, by the second.
    torch.load = torch.serialization.load = safe_while_loading(torch.load)
    if hasattr(checkpoint, "_safe_torch_load"):
        # While loading, OneDL's version adds getattr and more to torch's process-wide list of safe
        # names, which a load in another thread would take for the user's.
        checkpoint._safe_torch_load = lambda file, map_location=None, **_: torch.load(
            file, map_location=map_location
        )
    for kind in (Runner, FlexibleRunner):
        kind.resume = resume_safely(kind.resume)
    CheckpointHook.before_train = keep_to_own_files(CheckpointHook.before_train)
    BaseInferencer._init_model = _with_config(BaseInferencer._init_model)
