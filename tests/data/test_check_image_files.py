"""Files not to open or decode, images that resizing shrinks to nothing, and samples."""

import os
import socket
import struct
import zlib

import cv2
import numpy as np
import pytest
from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from rfa_mmdet.data.check import check_data, image_damage
from rfa_mmdet.data.check.audit import audit
from rfa_mmdet.data.check.images import SAMPLE, shorter_side
from rfa_mmdet.files import header_size
from rfa_mmdet.inference.images import ImageError, find_images, transformed
from tests.helpers.damaged_sets import (
    coco_dataset,
    config,
    edit_json,
    errors_of,
    setting,
    write_image,
)


def png_header(width, height):
    """Return a complete PNG file with a given size in its header but hardly any data."""

    def chunk(kind, data):
        code = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + code

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def no_file(path, kind):
    """Create something other than a regular file."""
    path.unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as end:
            here = os.getcwd()
            os.chdir(path.parent)  # socket paths must be short
            end.bind(path.name)
            os.chdir(here)


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "socket"])
def test_special_files_are_not_opened(coco, kind):
    path = coco / "images" / "2.jpg"
    no_file(path, kind)
    message = errors_of(config(coco_dataset(coco), model=None))
    assert f"1 of 4 images are damaged: {path}: a {kind}, not a file" in message
    found = audit(Config(dict(train_dataloader=dict(dataset=coco_dataset(coco)))), ["train"])
    assert [(p.kind, p.path) for p in found.problems] == [("damaged", str(path))]


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "socket"])
def test_special_annotation_files_are_not_opened(coco, kind):
    no_file(coco / "val.json", kind)
    evaluator = dict(type="CocoMetric", ann_file=str(coco / "val.json"))
    cfg = config({}, coco_dataset(coco, "val"), None, val_evaluator=evaluator)
    message = errors_of(cfg, ("val",))
    assert f"{coco}/val.json is a {kind}, not a file" in message
    assert audit(cfg, ["val"]).images == {}


def test_inputs_that_are_special_files(tmp_path):
    write_image(tmp_path / "a.jpg")
    no_file(tmp_path / "b.jpg", "FIFO")
    no_file(tmp_path / "c.jpg", "device")
    no_file(tmp_path / "d.jpg", "folder")
    a, b, c = find_images([str(tmp_path)])
    assert [image_damage(path) for path in (a, b, c)] == [
        None,
        "a FIFO, not a file",
        "a device, not a file",
    ]
    with pytest.raises(ValueError, match=r"b\.jpg': is a FIFO, not a file"):
        find_images([b])


@pytest.mark.parametrize("header", [png_header(60000, 60000), b"P6 60000 60000 255\n" + bytes(99)])
def test_an_image_bomb_is_not_decoded(coco, header):
    path = coco / "images" / "1.jpg"
    path.write_bytes(header)
    message = errors_of(config(coco_dataset(coco), model=None))
    assert f"{path}: 60000 x 60000 pixels, above the limit of 268,435,456" in message
    assert "OPENCV_IO_MAX_IMAGE_PIXELS to raise it" in message
    found = audit(Config(dict(train_dataloader=dict(dataset=coco_dataset(coco)))), ["train"])
    assert found.count("damaged", "train") == 1


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".tif", ".ppm"])
def test_size_from_the_header_matches_the_decoded_image(tmp_path, ending):
    path = str(tmp_path / f"a{ending}")
    cv2.imwrite(path, np.zeros((20, 30, 3), np.uint8))
    assert header_size(path) == (30, 20)
    assert cv2.imread(path).shape == (20, 30, 3)


def test_size_of_an_image_with_exif_orientation(tmp_path):
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
    whole = path.read_bytes()
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4)
    path.write_bytes(whole[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + whole[2:])
    assert cv2.imread(str(path)).shape == (30, 20, 3)
    assert header_size(str(path)) == (20, 30)


def test_images_that_differ_from_the_annotated_size(coco):
    edit_json(coco / "train.json", setting("images", width=48, height=64))
    (warning,) = check_data(config(coco_dataset(coco), model=None), ("train",))
    assert "1 of 4 opened images differ" in warning
    assert f"{coco}/images/1.jpg: 64 x 48, annotated 48 x 64" in warning


# --- resizing

RESIZINGS = [
    dict(type="Resize", scale=(64, 48), keep_ratio=True),
    dict(type="Resize", scale=64, keep_ratio=True),
    dict(type="Resize", scale=(64, 48)),
    dict(type="Resize", scale_factor=0.1, keep_ratio=True),
    dict(type="Resize", scale_factor=(0.1, 0.1)),
    dict(type="FixScaleResize", scale=(64, 48), keep_ratio=True),
    dict(type="FixShapeResize", width=64, height=48, keep_ratio=True),
    dict(type="ResizeShortestEdge", scale=48, max_size=64),
    dict(type="ResizeShortestEdge", scale=48),
    dict(type="RandomResize", scale=(64, 48), ratio_range=(1.0, 1.0), keep_ratio=True),
    dict(type="RandomResize", scale=[(64, 48), (64, 48)], keep_ratio=True),
    dict(type="RandomChoiceResize", scales=[(64, 48)], keep_ratio=True),
]


@pytest.mark.parametrize("transform", RESIZINGS, ids=lambda t: t["type"])
@pytest.mark.parametrize("size", [(300, 1), (1, 300), (300, 2), (3000, 4), (640, 480), (90, 1)])
def test_shorter_side_matches_the_transform(transform, size):
    width, height = size
    expected = shorter_side(width, height, transform["type"], transform)
    own = TRANSFORMS.build({**transform, "_scope_": "mmdet"})
    results = dict(img=np.zeros((height, width, 3), np.uint8))
    if expected:
        padded = transform["type"] == "FixShapeResize"
        assert min(own(results)["img"].shape[:2]) == (48 if padded else expected)
    else:
        with pytest.raises((cv2.error, ZeroDivisionError)):
            own(results)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("transforms", "counted"),
    [
        (RESIZINGS[:1], True),
        (RESIZINGS[2:3], False),
        ([dict(type="RandomFlip"), RESIZINGS[0]], True),
        ([dict(type="RandomChoiceResize", scales=[(640, 640), (64, 48)], keep_ratio=True)], True),
        ([dict(type="RandomChoice", transforms=[[RESIZINGS[2]], [RESIZINGS[0]]])], True),
        ([dict(type="Mosaic", img_scale=(64, 64))], True),
        ([dict(type="RandomCrop", crop_size=(9, 9)), RESIZINGS[0]], False),
    ],
)
def test_images_resized_to_nothing_are_counted(coco, split, transforms, counted):
    cv2.imwrite(str(coco / "images" / "1.jpg"), np.zeros((1, 300, 3), np.uint8))
    edit_json(coco / f"{split}.json", setting("images", width=300, height=1))
    edit_json(
        coco / f"{split}.json", lambda c: [a.update(bbox=[0, 0, 9, 1]) for a in c["annotations"]]
    )
    more = dict(filter_cfg=None) if split == "train" else {}
    dataset = coco_dataset(coco, split, pipeline=transforms, **more)
    cfg = config(dataset, dataset, None)
    if not counted:
        assert check_data(cfg, (split,)) == []
        return
    message = errors_of(cfg, (split,))
    assert "1 of 4 images would have a side of 0 pixels after " in message
    assert f"{coco}/images/1.jpg (300 x 1)" in message


def test_image_resized_to_nothing_gives_a_clear_error():
    own = TRANSFORMS.build({**RESIZINGS[0], "_scope_": "mmdet"})
    with pytest.raises(
        ImageError, match=r"300 x 1 pixels; resizing to \(64, 48\) would make a side 0"
    ):
        transformed(own, dict(img=np.zeros((1, 300, 3), np.uint8)))
    with pytest.raises(KeyError):  # other errors are not changed
        transformed(lambda results: results["nothing"], dict(img=np.zeros((9, 9, 3), np.uint8)))


# --- how much is looked at


@pytest.fixture
def many(coco):
    """Return a dataset with more images than a quick check opens."""
    whole = (coco / "images" / "0.jpg").read_bytes()
    number = SAMPLE + 50

    def change(content):
        content["images"] = [
            dict(id=i, file_name=f"{i}.jpg", width=64, height=48) for i in range(number)
        ]
        for i in range(number):
            (coco / "images" / f"{i}.jpg").write_bytes(whole)

    edit_json(coco / "train.json", change)
    return coco


def test_quick_opens_a_sample_and_warns(many):
    cfg = config(coco_dataset(many, filter_cfg=None), model=None)
    (line,) = check_data(cfg, ("train",))
    assert f"opened {SAMPLE} of {SAMPLE + 50} images" in line
    assert "--check-data full opens all" in line
    assert check_data(cfg, ("train",), "full") == []


def test_quick_finds_any_missing_file(many):
    cfg = config(coco_dataset(many, filter_cfg=None), model=None)
    for i in range(100, 110):  # at least one of them is not opened
        (many / "images" / f"{i}.jpg").unlink()
    no_file(many / "images" / "111.jpg", "FIFO")
    message = errors_of(cfg)
    assert f"10 of {SAMPLE + 50} images are missing" in message
    assert "111.jpg: a FIFO, not a file" in message


def test_full_finds_damage_that_quick_misses(many):
    cfg = config(coco_dataset(many, filter_cfg=None), model=None)
    for i in range(SAMPLE + 50):
        path = many / "images" / f"{i}.jpg"
        path.write_bytes(path.read_bytes()[:-100])
    assert f"{SAMPLE} of {SAMPLE + 50} images are damaged" in errors_of(cfg)
    with pytest.raises(ValueError, match=f"{SAMPLE + 50} of {SAMPLE + 50} images are damaged"):
        check_data(cfg, ("train",), "full")


@pytest.mark.parametrize("name", ["C:\\data\\1.jpg", "images\\1.jpg"])
def test_windows_separators_in_names(coco, name):
    edit_json(coco / "train.json", setting("images", file_name=name))
    message = errors_of(config(coco_dataset(coco), model=None))
    assert "1 of 4 images are missing" in message
    assert "1 of the names contain '\\', which should be '/'" in message


def test_absolute_and_relative_names(coco, monkeypatch):
    monkeypatch.chdir(coco.parent)
    dataset = coco_dataset("coco")
    edit_json(coco / "train.json", setting("images", file_name=str(coco / "images" / "1.jpg")))
    assert check_data(config(dataset, model=None), ("train",)) == []
    edit_json(coco / "train.json", setting("images", file_name="/no/such/1.jpg"))
    (coco / "images" / "2.jpg").unlink()
    assert "2 of 4 images are missing" in errors_of(config(dataset, model=None))
