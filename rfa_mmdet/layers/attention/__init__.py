"""Attention plug-ins: (B, C, H, W) in, the same shape out.

Each, as each convolution with attention, has ``attention_map(x)``: what it weighs its input by.
"""

from rfa_mmdet.layers.attention.cbam import CBAM
from rfa_mmdet.layers.attention.conam import ConAM
from rfa_mmdet.layers.attention.coord_att import CoordAtt
from rfa_mmdet.layers.attention.eca import ECA
from rfa_mmdet.layers.attention.ema import EMA
from rfa_mmdet.layers.attention.se import SE

__all__ = ["CBAM", "ECA", "EMA", "SE", "ConAM", "CoordAtt"]
