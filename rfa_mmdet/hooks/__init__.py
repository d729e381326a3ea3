"""What a Runner's events call."""

from rfa_mmdet.hooks.epoch_seed import EpochSeedHook

__all__ = ["EpochSeedHook"]
