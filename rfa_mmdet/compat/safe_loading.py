"""What a checkpoint holds is data for MMEngine, and nothing that it runs, trusts or removes."""

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
                f"{type(self).__name__}(weights={weights!r}): without a config, MMEngine executes "
                "the text that the checkpoint holds for one; name the file that the run wrote to "
                "its work dir, model='CONFIG.py'"
            )
        return init_model(self, cfg, weights, *args, **kwargs)

    return wrapped


@cache  # wrap once
def apply() -> None:
    """Wrap MMEngine's loader, and ``torch.load``, which acts differently only inside of that.

    Every registered loader, including those registered later, is called by
    ``CheckpointLoader.load_checkpoint``, and calls ``torch.load``, some of them by ``torch.hub``.
    Then wrap who takes more from a checkpoint than weights.

    Example:
        >>> apply()
        >>> apply()
    """
    original = CheckpointLoader.load_checkpoint.__func__
    CheckpointLoader.load_checkpoint = classmethod(load_safely(original))
    # under both of its names, so that pickle, which looks for the second, still finds the first
    torch.load = torch.serialization.load = safe_while_loading(torch.load)
    if hasattr(checkpoint, "_safe_torch_load"):
        # OneDL's puts getattr and more on torch's list of safe names, which is the whole process's,
        # while it loads; a load in another thread would believe that the user had done so.
        checkpoint._safe_torch_load = lambda file, map_location=None, **_: torch.load(
            file, map_location=map_location
        )
    for kind in (Runner, FlexibleRunner):
        kind.resume = resume_safely(kind.resume)
    CheckpointHook.before_train = keep_to_own_files(CheckpointHook.before_train)
    BaseInferencer._init_model = _with_config(BaseInferencer._init_model)
