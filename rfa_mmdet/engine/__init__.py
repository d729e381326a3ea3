"""What happens around a run: checkpoints, hooks, pictures, checks."""

from rfa_mmdet.engine.complexity import install as _install_op_counts
from rfa_mmdet.engine.epoch_seed_hook import EpochSeedHook
from rfa_mmdet.engine.safe_checkpoint import install as _install_safe_checkpoint

__all__ = ["EpochSeedHook"]

_install_safe_checkpoint()
_install_op_counts()
