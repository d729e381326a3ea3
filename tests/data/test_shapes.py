import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset, XMLDataset
from pycocotools import mask as coco_mask

from rfa_mmdet.data import shapes
from rfa_mmdet.data.drawing import CLASSES, MIN_CONTRAST, MIN_VISIBLE
from rfa_mmdet.data.shapes import make_shapes
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

TOOL = ROOT / "tools" / "make_shapes.py"
# Of pycocotools with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=40, num_val=10)


@pytest.fixture(scope="module")
def coco(summary):
    return json.loads((summary.root / "annotations" / "train.json").read_text())


def contents(root):
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def by_image(coco):
    found = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def filled(annotation, width, height):
    """The mask of the polygon, drawn by pycocotools and not by what drew the image."""
    runs = coco_mask.frPyObjects(annotation["segmentation"], height, width)
    return coco_mask.decode(runs)[..., 0].astype(bool)


# --- the same, or not ----------------------------------------------------------------------------


def test_same_seed_same_bytes_whatever_the_folder(tmp_path):
    make_shapes(tmp_path / "a", num_train=4, num_val=2, seed=3)
    make_shapes(tmp_path / "b", num_train=4, num_val=2, seed=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_seed_and_other_split_give_other_images(tmp_path):
    make_shapes(tmp_path / "a", num_train=3, num_val=3, seed=0)
    make_shapes(tmp_path / "b", num_train=3, num_val=3, seed=1)
    images = [
        *(tmp_path / "a" / "JPEGImages").iterdir(),
        *(tmp_path / "b" / "JPEGImages").iterdir(),
    ]
    assert len({path.read_bytes() for path in images}) == len(images) == 12


def test_an_image_does_not_depend_on_how_many_there_are(summary, tmp_path):
    small = make_shapes(tmp_path / "small", num_train=5, num_val=2)
    large = contents(summary.root)
    for name, content in contents(small.root).items():
        if name.startswith(("JPEGImages", "Annotations")):
            assert large[name] == content
    few = json.loads((small.root / "annotations" / "train.json").read_text())
    many = json.loads((summary.root / "annotations" / "train.json").read_text())
    assert many["images"][:5] == few["images"]
    assert many["annotations"][: len(few["annotations"])] == few["annotations"]


def test_a_second_call_draws_nothing(tmp_path, monkeypatch):
    first = make_shapes(tmp_path, num_train=3, num_val=2)
    before = contents(tmp_path)
    monkeypatch.setattr(shapes, "draw_image", None)
    second = make_shapes(tmp_path, num_train=3, num_val=2)
    assert (first.drawn, second.drawn) == (True, False)
    assert (first.images, first.boxes) == (second.images, second.boxes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "lost",
    ["JPEGImages/train_0001.jpg", "Annotations/val_0000.xml", "annotations/val.json"],
)
def test_missing_files_are_drawn_again(tmp_path, lost):
    make_shapes(tmp_path, num_train=2, num_val=1)
    before = contents(tmp_path)
    (tmp_path / lost).unlink()
    assert make_shapes(tmp_path, num_train=2, num_val=1).drawn
    assert contents(tmp_path) == before


# --- what mmdet reads ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("test_mode", [False, True])
def test_coco_and_xml_dataset_give_the_same_boxes(summary, split, test_mode):
    common = dict(
        data_root=str(summary.root),
        metainfo=dict(classes=CLASSES),
        test_mode=test_mode,
        pipeline=[],
    )
    as_coco = CocoDataset(
        ann_file=f"annotations/{split}.json", data_prefix=dict(img="JPEGImages/"), **common
    )
    as_voc = XMLDataset(
        ann_file=f"ImageSets/Main/{split}.txt", data_prefix=dict(sub_data_root=""), **common
    )
    assert len(as_coco) == len(as_voc) == summary.images[split]
    for one, other in zip(as_coco, as_voc, strict=True):
        assert Path(one["img_path"]).samefile(other["img_path"])
        assert cv2.imread(one["img_path"]).shape == (one["height"], one["width"], 3)
        assert (one["height"], one["width"]) == (other["height"], other["width"])
        seen = [
            [(item["bbox"], item["bbox_label"], item["ignore_flag"]) for item in image["instances"]]
            for image in (one, other)
        ]
        assert seen[0] == seen[1] != []


def test_summary_counts_what_mmdet_reads(summary):
    dataset = CocoDataset(
        data_root=str(summary.root),
        metainfo=dict(classes=CLASSES),
        ann_file="annotations/train.json",
        data_prefix=dict(img="JPEGImages/"),
        pipeline=[],
    )
    labels = [item["bbox_label"] for image in dataset for item in image["instances"]]
    counted = [sum(summary.boxes["train"][name].values()) for name in CLASSES]
    assert counted == np.bincount(labels, minlength=len(CLASSES)).tolist()


# --- boxes ---------------------------------------------------------------------------------------


def test_boxes_are_tight_and_inside(coco):
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 160
        assert y + height <= 160
        mask = filled(annotation, 160, 160)
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        drawn = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # pycocotools leaves out the tips that are thinner than a pixel.
        assert np.abs(np.subtract([x, y, x + width, y + height], drawn)).max() <= 2
        assert annotation["area"] == pytest.approx(mask.sum(), rel=0.15)


def test_the_image_differs_from_its_surroundings_where_the_mask_is(tmp_path):
    make_shapes(tmp_path, num_train=30, num_val=1, max_objects=1)
    coco = json.loads((tmp_path / "annotations" / "train.json").read_text())
    for image, annotation in zip(coco["images"], coco["annotations"], strict=True):
        picture = cv2.imread(str(tmp_path / "JPEGImages" / image["file_name"]))
        lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_BGR2Lab)
        mask = filled(annotation, 160, 160).astype(np.uint8)
        inside = cv2.erode(mask, np.ones((3, 3))).astype(bool)
        outside = cv2.dilate(mask, np.ones((7, 7))) - cv2.dilate(mask, np.ones((3, 3))) > 0
        contrast = np.linalg.norm(np.median(lab[inside], axis=0) - np.median(lab[outside], axis=0))
        # Shading, noise and JPEG take a little off it.
        assert contrast > 0.7 * MIN_CONTRAST


def test_later_shapes_hide_at_most_the_allowed_part(coco):
    hidden = 0
    for annotations in by_image(coco).values():
        masks = [filled(annotation, 160, 160) for annotation in annotations]
        for i, mask in enumerate(masks):
            covered = np.any(masks[i + 1 :], axis=0) if masks[i + 1 :] else np.zeros_like(mask)
            visible = (mask & ~covered).sum() / mask.sum()
            assert visible == pytest.approx(annotations[i]["visible"], abs=0.12)
            assert annotations[i]["visible"] >= MIN_VISIBLE
            hidden += visible < 0.9
    assert hidden >= 10


def test_all_classes_and_sizes_occur(summary, coco):
    boxes = summary.boxes["train"]
    assert all(sum(sizes.values()) >= 15 for sizes in boxes.values())
    total = {size: sum(sizes[size] for sizes in boxes.values()) for size in boxes["circle"]}
    assert total["small"] >= 30
    assert total["medium"] >= 30
    assert total["large"] >= 3
    counts = [len(annotations) for annotations in by_image(coco).values()]
    assert min(counts) == 1
    assert max(counts) == 8


def test_any_size_of_image(tmp_path):
    summary = make_shapes(
        tmp_path, num_train=3, num_val=1, image_size=(96, 64), max_objects=20, seed=5
    )
    assert summary.images == {"train": 3, "val": 1}
    for path in (tmp_path / "JPEGImages").iterdir():
        assert cv2.imread(str(path)).shape == (64, 96, 3)


# --- errors --------------------------------------------------------------------------------------


def test_folder_with_other_files_raises_and_is_unchanged(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=str(tmp_path)):
        make_shapes(tmp_path, num_train=1, num_val=1)
    assert contents(tmp_path) == {"thesis.tex": b"x"}


def test_another_set_raises_and_is_unchanged(tmp_path):
    make_shapes(tmp_path, num_train=1, num_val=1)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="seed=0 instead of 1"):
        make_shapes(tmp_path, num_train=1, num_val=1, seed=1)
    assert contents(tmp_path) == before


def test_file_or_broken_record_raises(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        make_shapes(tmp_path / "file")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "shapes.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.*cannot be read"):
        make_shapes(tmp_path / "broken")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_train=0), "num_train=0: must be an int from 1"),
        (dict(num_val=2.5), "num_val=2.5: must be an int from 1"),
        (dict(num_train=True), "num_train=True: must be an int from 1"),
        (dict(seed=-1), "seed=-1: must be an int from 0"),
        (dict(max_objects=21), "max_objects=21: must be an int from 1 to 20"),
        (dict(image_size=160), r"image_size=160: must be \(width, height\)"),
        (dict(image_size=(160, 32)), "image_size=32: must be an int from 64 to 4096"),
    ],
)
def test_wrong_arguments_are_named_and_write_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_shapes(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


# --- the tool ------------------------------------------------------------------------------------


def run_tool(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PATIENCE
    )


def test_the_tool_writes_the_set_and_a_contact_sheet(tmp_path):
    done = run_tool(tmp_path, "--train", 3, "--val", 2, "--size", 96, "--seed", 7)
    assert done.returncode == 0, done.stderr
    sheet = tmp_path / "contact_sheet.png"
    assert str(sheet) in done.stdout
    assert cv2.imread(str(sheet)).shape == (1280, 1280, 3)

    summary = make_shapes(tmp_path, num_train=3, num_val=2, image_size=(96, 96), seed=7)
    assert not summary.drawn
    for name in CLASSES:
        assert f"{name:<10}{sum(summary.boxes['train'][name].values()):>6}" in done.stdout


def test_tool_reports_errors_in_one_line(tmp_path, monkeypatch, capsys):
    # In this process, since importing mmdet takes seconds.
    (tmp_path / "thesis.tex").write_text("x")
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stop.value.code == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: root={str(tmp_path)!r}")
    assert errors.count("\n") == 1
