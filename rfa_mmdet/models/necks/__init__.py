"""Necks."""

from rfa_mmdet.models.necks.plugin_fpn import PluginFPN

__all__ = ["PluginFPN"]
