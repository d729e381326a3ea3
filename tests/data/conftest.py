"""Small data sets to be damaged."""

from tests.helpers.damaged_sets import coco, coco_made, voc, voc_made  # noqa: F401
