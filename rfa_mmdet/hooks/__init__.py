"""What a Runner's events call."""

from rfa_mmdet.hooks.calibration import CalibrationHook
from rfa_mmdet.hooks.epoch_seed import EpochSeedHook
from rfa_mmdet.hooks.new_layers import NewLayersHook

__all__ = ["CalibrationHook", "EpochSeedHook", "NewLayersHook"]
