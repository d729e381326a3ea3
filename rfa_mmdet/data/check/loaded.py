"""The content of a dataset's annotation files that other checks need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine.dataset import BaseDataset


@dataclass(frozen=True)
class Loaded:
    """A dataset whose annotation files have been read.

    Attributes:
        labels (tuple[str, ...]): Class names in label order.
        images (list[str]): Image files that a run reads.
        boxes (int): Number of boxes that training learns from.
        sizes (list[tuple[int, int] | None] | None): Width and height of each image, where given.
        ids (set): Image ids that evaluators use; COCO only.
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
    """Apply a dataset's ``filter_cfg`` and ``indices`` to a list of images.

    Args:
        dataset (BaseDataset): A COCO or VOC dataset.
        images (Sequence): Any objects that represent the images.
        side (Callable): Returns an image's shorter side.
        filled (Callable): Returns whether an image counts as annotated.
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
