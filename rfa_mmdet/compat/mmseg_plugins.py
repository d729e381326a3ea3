"""Chain several plug-ins at one place of MMSegmentation's ResNet, as MMDetection does."""

from contextlib import suppress
from importlib.util import find_spec

from mmdet.models.backbones.resnet import Bottleneck


def apply() -> None:
    """Replace ``forward_plugin`` of MMSegmentation's Bottleneck, if MMSegmentation is installed.

    Example:
        >>> apply()
        >>> apply()
    """
    if find_spec("mmseg") is None:
        return
    # One that cannot be imported, e.g. beside another mmcv, builds no Bottleneck either.
    with suppress(ImportError, AssertionError):
        from mmseg.models.backbones import resnet

        resnet.Bottleneck.forward_plugin = Bottleneck.forward_plugin
