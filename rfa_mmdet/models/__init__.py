"""Backbones, necks and Retrofit, on mmdet's registry."""

from rfa_mmdet.models.backbones import RFAResNet
from rfa_mmdet.models.necks import PluginFPN

# This function hides the package of the same name; import its modules by their full paths.
from rfa_mmdet.models.retrofit.retrofit import retrofit

__all__ = ["PluginFPN", "RFAResNet", "retrofit"]
