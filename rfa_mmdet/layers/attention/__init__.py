"""Attention plug-ins that keep the input shape (B, C, H, W).

Like the attention convolutions, each has ``attention_map(x)``, which returns the weights that it
applies to its input.
"""

from rfa_mmdet.layers.attention.cbam import CBAM
from rfa_mmdet.layers.attention.conam import ConAM
from rfa_mmdet.layers.attention.coord_att import CoordAtt
from rfa_mmdet.layers.attention.eca import ECA
from rfa_mmdet.layers.attention.ema import EMA
from rfa_mmdet.layers.attention.se import SE

__all__ = ["CBAM", "ECA", "EMA", "SE", "ConAM", "CoordAtt"]
