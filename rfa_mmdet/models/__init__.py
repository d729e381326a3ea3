"""Assemblies on mmdet's registry."""

from rfa_mmdet.models.backbones import RFAResNet

__all__ = ["RFAResNet"]
