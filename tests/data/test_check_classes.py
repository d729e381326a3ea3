"""Classes of datasets, annotation files and heads."""

import shlex
from argparse import ArgumentParser

import pytest
from mmengine.config import DictAction

from rfa_mmdet.data.check import check_data
from rfa_mmdet.data.check.classes import heads
from tests.helpers.damaged_sets import (
    CLASSES,
    coco_dataset,
    config,
    edit_json,
    errors_of,
    voc_dataset,
)

# --- classes


def test_classes_missing_in_the_file(coco):
    wrong = coco_dataset(coco, metainfo=dict(classes=("cat", "dgo")))
    message = errors_of(config(wrong, model=None))
    assert "1 of its 2 classes are not among the categories of" in message
    assert "'dgo'" in message
    assert f"metainfo=dict(classes={CLASSES!r})" in message
    assert "--cfg-options" not in message  # it would remove the blank in "traffic light"


def test_default_classes_and_the_option_that_fixes_them(coco):
    edit_json(coco / "train.json", lambda c: c["categories"].__setitem__(2, dict(id=12, name="ox")))
    cfg = config(coco_dataset(coco, metainfo=dict(CLASSES=("cat", "dog", "ox"))))
    message = errors_of(cfg)
    assert "the defaults of CocoDataset: metainfo has 'CLASSES' instead of 'classes'" in message
    option = '--cfg-options train_dataloader.dataset.metainfo.classes="(cat,dog,ox,)"'
    assert option in message
    cfg.merge_from_dict(parsed(option))
    assert check_data(cfg) == []


def parsed(text):
    """Return MMEngine's parsing of the --cfg-options in a message."""
    parser = ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    return parser.parse_args(shlex.split(text)).cfg_options


def test_classes_not_in_file_order(coco):
    (warning,) = check_data(config(coco_dataset(coco, metainfo=dict(classes=CLASSES[::-1]))))
    assert f"Use classes={CLASSES!r}" in warning


def test_different_order_of_categories_in_validation(coco):
    edit_json(coco / "val.json", lambda content: content["categories"].reverse())
    cfg = config(coco_dataset(coco), coco_dataset(coco, "val"))
    message = errors_of(cfg, ("train", "val"))
    assert "val_dataloader.dataset has the classes 'traffic light', 'dog', 'cat'" in message


def test_repeated_category_name(coco):
    edit_json(coco / "train.json", lambda c: c["categories"].append(dict(id=99, name="cat")))
    message = errors_of(config(coco_dataset(coco)))
    assert "several categories have the same name ('cat')" in message


@pytest.mark.parametrize("dataset", [coco_dataset, voc_dataset])
def test_string_instead_of_a_tuple_of_classes(coco, voc, dataset):
    root = coco if dataset is coco_dataset else voc
    message = errors_of(config(dataset(root, metainfo=dict(classes=("cat")))))
    assert "train_dataloader.dataset.metainfo.classes='cat' is a string" in message
    assert "classes=('cat',)" in message


def test_classes_from_a_file(coco):
    (coco / "classes.txt").write_text("\n".join(CLASSES))
    metainfo = dict(classes=str(coco / "classes.txt"))
    assert check_data(config(coco_dataset(coco, metainfo=metainfo))) == []


def test_voc_without_classes(voc):
    message = errors_of(config(voc_dataset(voc, metainfo=None)))
    assert "XMLDataset has no default classes" in message


def test_voc_none_of_the_classes_occurs(voc):
    message = errors_of(config(voc_dataset(voc, metainfo=dict(classes=("Cat", "Dog", "Ox")))))
    assert "none of its classes occurs" in message
    assert "'cat' (4)" in message
    assert f"metainfo=dict(classes={CLASSES!r})" in message


def test_voc_some_classes_differ(voc):
    metainfo = dict(classes=("cat", "dog", "ox"))
    absent, ignored = check_data(config(voc_dataset(voc, metainfo=metainfo)))
    assert "classes 'ox' do not occur in the XML files" in absent
    assert "ignored: 'traffic light' (1)" in ignored


# --- classes and heads


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("retinanet_r50_fpn", ["model.bbox_head"]),
        ("faster-rcnn_r50_fpn", ["model.roi_head.bbox_head"]),
        ("mask-rcnn_r50_fpn", ["model.roi_head.bbox_head", "model.roi_head.mask_head"]),
        (
            "cascade-mask-rcnn_r50_fpn",
            [*(f"model.roi_head.bbox_head.{i}" for i in range(3)), "model.roi_head.mask_head"],
        ),
    ],
)
def test_wrong_num_classes_and_the_options_that_fix_it(coco, model, keys):
    cfg = config(coco_dataset(coco), model=model, num_classes=None)
    message = errors_of(cfg)
    for key in keys:
        assert f"{key}.num_classes=80" in message
    assert "train_dataloader.dataset has 3 classes: 'cat', 'dog', 'traffic light'" in message
    assert "rpn_head" not in message
    assert ("list" in message) == ("cascade" in model)
    options = (
        message[message.index("--cfg-options") :].split(" (list")[0].split(", or set other")[0]
    )
    cfg.merge_from_dict(parsed(options))
    assert check_data(cfg) == []


def test_heads_inside_wrappers_and_lists():
    detector = dict(
        bbox_head=dict(num_classes=4, loss_cls=dict(num_classes=9)),
        roi_head=[dict(bbox_head=dict(num_classes=5))],
        semantic_head=dict(num_classes=183),
        backbone=dict(num_classes=1000),
        mask_head=dict(num_classes=80, class_agnostic=True),
    )
    assert list(heads(dict(type="SoftTeacher", detector=detector))) == [
        ("model.detector.bbox_head", 4),
        ("model.detector.roi_head.0.bbox_head", 5),
    ]


def test_heads_are_compared_with_the_tested_dataset(coco):
    cfg = config(dict(), num_classes=None, test_dataloader=dict(dataset=coco_dataset(coco, "val")))
    message = errors_of(cfg, ("test",))
    assert "model.bbox_head.num_classes=80, but test_dataloader.dataset has 3" in message


def test_text_models_may_have_other_numbers(coco):
    cfg = config(coco_dataset(coco), num_classes=256)
    cfg.model.language_model = dict(type="BertModel")
    assert check_data(cfg) == []


def test_panoptic_data_has_more_classes_than_heads_of_things(coco):
    dataset = coco_dataset(coco, type="CocoPanopticDataset", metainfo=None)
    assert check_data(config(dataset, num_classes=80)) == []
