"""Modules under mmcv's conv and plug-in contracts, on MMEngine's root ``MODELS``."""

from rfa_mmdet.layers.attention import EMA, ConAM
from rfa_mmdet.layers.conv import RFAConv

__all__ = ["EMA", "ConAM", "RFAConv"]
