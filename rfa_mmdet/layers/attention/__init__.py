"""Attention plug-ins: (B, C, H, W) in, the same shape out."""

from rfa_mmdet.layers.attention.conam import ConAM
from rfa_mmdet.layers.attention.ema import EMA

__all__ = ["EMA", "ConAM"]
