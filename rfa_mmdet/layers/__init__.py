"""Convolutions and plug-ins for mmcv, registered with MMEngine's root ``MODELS``."""

from rfa_mmdet.layers.attention import CBAM, ECA, EMA, SE, ConAM, CoordAtt
from rfa_mmdet.layers.conv import CAConv, CAMConv, CBAMConv, RFAConv, RFCAConv, RFCBAMConv

__all__ = [
    "CBAM",
    "ECA",
    "EMA",
    "SE",
    "CAConv",
    "CAMConv",
    "CBAMConv",
    "ConAM",
    "CoordAtt",
    "RFAConv",
    "RFCAConv",
    "RFCBAMConv",
]
