"""Small datasets to damage."""

from tests.helpers.damaged_sets import coco, coco_made, voc, voc_made  # noqa: F401
