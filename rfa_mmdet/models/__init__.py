"""Assemblies on mmdet's registry."""

from rfa_mmdet.models.backbones import RFAResNet
from rfa_mmdet.models.necks import PluginFPN

# The function: it hides the package of its name, whose modules are imported by their full paths.
from rfa_mmdet.models.retrofit.retrofit import retrofit

__all__ = ["PluginFPN", "RFAResNet", "retrofit"]
