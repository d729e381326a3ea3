"""Support ``torchvision://`` in configs without the package torchvision."""

from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints.pretrained import TORCHVISION, load_from_torchvision


def apply() -> None:
    """Replace MMEngine's loader.

    Example:
        >>> apply()
        >>> apply()
    """
    CheckpointLoader.register_scheme(prefixes=TORCHVISION, loader=load_from_torchvision, force=True)
