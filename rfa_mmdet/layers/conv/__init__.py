"""Attention convolutions, usable wherever mmcv builds a convolution."""

from rfa_mmdet.layers.conv.attended_conv import CAConv, CAMConv, CBAMConv
from rfa_mmdet.layers.conv.rfa_conv import RFAConv
from rfa_mmdet.layers.conv.rfca_conv import RFCAConv
from rfa_mmdet.layers.conv.rfcbam_conv import RFCBAMConv

__all__ = ["CAConv", "CAMConv", "CBAMConv", "RFAConv", "RFCAConv", "RFCBAMConv"]
