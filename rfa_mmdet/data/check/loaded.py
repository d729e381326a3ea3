"""What the annotation files of a dataset say, as far as the other checks need it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmengine.dataset import BaseDataset


@dataclass(frozen=True)
class Loaded:
    """A dataset after its annotation files were read.

    Attributes:
        labels (tuple[str, ...]): The class names by label, as the dataset numbers them.
        images (list[str]): The image files that a run would read.
        boxes (int): How many boxes a training would learn from.
    """

    labels: tuple[str, ...]
    images: list[str]
    boxes: int


def kept(
    dataset: BaseDataset,
    images: Sequence,
    side: Callable[[object], float],
    filled: Callable[[object], bool],
) -> list:
    """Return the images that ``filter_cfg`` and ``indices`` of the dataset leave.

    Args:
        dataset (BaseDataset): COCO or VOC.
        images (Sequence): Whatever stands for an image.
        side (Callable): Gives an image's shorter side.
        filled (Callable): Tells whether an image counts as annotated.
    """
    filter_cfg = {} if dataset.test_mode else (dataset.filter_cfg or {})
    smallest = filter_cfg.get("min_size", 0)
    images = [
        image
        for image in images
        if side(image) >= smallest and (filled(image) or not filter_cfg.get("filter_empty_gt"))
    ]
    if dataset._indices is not None:
        dataset.data_list = images
        images = dataset._get_unserialized_subset(dataset._indices)
    return images
