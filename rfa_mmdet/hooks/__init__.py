"""Hooks for MMEngine's Runner."""

from rfa_mmdet.hooks.epoch_seed import EpochSeedHook

__all__ = ["EpochSeedHook"]
