"""What happens around a run: checkpoints, hooks, pictures, checks."""

from rfa_mmdet.engine.calibration_hook import CalibrationHook
from rfa_mmdet.engine.complexity import install as _install_op_counts
from rfa_mmdet.engine.epoch_seed_hook import EpochSeedHook
from rfa_mmdet.engine.new_layers_hook import NewLayersHook
from rfa_mmdet.engine.safe_checkpoint import install as _install_safe_checkpoint

__all__ = ["CalibrationHook", "EpochSeedHook", "NewLayersHook"]

_install_safe_checkpoint()
_install_op_counts()
