"""Backbones."""

from rfa_mmdet.models.backbones.rfa_resnet import RFAResNet

__all__ = ["RFAResNet"]
