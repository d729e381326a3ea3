"""Crops of the drawn shapes: which objects, and which pixels."""

import json
import re
import sys
from collections import Counter

import cv2
import numpy as np
import pytest

from rfa_mmdet.data.crops import write_crops
from rfa_mmdet.data.shapes import make_shapes
from rfa_mmdet.errors import UserError


def read(root, split):
    """Return the annotations of a split, and the files of its images by ID."""
    coco = json.loads((root / "annotations" / f"{split}.json").read_text())
    return coco["annotations"], {image["id"]: image["file_name"] for image in coco["images"]}


def test_every_object_is_cropped_into_the_folder_of_its_class(tmp_path):
    make_shapes(tmp_path, num_train=20, num_val=5)
    counts = write_crops(tmp_path, 24)
    for split in ("train", "val"):
        annotations, _ = read(tmp_path, split)
        names = ["circle", "square", "triangle", "star"]
        labels = [names[one["category_id"] - 1] for one in annotations]
        files = list((tmp_path / "crops" / split).glob("*/*.png"))
        assert Counter(file.parent.name for file in files) == Counter(labels)
        assert counts[split] == len(labels)
        assert {cv2.imread(str(file)).shape for file in files} == {(24, 24, 3)}


def test_crop_has_the_pixels_around_its_object(tmp_path):
    """Without resizing, a crop is a part of the image, in which its object is centred."""
    make_shapes(tmp_path, num_train=12, num_val=1, max_objects=1)
    annotations, files = read(tmp_path, "train")
    compared = 0
    for one in annotations:
        x, y, width, height = one["bbox"]
        side = round(1.25 * max(width, height))
        write_crops(tmp_path, side)
        (path,) = (tmp_path / "crops" / "train").glob(f"*/*_{one['id']}.png")
        crop = cv2.imread(str(path))
        image = cv2.imread(str(tmp_path / "JPEGImages" / files[one["image_id"]]))
        left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
        if min(left, top) < 0 or max(left, top) + side > 160:
            continue  # beyond the border, the image's edge is repeated
        differences = cv2.matchTemplate(image, crop, cv2.TM_SQDIFF)
        row, column = np.unravel_index(differences.argmin(), differences.shape)
        assert np.array_equal(image[row : row + side, column : column + side], crop)
        assert max(abs(column - left), abs(row - top)) <= 0.5
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("size", [0, -3, 2.0, True])
def test_wrong_sizes_are_refused(size, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"size={size!r}: must be a positive int")):
        write_crops(tmp_path, size)


def test_tool_writes_crops(run_tool, tmp_path):
    options = ("--train", 3, "--val", 2, "--max-objects", 1, "--crops", 16)
    done = run_tool(sys.executable, "tools/make_shapes.py", tmp_path / "set", *options)
    assert done.returncode == 0, done.stdout
    assert "crops: 3 in train, 2 in val" in done.stdout
    assert len(list(tmp_path.glob("set/crops/train/*/*.png"))) == 3
