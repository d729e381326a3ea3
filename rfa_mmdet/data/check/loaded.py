"""What the annotation files of a dataset say, as far as the other checks need it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine.dataset import BaseDataset


@dataclass(frozen=True)
class Loaded:
    """A dataset after its annotation files were read.

    Attributes:
        labels (tuple[str, ...]): The class names by label, as the dataset numbers them.
        images (list[str]): The image files that a run would read.
        boxes (int): How many boxes a training would learn from.
        sizes (list[tuple[int, int] | None] | None): Width and height of each image, where given.
        ids (set): What evaluators call the images; of COCO.
    """

    labels: tuple[str, ...]
    images: list[str]
    boxes: int
    sizes: list[tuple[int, int] | None] | None = None
    ids: set = field(default_factory=set)


def kept(
    dataset: BaseDataset,
    images: Sequence,
    side: Callable[[Any], float],
    filled: Callable[[Any], bool],
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
    left = [
        image
        for image in images
        if side(image) >= smallest and (filled(image) or not filter_cfg.get("filter_empty_gt"))
    ]
    if dataset._indices is None:
        return left
    dataset.data_list = left
    return dataset._get_unserialized_subset(dataset._indices)
