"""Values in COCO files that break or mislead MMDetection or pycocotools."""

import json
import math
import subprocess

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.logging import MMLogger

from rfa_mmdet.data.check import check_data
from tests.helpers.damaged_sets import (
    coco_content,
    coco_dataset,
    config,
    edit_json,
    every,
    setting,
    told_of,
)

LOAD_MASKS = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_mask=True)]
RECTANGLE = [[5, 5, 25, 5, 25, 25, 5, 25]]


HUGE = 10**400
IDS = [[1], {}, "1", "", 1.5, True, HUGE, 2**60, math.nan]


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("images", "id", [*IDS, None]),
        ("images", "width", [0, -1, "64", None, math.nan, math.inf, 64.5, [64], True, HUGE]),
        ("images", "height", [0, "48", None, {}]),
        ("images", "file_name", ["", None, 7, ["a.jpg"], "a\0.jpg", "a\ud800.jpg", "a\n.jpg"]),
        ("annotations", "id", [*IDS, None]),
        ("annotations", "image_id", [*IDS, None]),
        ("annotations", "category_id", [*IDS, None, "11"]),
        (
            "annotations",
            "bbox",
            [
                *(None, "1234", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, "4"], [1, 2, 3, None]),
                *([1, 2, 3, math.nan], [-math.inf, 2, 3, 4], [1, 2, 3, HUGE]),
                *({"x": 1}, [[1, 2, 3, 4]]),
            ],
        ),
        ("annotations", "area", [None, "400", math.nan, math.inf, [400], True]),
        ("annotations", "iscrowd", ["0", "", 2, -1, [0], math.nan]),
        ("annotations", "ignore", ["0", 2, [0]]),
        ("categories", "id", [*IDS, None]),
        ("categories", "name", [None, "", 7, ["cat"], "ca\0t", "c\x1b[31mat", "c\ud800"]),
    ],
)
def test_invalid_value_is_reported_with_field_and_count(coco, name, key, values):
    whole = (coco / "train.json").read_text()
    for value in values:
        (coco / "train.json").write_text(whole)
        lines = told_of(coco, setting(name, **{key: value}))
        count = len(json.loads(whole)[name])
        # Also "none", if a named category no longer exists.
        reported = [
            line for line in lines if f"1 of {count} {name} have " in line and f"'{key}'" in line
        ]
        assert reported, (value, lines)
        assert f"{coco}/train.json" in reported[0]
        assert f"{name}[1]" in reported[0]
        assert "it must be" in reported[0]


def test_invalid_values_are_counted_by_field(coco):
    def change(content):
        every("annotations", "area", lambda _: "400")(content)
        every("annotations", "category_id", str)(content)
        every("images", "width", lambda _: 0)(content)

    lines = told_of(coco, change)
    assert lines[0] == "3 problems with the data:"
    assert "4 of 4 images have an invalid 'width', e.g. 0 (4)" in lines[1]
    assert "6 of 6 annotations have an invalid 'category_id', e.g. '10' (2), '11' (2)" in lines[2]
    assert "6 of 6 annotations have an invalid 'area', e.g. '400' (6)" in lines[3]


@pytest.mark.parametrize(
    ("change", "split"),
    [
        (every("annotations", "iscrowd", lambda _: None), "val"),
        (every("annotations", "iscrowd", str), "val"),
        (every("annotations", "iscrowd", str), "train"),
        (every("annotations", "id", lambda i: i - 1), "val"),
        (every("annotations", "id", lambda i: 5), "val"),
        (every("annotations", "id", lambda i: [i]), "train"),
        (every("annotations", "id", lambda i: "0" if i == 1 else str(i)), "val"),
        (every("annotations", "area", lambda _: None), "train"),
        (every("annotations", "area", str), "train"),
        (every("annotations", "category_id", str), "train"),
        (every("annotations", "category_id", lambda i: i - 1), "train"),
        (every("annotations", "image_id", str), "val"),
        (every("annotations", "bbox", lambda box: [str(v) for v in box]), "train"),
        (every("images", "width", str), "train"),
        (every("categories", "id", str), "train"),
    ],
)
def test_suggested_command_fixes_the_file(coco, change, split):
    lines = told_of(coco, change, split)
    for _ in range(2):  # two fields may be invalid
        line = next((line for line in lines if "To fix the file:  " in line), None)
        if line is None:
            break
        subprocess.run(line.split("To fix the file:  ")[1], shell=True, check=True)
        lines = told_of(coco, lambda content: None, split)
    assert lines == []
    assert len(json.loads((coco / f"{split}.json").read_text())["annotations"]) == 6


def test_suggested_command_removes_annotations_without_category(coco):
    (line,) = told_of(coco, setting("annotations", category_id=99))
    assert "1 of 6 annotations have a 'category_id' without a category: 99 (1)" in line
    subprocess.run(line.split("To fix the file:  ")[1], shell=True, check=True)
    assert told_of(coco, lambda content: None) == []
    assert len(json.loads((coco / "train.json").read_text())["annotations"]) == 5


def test_file_names_from_urls(coco):
    def change(content):
        for image in content["images"]:
            image["coco_url"] = f"http://images.test/{image.pop('file_name')}"

    (line,) = told_of(coco, change)
    assert "4 of 4 images have no 'file_name'" in line
    subprocess.run(line.split("To fix the file:  ")[1], shell=True, check=True)
    assert told_of(coco, lambda content: None) == []


# --- what is harmless stays possible, and measures what it should


def average_precision(coco, **metric):
    """Return the AP of a perfect detector, with MMDetection's own dataset and metric."""
    MMLogger.get_instance("mmengine", log_level="ERROR")
    dataset = DATASETS.build(coco_dataset(coco, "val", pipeline=[], _scope_="mmdet"))
    metric = CocoMetric(ann_file=str(coco / "val.json"), **metric)
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        boxes = [instance["bbox"] for instance in info["instances"]]
        predictions = dict(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=torch.linspace(1, 0.5, len(boxes)),
            labels=torch.tensor([instance["bbox_label"] for instance in info["instances"]]).long(),
        )
        sample = dict(img_id=info["img_id"], ori_shape=(48, 64), pred_instances=predictions)
        metric.process({}, [sample])
    return metric.evaluate(len(dataset))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        every("images", "id", float),
        every("images", "width", float),
        every("annotations", "iscrowd", bool),
        every("annotations", "iscrowd", float),
        every("annotations", "id", lambda i: -i),
        every("annotations", "category_id", float),
        every("annotations", "segmentation", lambda _: []),  # no masks needed
        lambda content: content.update(info=[], licenses=7),
        lambda content: content["annotations"].reverse(),
        lambda content: (
            every("images", "id", "i{}".format)(content),
            every("annotations", "image_id", "i{}".format)(content),
        ),
    ],
)
def test_accepted_files_evaluate_correctly(coco, change):
    assert told_of(coco, change, "val") == []
    assert average_precision(coco)["coco/bbox_mAP"] == 1


def test_annotation_ids_are_arbitrary_in_training(coco):
    for make in (lambda i: i - 1, str):
        assert told_of(coco, every("annotations", "id", make)) == []
        assert len(DATASETS.build(coco_dataset(coco, pipeline=[], _scope_="mmdet"))) == 4


def test_iscrowd_is_optional_in_training(coco):
    assert told_of(coco, setting("annotations", iscrowd=None)) == []


def test_annotation_id_0_lowers_ap(coco):
    lines = told_of(coco, every("annotations", "id", lambda i: i - 1), "val")
    assert "1 of 6 annotations have the 'id' 0" in lines[0]
    assert average_precision(coco)["coco/bbox_mAP"] < 1


def test_evaluation_without_boxes_would_give_minus_1(coco):
    for change in (
        lambda content: content.update(annotations=[]),
        every("annotations", "iscrowd", lambda _: 1),
        every("annotations", "image_id", lambda i: i + 70),
    ):
        (coco / "val.json").write_text(json.dumps(coco_content()))
        lines = told_of(coco, change, "val")
        assert any("none of the" in line and "AP would be -1" in line for line in lines)
    only_writes = dict(format_only=True, outfile_prefix="results")
    assert not any("AP" in line for line in told_of(coco, change, "val", metric=only_writes))


def test_evaluation_file_without_the_splits_images(coco):
    (coco / "test.json").write_text((coco / "val.json").read_text())
    evaluator = dict(type="CocoMetric", ann_file=str(coco / "test.json"))
    cfg = config({}, coco_dataset(coco, "val"), None, val_evaluator=evaluator)
    assert check_data(cfg, ("val",)) == []
    edit_json(coco / "test.json", lambda c: c["images"].append({**c["images"][0], "id": 9}))
    (warning,) = check_data(cfg, ("val",))
    assert "1 of the 5 images of" in warning
    assert "are not in the split: their boxes count as missed" in warning
    edit_json(coco / "test.json", lambda c: c["images"].pop(0))
    with pytest.raises(ValueError, match="1 of the 4 images that the split reads are not in"):
        check_data(cfg, ("val",))
    edit_json(coco / "test.json", lambda c: c.update(coco_content()))
    edit_json(coco / "test.json", lambda c: c["categories"].reverse())
    with pytest.raises(ValueError, match="has the classes 'traffic light', 'dog', 'cat'"):
        check_data(cfg, ("val",))


def test_classwise_needs_sorted_categories(coco):
    def change(content):
        for category, number in zip(content["categories"], (12, 11, 10), strict=True):
            category["id"] = number
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 10]
        content["annotations"][0]["bbox"] = [0, 0, 0.5, 0.5]  # a dog that is not detected

    (line,) = (
        line
        for line in told_of(coco, change, "val", metric=dict(classwise=True))
        if "classwise" in line
    )
    assert "are not sorted by id" in line
    with np.errstate(all="ignore"):
        measured = average_precision(coco, classwise=True)
    assert math.isnan(measured["coco/cat_precision"])  # cats have boxes, unlike traffic lights


# --- boxes that are dropped


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting("annotations", bbox=[5, 5, 0.5, 9]), "narrower than 1 pixel"),
        (setting("annotations", area=0), "area of 0 or less"),
        (setting("annotations", bbox=[70, 5, 20, 20]), "outside the image's width and height"),
    ],
)
def test_dropped_boxes_are_counted(coco, change, words):
    (line,) = told_of(coco, change)
    assert "1 of 6 boxes" in line
    assert words in line
    theirs = DATASETS.build(coco_dataset(coco, pipeline=[], _scope_="mmdet"))
    assert sum(len(theirs.get_data_info(i)["instances"]) for i in range(4)) == 5


def test_images_skipped_by_min_size_are_counted(coco):
    lines = told_of(coco, setting("images", height=9), filter_cfg=dict(min_size=10))
    assert any("1 of 4 images are skipped" in line for line in lines)


def test_image_with_two_ids(coco):
    (line,) = told_of(coco, setting("images", file_name="0.jpg"))
    assert "1 image files occur more than once in" in line


# --- masks


MASKS = [
    (None, "missing or empty"),
    ([], "missing or empty"),
    ({}, "missing or empty"),
    ([5, 5, 20, 20], "such as [5, 5, 20, 20]"),
    ([[5, 5, 20, 20]], "fewer than 3 points"),
    ([[5, 5, 20, 20, 7]], "fewer than 3 points"),
    ([[]], "fewer than 3 points"),
    ([*RECTANGLE, [5, 5, 6, 6]], "fewer than 3 points"),
    ([[1, 2, 3, 4, 5, math.nan]], "not numbers"),
    ([[1, 2, 3, 4, 5, "6"]], "not numbers"),
    ([[1, 2, 3, 4, 5, 1e12]], "not numbers"),
    ("polygon", "such as 'polygon'"),
    (7, "such as 7"),
    ({"counts": [3072]}, "such as {"),
    ({"size": [48, 64], "counts": [3]}, "do not add up"),
    ({"size": [48, 64], "counts": [-1, 3073]}, "do not add up"),
    ({"size": [64, 48], "counts": [3072]}, "'size' is not"),
    ({"size": [48, 64], "counts": "abc"}, "damaged"),
    ({"size": [48, 64], "counts": ""}, "another type"),
    ({"size": [48, 64], "counts": None}, "another type"),
]


@pytest.mark.parametrize("where", ["dataset", "evaluator"])
def test_invalid_masks(coco, where):
    content = coco_content()
    every("annotations", "segmentation", lambda _: RECTANGLE)(content)
    split, asked = (
        ("train", dict(pipeline=LOAD_MASKS))
        if where == "dataset"
        else ("val", dict(metric=dict(metric=["bbox", "segm"])))
    )
    (coco / f"{split}.json").write_text(json.dumps(content))
    for good in (RECTANGLE, {"size": [48, 64], "counts": [3072]}):
        assert told_of(coco, setting("annotations", segmentation=good), split, **asked) == []
    for mask, words in MASKS:
        lines = told_of(coco, setting("annotations", segmentation=mask), split, **asked)
        assert len(lines) == 1, (mask, lines)
        assert "1 of 6 annotations have a 'segmentation'" in lines[0]
        assert words in lines[0], mask
        # MMDetection's training skips such polygons; pycocotools takes some of them for boxes.
        skipped = words == "fewer than 3 points" and where == "dataset"
        assert ("Training skips these polygons" in lines[0]) == skipped
        assert ("the config needs masks" in lines[0]) != skipped
    # Not checked without masks.
    assert told_of(coco, lambda content: None, split) == []


def test_polygons_only(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = {"size": [48, 64], "counts": [3072]}
        content["annotations"][0]["iscrowd"] = 1

    pipeline = [dict(type="LoadAnnotations", with_mask=True, poly2mask=False)]
    (line,) = told_of(coco, change, pipeline=pipeline)
    assert "5 of 6 annotations" in line
    assert "poly2mask=False" in line
