"""Receptive-field convolutions: RFAConv, RFCBAMConv and RFCAConv (arXiv 2304.03198)."""

from rfa_mmdet.ops.receptive_field import plain as plain
from rfa_mmdet.ops.receptive_field.functional import WindowFeatures, fold_batch_norm
from rfa_mmdet.ops.receptive_field.reference import (
    receptive_field_attention,
    receptive_field_mean,
    rfa_conv,
)

__all__ = [
    "WindowFeatures",
    "fold_batch_norm",
    "receptive_field_attention",
    "receptive_field_mean",
    "rfa_conv",
]
