"""Receptive-field attention convolution (arXiv 2304.03198)."""

from rfa_mmdet.ops.receptive_field.autograd import Norm, fused_rfa_conv
from rfa_mmdet.ops.receptive_field.reference import (
    receptive_field_attention,
    receptive_field_mean,
    rfa_conv,
)

__all__ = [
    "Norm",
    "fused_rfa_conv",
    "receptive_field_attention",
    "receptive_field_mean",
    "rfa_conv",
]
