"""What a Runner's events call."""

from rfa_mmdet.hooks.epoch_seed import EpochSeedHook
from rfa_mmdet.hooks.new_layers import NewLayersHook

__all__ = ["EpochSeedHook", "NewLayersHook"]
