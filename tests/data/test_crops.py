"""Crops of the drawn shapes: which objects, and which pixels."""

import json
import math
import re
import sys
from collections import Counter

import cv2
import numpy as np
import pytest

from rfa_mmdet.cli.make_shapes import main
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
    """Without resizing, a crop is a part of the image, whose edge is repeated beyond its border."""
    make_shapes(tmp_path, num_train=12, num_val=1, max_objects=1)
    annotations, files = read(tmp_path, "train")
    outside = 0
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        side = round(1.25 * max(width, height))
        write_crops(tmp_path, side)
        (path,) = (tmp_path / "crops" / "train").glob(f"*/*_{annotation['id']}.png")
        image = cv2.imread(str(tmp_path / "JPEGImages" / files[annotation["image_id"]]))
        crop = cv2.imread(str(path))
        starts = [x + width / 2 - side / 2, y + height / 2 - side / 2]
        outside += min(starts) < -1 or max(starts) + side > 161
        # The centre may be rounded either way.
        places = [(math.floor(start), math.ceil(start)) for start in starts]
        columns, rows = ([np.arange(at, at + side) for at in own] for own in places)
        assert any(
            np.array_equal(crop, image[np.ix_(row.clip(0, 159), column.clip(0, 159))])
            for row in rows
            for column in columns
        )
    assert 0 < outside < len(annotations)


@pytest.mark.parametrize("size", [0, -3, 2.0, True])
def test_wrong_sizes_are_refused(size, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"size={size!r}: must be a positive int")):
        write_crops(tmp_path, size)


def test_tool_writes_crops(tmp_path, capsys, monkeypatch):
    options = ["--train", "3", "--val", "2", "--max-objects", "1", "--crops", "16"]
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", str(tmp_path / "set"), *options])
    main()
    assert "crops: 3 in train, 2 in val" in capsys.readouterr().out
    assert len(list(tmp_path.glob("set/crops/train/*/*.png"))) == 3


def test_wrong_arguments_of_the_tool_are_refused_before_anything_is_drawn(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", str(tmp_path / "set"), "--crops", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--crops: must be an integer of at least 1, got '0'" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"root={str(tmp_path)!r}: has no shapes.json")):
        write_crops(tmp_path)
