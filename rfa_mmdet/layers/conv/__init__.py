"""Convolutions that weigh what they see; each stands wherever mmcv builds a convolution."""

from rfa_mmdet.layers.conv.rfa_conv import RFAConv

__all__ = ["RFAConv"]
