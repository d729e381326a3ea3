"""Missing and damaged images, and boxes outside of them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmdet.registry import DATASETS

from rfa_mmdet.data.check import check_data, image_damage
from tests.helpers.damaged_sets import (
    CLASSES,
    LOAD,
    coco_dataset,
    config,
    edit_json,
    errors_of,
    voc_dataset,
    voc_xml,
    write_image,
)

# --- images


def test_missing_images(coco):
    for i in (1, 3):
        (coco / "images" / f"{i}.jpg").unlink()
    message = errors_of(config(coco_dataset(coco)))
    assert f"2 of 4 images are missing from '{coco}/images'" in message
    assert "1.jpg, 3.jpg" in message


def test_wrong_image_folder(coco):
    message = errors_of(config(coco_dataset(coco, data_prefix=dict(img="image/"))))
    assert "4 of 4 images are missing" in message
    assert "data_prefix={'img': 'image/'}" in message
    assert "similar names" in message


def test_voc_images_with_another_suffix(voc):
    (voc / "JPEGImages" / "1.jpg").rename(voc / "JPEGImages" / "1.png")
    message = errors_of(config(voc_dataset(voc)))
    assert "1.jpg does not exist" in message
    assert "1.png" in message


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_truncated_images_at_any_position(tmp_path, ending, data):
    path = tmp_path / f"a{ending}"
    write_image(path)
    assert image_damage(str(path)) is None
    whole = path.read_bytes()
    # The format is unknown below four bytes.
    cut = data.draw(st.integers(4, len(whole) - 1))
    path.write_bytes(whole[:cut])
    assert image_damage(str(path)).startswith("truncated")


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize("behind", [b"\0" * 5000, b"\r\n", b"metadata of a camera" * 500])
def test_data_after_the_end_of_an_image_is_ignored(tmp_path, ending, behind):
    path = tmp_path / f"a{ending}"
    write_image(path)
    path.write_bytes(path.read_bytes() + behind)
    assert image_damage(str(path)) is None


def test_end_of_a_thumbnail_is_not_the_end_of_the_image(tmp_path):
    path = tmp_path / "a.jpg"
    write_image(path)
    whole = path.read_bytes()
    thumbnail = b"\xff\xe1" + (2 + len(whole)).to_bytes(2, "big") + whole
    path.write_bytes(whole[:2] + thumbnail + whole[2:])
    assert image_damage(str(path)) is None
    path.write_bytes(whole[:2] + thumbnail + whole[2:-300])
    assert image_damage(str(path)).startswith("truncated JPEG")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_files_that_are_not_images(coco, content, words):
    (coco / "images" / "2.jpg").write_bytes(content)
    message = errors_of(config(coco_dataset(coco)))
    assert f"1 of 4 images are damaged: {coco}/images/2.jpg" in message
    assert words in message


def test_unknown_formats_are_accepted(tmp_path):
    (tmp_path / "a.bmp").write_bytes(b"BM1234")
    assert image_damage(str(tmp_path / "a.bmp")) is None


def test_folder_instead_of_an_image(tmp_path):
    assert image_damage(str(tmp_path)) == "a folder, not a file"


def test_unused_images_may_be_missing(coco):
    def take_from_first(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 0]

    edit_json(coco / "train.json", take_from_first)
    (coco / "images" / "0.jpg").unlink()
    assert check_data(config(coco_dataset(coco))) == []
    assert "1 of 4 images" in errors_of(config(coco_dataset(coco, filter_cfg=None)))
    (coco / "images" / "3.jpg").unlink()
    assert check_data(config(coco_dataset(coco, indices=2))) == []


# --- boxes


@pytest.mark.parametrize("what", ["images", "annotations"])
def test_nothing_to_train_on(coco, what):
    edit_json(coco / "train.json", lambda content: content.update({what: []}))
    message = errors_of(config(coco_dataset(coco)))
    assert "no images left: filter_cfg={'filter_empty_gt': True" in message


def test_no_boxes_without_a_filter(coco):
    edit_json(coco / "train.json", lambda content: content.update(annotations=[]))
    message = errors_of(config(coco_dataset(coco, filter_cfg=None)))
    assert "the 4 images of" in message
    assert "have no box to learn from" in message


def test_unlabelled_next_to_labelled_data_gives_a_warning(coco):
    edit_json(coco / "val.json", lambda content: content.update(annotations=[]))
    unlabelled = coco_dataset(coco, "val", test_mode=False)
    both = dict(type="ConcatDataset", datasets=[coco_dataset(coco), unlabelled])
    (warning,) = check_data(config(both))
    assert "datasets.1: the 4 images of" in warning


def test_voc_images_filtered_out_by_a_size_of_zero(voc):
    for path in (voc / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<width>64", "<width>0"))
    message = errors_of(config(voc_dataset(voc, filter_cfg=dict(min_size=32))))
    assert "remove all 3 images" in message
    assert "write as 0" in message


def test_inverted_coco_boxes_give_a_warning(coco):
    edit_json(coco / "train.json", lambda c: c["annotations"][5].update(bbox=[5, 5, 0, 9]))
    (warning,) = check_data(config(coco_dataset(coco)))
    assert "1 of 6 boxes of" in warning
    assert "1.jpg" in warning


INVERTED = [(30, 5, 5, 30), (5, 30, 30, 5), (5, 5, 5, 30), (5, 5, 5.9, 30)]


@pytest.mark.parametrize("box", INVERTED)
def test_inverted_voc_boxes_raise_with_the_line_that_fixes_it(voc, box):
    good = (CLASSES[0], 0, (5, 5, 30, 30))
    (voc / "Annotations" / "0.xml").write_text(voc_xml(good, (CLASSES[0], 0, box)))
    message = errors_of(config(voc_dataset(voc)))
    assert "1 boxes are inverted or empty" in message
    assert "0.xml" in message
    line = message.split("LoadAnnotations:  ")[1]
    fixed = [*LOAD, eval(line)]  # as pasted by the user
    for dataset in (
        voc_dataset(voc, pipeline=fixed),
        dict(type="MultiImageMixDataset", dataset=voc_dataset(voc), pipeline=fixed),
    ):
        (warning,) = check_data(config(dataset))
        assert "ignored in training" in warning
    theirs = DATASETS.build(voc_dataset(voc, pipeline=fixed, _scope_="mmdet"))
    (kept,) = theirs[0]["gt_bboxes"].tensor.tolist()
    assert kept == [4, 4, 29, 29]


def test_inverted_voc_boxes_ignored_by_mmdet_give_a_warning(voc):
    (voc / "Annotations" / "0.xml").write_text(
        voc_xml((CLASSES[0], 0, (1, 1, 9, 9)), (CLASSES[0], 1, INVERTED[0]))
    )
    assert len(check_data(config(voc_dataset(voc)))) == 1
    (voc / "Annotations" / "0.xml").write_text(
        voc_xml((CLASSES[0], 0, (1, 1, 9, 9)), (CLASSES[0], 0, INVERTED[0]))
    )
    assert len(check_data(config(voc_dataset(voc, filter_cfg=dict(bbox_min_size=1))))) == 1
    val = voc_dataset(voc, test_mode=True)
    (warning,) = check_data(config(val, val), ("val",))
    assert "counts them as missed" in warning
