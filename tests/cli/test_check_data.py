"""tools/check_data.py on really damaged data, and the audit's rules one by one."""

import csv
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope

from rfa_mmdet.cli import check_data
from rfa_mmdet.data.check.audit import KINDS, Box, audit, box_problem
from rfa_mmdet.data.check.contact_sheet import worst
from rfa_mmdet.data.shapes import CLASSES
from tests.helpers.paths import ROOT

CONFIG = "configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py"


@pytest.fixture
def damaged(shapes, tmp_path):
    """Return a copy of the dataset to damage."""
    return shutil.copytree(shapes, tmp_path / "data")


def edit(root, change, split="train"):
    """Change an annotation file: its content, and the boxes of image i as by[i]."""
    path = root / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    by = [
        [a for a in content["annotations"] if a["image_id"] == i["id"]] for i in content["images"]
    ]
    change(content, by)
    path.write_text(json.dumps(content))
    return [root / "JPEGImages" / image["file_name"] for image in content["images"]]


def check(run_tool, root, out, *options):
    return run_tool(
        *(sys.executable, "-W", "ignore", "tools/check_data.py", CONFIG, "--out", out, *options),
        DATA_ROOT=str(root),
        COLUMNS="120",
    )


def test_good_data(run_tool, shapes, tmp_path):
    done = check(run_tool, shapes, tmp_path)
    assert done.returncode == 0, done.stdout
    assert "error" not in done.stdout
    assert "warning" not in done.stdout
    # The table matches the dataset's COCO file.
    content = json.loads((shapes / "annotations" / "train.json").read_text())
    counts = Counter(CLASSES[a["category_id"] - 1] for a in content["annotations"])
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("│")}
    for name in CLASSES:
        assert rows[name].split()[3] == str(counts[name])
    assert rows["images"].split()[3:6:2] == ["12", "4"]
    assert list(tmp_path.iterdir()) == []


def test_data_with_every_problem(run_tool, damaged, tmp_path):
    val = json.loads((damaged / "annotations" / "val.json").read_text())

    def change(content, by):
        by[0][0]["bbox"] = [-90, 5, 80, 30]
        by[1][0]["bbox"] = [30, 30, -20, 15]
        by[2][0]["bbox"] = [30, 30, 0.4, 15]
        content["annotations"].append({**by[3][0], "id": 99999})
        by[4][0]["category_id"] = 77
        content["images"][5]["width"] = 100
        for annotation in by[9]:
            content["annotations"].remove(annotation)
        content["images"][10]["file_name"] = val["images"][0]["file_name"]

    images = edit(damaged, change)
    images[6].unlink()
    images[7].write_bytes(images[7].read_bytes()[:-500])
    whole = images[8].read_bytes()
    images[8].write_bytes(whole[:2] + bytes(300) + whole[302:])
    (damaged / "JPEGImages" / "more.png").write_bytes(b"")
    done = check(run_tool, damaged, tmp_path / "out")
    assert done.returncode == 1
    assert "1 of 11 images are missing" in done.stdout
    assert f"are damaged: {images[7]}: truncated JPEG" in done.stdout
    assert f"error: 1 images cannot be decoded: {images[8]}\n" in done.stdout
    with open(tmp_path / "out" / "problems.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["kind"], row["image"].rsplit("/")[-1]) for row in rows}
    names = [path.name for path in images]
    assert found == {
        ("missing", names[6]),
        ("damaged", names[7]),
        ("not decodable", names[8]),
        ("other size than annotated", names[5]),
        ("box inverted or empty", names[1]),
        ("box outside", names[0]),
        ("box below 1 pixel", names[2]),
        ("box twice", names[3]),
        ("unknown class", names[4]),
        ("in two splits", names[10]),
        ("without boxes", names[9]),
        ("not annotated", "more.png"),
        ("not annotated", "train_0010.jpg"),
    }
    assert [row["kind"] for row in rows] == sorted((r["kind"] for r in rows), key=KINDS.index)
    sheet = cv2.imread(str(tmp_path / "out" / "worst.png"))
    # Twelve cells have a picture or a frame, and some have red boxes.
    assert sheet.shape[1] == 1440
    assert (np.abs(sheet.astype(int) - (0x2D, 0x11, 0xE8)).max(2) < 8).sum() > 200
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_fixed_data_removes_old_results(run_tool, damaged, tmp_path):
    out = tmp_path / "out"
    path = damaged / "annotations" / "train.json"
    whole = path.read_text()
    edit(damaged, lambda content, by: by[0][0]["bbox"].__setitem__(0, -30))
    done = check(run_tool, damaged, out)
    assert "OK; the items listed above will be skipped\n" in done.stdout
    assert {file.name for file in out.iterdir()} == {"problems.csv", "worst.png"}
    path.write_text(whole)
    done = check(run_tool, damaged, out)
    assert "OK: a run can start\n" in done.stdout
    assert list(out.iterdir()) == []


def test_quick_check_keeps_the_results_of_a_full_one(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    quick = ["--check-data", "quick"]
    monkeypatch.setattr(sys, "argv", ["check_data.py", str(ROOT / CONFIG), *quick])
    kept = Path("work_dirs", Path(CONFIG).stem, "data", "problems.csv")
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    assert check_data.main() == 0
    assert kept.read_text() == "kept"


@pytest.mark.parametrize("option", [("--threads", "2"), ("--out", "found")])
def test_options_of_a_full_check_are_rejected(option, monkeypatch, capsys):
    quick = ["--check-data", "quick"]
    monkeypatch.setattr(sys, "argv", ["check_data.py", CONFIG, *quick, *option])
    with pytest.raises(SystemExit):
        check_data.main()
    assert f"{option[0]}: has no effect with --check-data quick" in capsys.readouterr().err


@pytest.mark.slow
def test_unreadable_annotations_do_not_mark_images_as_unannotated(run_tool, damaged, tmp_path):
    path = damaged / "annotations" / "train.json"
    path.write_text(path.read_text()[:-100])
    for splits in (["train", "val"], ["val"]):
        done = check(run_tool, damaged, tmp_path / "out", "--splits", *splits)
        assert done.returncode == int("train" in splits), done.stdout
        assert not (tmp_path / "out" / "problems.csv").exists()
    assert "OK: a run can start\n" in done.stdout


@pytest.mark.slow
def test_problems_that_training_survives(run_tool, damaged, tmp_path):
    def change(content, by):
        by[0][0]["bbox"][0] = -30

    images = edit(damaged, change)
    done = check(run_tool, damaged, tmp_path / "out")
    assert done.returncode == 0, done.stdout
    assert images[0].name in (tmp_path / "out" / "problems.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--splits", "train", "--cfg-options", "model.bbox_head.num_classes=9"], "num_classes=9"),
        (["--cfg-options", "train_dataloader.dataset.ann_file=no.json"], "no.json does not exist"),
    ],
)
def test_problems_found_before_a_run(run_tool, shapes, tmp_path, options, message):
    done = check(run_tool, shapes, tmp_path, *options)
    assert done.returncode == 1
    assert done.stdout.count("error: ") == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout


def load(shapes, monkeypatch, **changes):
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    monkeypatch.setenv("CLASSES", ",".join(CLASSES))
    init_default_scope("mmdet")
    return Config.fromfile(ROOT / "configs/custom/retinanet_r18-rfaconv_fpn_50e_custom-voc.py")


def test_voc(damaged, monkeypatch):
    path = damaged / "Annotations" / "train_0000.xml"
    text = path.read_text()
    start = text.index("<xmin>")
    path.write_text(text[:start] + "<xmin>500</xmin>" + text[text.index("</xmin>") + 7 :])
    other = damaged / "Annotations" / "train_0001.xml"
    name = other.read_text().split("<name>")[1].split("<")[0]
    other.write_text(other.read_text().replace(f"<name>{name}<", "<name>hexagon<"))
    found = audit(load(damaged, monkeypatch), ["train", "val"])
    assert found.images == {"train": 12, "val": 4}
    kinds = {(p.kind, p.path.rsplit("/")[-1]) for p in found.problems}
    assert ("box inverted or empty", "train_0000.jpg") in kinds
    assert ("unknown class", "train_0001.jpg") in kinds
    # VOC's pixels start at 1: no box of the drawn dataset is outside.
    assert "box outside" not in {kind for kind, _ in kinds}


def test_coco_and_voc_of_the_same_data_have_the_same_boxes(shapes, monkeypatch):
    voc = audit(load(shapes, monkeypatch), ["train"])
    coco = audit(Config.fromfile(ROOT / CONFIG), ["train"])
    assert voc.boxes == coco.boxes
    assert voc.problems == coco.problems == []


def test_classes_without_boxes_are_counted(damaged, monkeypatch):
    def change(content, by):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 4]

    edit(damaged, change)
    monkeypatch.setenv("DATA_ROOT", str(damaged))
    init_default_scope("mmdet")
    assert audit(Config.fromfile(ROOT / CONFIG), ["train"]).boxes["train"]["star"] == 0


def test_splits_with_the_same_files_are_checked_once(shapes, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    init_default_scope("mmdet")
    found = audit(Config.fromfile(ROOT / CONFIG))
    assert found.images == {"train": 12, "val": 4}
    assert found.problems == []


def test_rare_problems_are_shown_before_repeated_frequent_ones(damaged, monkeypatch):
    def change(content, by):
        for i in range(6):
            by[i][0]["bbox"] = [60 + i, 5, 30, 30]  # the last one is furthest outside
        content["images"][7]["height"] = 99

    edit(damaged, change)
    monkeypatch.setenv("DATA_ROOT", str(damaged))
    init_default_scope("mmdet")
    found = audit(Config.fromfile(ROOT / CONFIG), ["train"])
    order = [path.rsplit("_")[-1] for path, _ in worst(found, 3)]
    assert order == ["0007.jpg", "0005.jpg", "0004.jpg"]


side = st.floats(-200, 200, width=32)


@given(st.tuples(side, side, side, side), st.tuples(st.integers(1, 99), st.integers(1, 99)))
def test_box_problem_is_reported_iff_the_box_is_outside_the_image(xyxy, size):
    x1, y1, x2, y2 = xyxy
    problem = box_problem(Box("a", xyxy), size)
    inside = x1 >= -1 and y1 >= -1 and x2 <= size[0] + 1 and y2 <= size[1] + 1
    extended = x2 - x1 >= 1 and y2 - y1 >= 1
    assert (problem is None) == (inside and extended)
    assert problem is None or problem[0] in KINDS
    # Without a size, nothing is outside.
    assert (box_problem(Box("a", xyxy), None) is None) == extended
