"""Assemblies on mmdet's registry."""

from rfa_mmdet.models.backbones import RFAResNet
from rfa_mmdet.models.necks import PluginFPN
from rfa_mmdet.models.retrofit.retrofit import retrofit

__all__ = ["PluginFPN", "RFAResNet", "retrofit"]
