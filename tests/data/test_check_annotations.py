"""Annotation files that are missing, damaged, or not readable by MMDetection."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mmdet.registry import DATASETS

from rfa_mmdet.data.check import check_data, read_voc
from tests.helpers.damaged_sets import (
    CLASSES,
    coco_content,
    coco_dataset,
    config,
    edit_json,
    errors_of,
    voc_dataset,
    voc_xml,
)


def test_missing_annotation_file_with_similar_names(coco):
    message = errors_of(config(coco_dataset(coco, ann_file="trian.json")))
    assert "train_dataloader.dataset.ann_file='trian.json'" in message
    assert f"{coco}/trian.json does not exist; similar names in" in message
    assert "train.json" in message


def test_missing_data_root(coco):
    message = errors_of(config(coco_dataset(f"{coco}x/deep")))
    assert f"data_root='{coco}x/deep' is not a folder" in message
    assert f"folder is '{coco}x'; similar names in" in message


def test_missing_image_set_of_voc(voc):
    assert "train.txt" in errors_of(config(voc_dataset(voc, ann_file="trainval.txt")))


def test_folder_instead_of_annotation_file(coco):
    assert "images is a folder, not a file" in errors_of(
        config(coco_dataset(coco, ann_file="images"))
    )


@pytest.mark.parametrize("as_list", [False, True])
def test_missing_file_of_an_evaluator(coco, as_list):
    good = dict(type="CocoMetric", ann_file=str(coco / "val.json"))
    bad = dict(type="CocoMetric", ann_file=str(coco / "vla.json"))
    evaluator, key = ([good, bad], "val_evaluator.1") if as_list else (bad, "val_evaluator")
    cfg = config(coco_dataset(coco), coco_dataset(coco, "val"), val_evaluator=evaluator)
    message = errors_of(cfg, ("train", "val"))
    assert f"{key}.ann_file='{coco}/vla.json'" in message
    assert "val.json" in message.split("similar names")[1]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.floats(0, 0.999))
@example(0)
def test_truncated_json_at_any_position(coco, part):
    whole = json.dumps(coco_content())
    cut = whole[: int(len(whole) * part)]
    (coco / "train.json").write_text(cut)
    message = errors_of(config(coco_dataset(coco), model=None))
    assert f"{coco}/train.json ({len(cut):,} bytes) is truncated or not JSON" in message
    assert "at character" in message


def test_binary_instead_of_json(coco):
    shutil.copy(coco / "images" / "0.jpg", coco / "train.json")
    assert "invalid UTF-8 at byte 0" in errors_of(config(coco_dataset(coco)))


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_json_without_a_coco_list(coco, name):
    edit_json(coco / "train.json", lambda content: content.pop(name))
    assert f"train.json has no list '{name}'" in errors_of(config(coco_dataset(coco)))


def test_results_json_instead_of_annotations(coco):
    (coco / "train.json").write_text("[]")
    assert "contains a list" in errors_of(config(coco_dataset(coco)))


def test_annotations_without_an_image(coco):
    edit_json(coco / "train.json", lambda content: content["annotations"][1].update(image_id=77))
    (warning,) = (w for w in check_data(config(coco_dataset(coco)), ("train",)) if "image_id" in w)
    assert "1 annotations" in warning
    assert "ids 2" in warning


def test_classes_without_boxes(coco):
    def change(content):
        category = next(c["id"] for c in content["categories"] if c["name"] == CLASSES[0])
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != category]

    edit_json(coco / "train.json", change)
    (warning,) = check_data(config(coco_dataset(coco)), ("train",))
    assert f"classes '{CLASSES[0]}' have no box in" in warning


def test_annotations_are_optional_for_testing(coco):
    edit_json(coco / "val.json", lambda content: content.pop("annotations"))
    assert check_data(config(coco_dataset(coco), coco_dataset(coco, "val")), ("train", "val")) == []


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_truncated_xml(voc, part):
    path = voc / "Annotations" / "1.xml"
    path.write_text(path.read_text()[: int(path.stat().st_size * part)])
    message = errors_of(config(voc_dataset(voc)))
    assert f"{path} ({path.stat().st_size:,} bytes) is truncated or not XML" in message
    assert "1 of the 3 XML files" in message


def test_an_image_listed_twice(voc):
    path = voc / "train.txt"
    path.write_text(path.read_text() + "1\n")
    (warning,) = check_data(config(voc_dataset(voc)), ("train",))
    assert "lists 1 images more than once" in warning
    assert warning.endswith(": 1")


def test_missing_xml(voc):
    (voc / "Annotations" / "2.xml").rename(voc / "Annotations" / "2_.xml")
    message = errors_of(config(voc_dataset(voc)))
    assert f"{voc}/Annotations/2.xml does not exist" in message
    assert "2_.xml" in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<xmin>5</xmin>", "", "<bndbox> of object 1 ('dog') has no <xmin>, only <ymin>, <xmax>"),
        ("<xmin>5</xmin>", "<xmin>five</xmin>", "<xmin> of object 1 ('dog') is 'five'"),
        ("<xmin>5</xmin>", "<xmin>inf</xmin>", "<xmin> of object 1 ('dog') is 'inf'"),
        ("<width>64</width>", "<width>64.0</width>", "<size> of 64.0 x 48"),
        ("<name>dog</name>", "", "object 1 has no <name>"),
        ("<difficult>0</difficult>", "<difficult>no</difficult>", "<difficult>no</difficult>"),
    ],
)
def test_xml_unreadable_by_mmdet(voc, old, new, words):
    path = voc / "Annotations" / "1.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((AttributeError, ValueError, TypeError, OverflowError)):
        DATASETS.build(voc_dataset(voc, pipeline=[]))
    message = errors_of(config(voc_dataset(voc)))
    assert f"1 of the 3 XML files listed in {voc}/train.txt cannot be read: {path}: " in message
    assert words in message


@pytest.mark.parametrize("text", ["0\n1 \n2\n", "0\n1\n2\n\n", "0\n\n1\n", "0\n\t1\n"])
def test_blanks_in_an_image_set_with_the_command_that_fixes_it(voc, text):
    (voc / "train.txt").write_text(text)
    with pytest.raises(FileNotFoundError):
        DATASETS.build(voc_dataset(voc, pipeline=[]))
    message = errors_of(config(voc_dataset(voc)))
    assert f"{voc}/train.txt: line" in message
    assert "sed -i" in message


@pytest.mark.parametrize("text", ["0\r\n1\r\n2\r\n", "0\n1\n2"])
def test_line_ends_of_an_image_set_do_not_matter(voc, text):
    (voc / "train.txt").write_bytes(text.encode())
    assert check_data(config(voc_dataset(voc))) == []


def test_per_class_image_set(voc):
    (voc / "train.txt").write_text("0  1\n1 -1\n2 -1\n")
    assert "per-class lists ('0  1')" in errors_of(config(voc_dataset(voc)))


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*CLASSES, "bird"]),
            st.integers(0, 1),
            st.tuples(*[st.one_of(st.integers(-9, 99), st.floats(-9, 99))] * 4),
        ),
        max_size=5,
    )
)
def test_reads_the_same_boxes_as_mmdet(voc, objects):
    (voc / "Annotations" / "0.xml").write_text(voc_xml(*objects))
    boxes = read_voc(str(voc / "Annotations" / "0.xml"), CLASSES).boxes
    mmdets = DATASETS.build(voc_dataset(voc, pipeline=[], serialize_data=False))
    theirs = mmdets.get_data_info(0)["instances"]
    # VOC's pixels start at one.
    assert [[v - 1 for v in box.xyxy] for box in boxes] == [i["bbox"] for i in theirs]
    assert [box.difficult for box in boxes] == [bool(i["ignore_flag"]) for i in theirs]
