"""tools/dataset_converters/visdrone.py on a generated folder in the original format."""

import json
import runpy
import sys

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfa_mmdet.data.check import find_problems
from rfa_mmdet.data.converters.visdrone import CLASSES, FIELDS, convert, read_lines
from rfa_mmdet.errors import UserError
from tests.helpers.paths import ROOT

TOOL = "tools/dataset_converters/visdrone.py"
# left, top, width, height, score, category, truncation, occlusion
FIRST = """\
10,20,30,40,1,4,0,1
684,8,273,116,0,0,0,0,
5,5,8,8,1,1,0,0
600,300,100,100,1,10,1,2
300,300,50,50,0,11,0,0
100,100,20,20,0,6,0,0
700,20,10,10,1,4,0,0
50,50,0,10,1,4,0,0
"""


@pytest.fixture
def root(tmp_path):
    """Return two splits of two images of 640 x 360; the second image has no objects."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        folder = tmp_path / f"VisDrone2019-DET-{split}"
        for name in ("images", "annotations"):
            (folder / name).mkdir(parents=True)
        for name, text in (("0000002_00005_d_0000014", FIRST), ("0000003_00000_d_0000015", "")):
            image = rng.integers(0, 255, (360, 640, 3), np.uint8)
            cv2.imwrite(str(folder / "images" / f"{name}.jpg"), image)
            (folder / "annotations" / f"{name}.txt").write_text(text)
    return tmp_path


def test_tool(run_tool, root):
    done = run_tool(sys.executable, "-W", "ignore", TOOL, root)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in sorted((root / "annotations").iterdir())] == [
        "train.json",
        "val.json",
    ]
    content = json.loads((root / "annotations" / "train.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(CLASSES)
    assert [c["id"] for c in content["categories"]] == list(range(1, 11))
    assert [(i["width"], i["height"]) for i in content["images"]] == [(640, 360)] * 2
    learnt = [a for a in content["annotations"] if not a["iscrowd"]]
    assert [(a["category_id"], a["bbox"], a["area"]) for a in learnt] == [
        (4, [10, 20, 30, 40], 1200),
        (1, [5, 5, 8, 8], 64),
        (10, [600, 300, 40, 60], 2400),
    ]
    assert [(a["truncation"], a["occlusion"]) for a in learnt] == [(0, 1), (0, 0), (1, 2)]
    crowds = [a for a in content["annotations"] if a["iscrowd"]]
    # The ignored region is outside of this image; "others" applies to every class.
    every = [(i, [300, 300, 50, 50]) for i in range(1, 11)]
    assert [(a["category_id"], a["bbox"]) for a in crowds] == [*every, (6, [100, 100, 20, 20])]
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if "│" in line}
    for name, number in (("images", 2), ("car", 1), ("boxes of all classes", 3)):
        assert rows[name].split("│")[2].strip() == str(number)
    assert rows["ignored annotations"].split("│")[2].strip() == "2"
    assert rows["boxes clipped to the image"].split("│")[2].strip() == "1"
    assert rows["empty boxes dropped"].split("│")[2].strip() == "3"


def test_base_config_reads_converted_files(root, monkeypatch):
    for split in ("train", "val"):
        convert(root, split)
    monkeypatch.setenv("DATA_ROOT", str(root))
    cfg = Config.fromfile(ROOT / "configs/_base_/datasets/visdrone.py")
    init_default_scope("mmdet")
    found = find_problems(cfg, ("train", "val"))
    assert found.errors == []
    assert found.warnings == []
    assert cfg.train_dataloader.dataset.metainfo.classes == CLASSES
    from mmdet.registry import DATASETS

    dataset = DATASETS.build({**cfg.train_dataloader.dataset, "pipeline": []})
    (image,) = [dataset.get_data_info(i) for i in range(len(dataset))]
    learnt = [i["bbox_label"] for i in image["instances"] if not i["ignore_flag"]]
    assert learnt == [3, 0, 9]


@pytest.mark.parametrize("ignored", ["crowd", "drop"])
def test_detections_in_ignored_regions_are_not_false_positives(root, ignored):
    path = root / "VisDrone2019-DET-val" / "annotations" / "0000003_00000_d_0000015.txt"
    path.write_text("100,100,50,50,1,4,0,0\n300,100,200,200,0,0,0,0\n")
    coco = COCO(str(convert(root, "val", ignored).path))
    hit = dict(image_id=2, category_id=4, bbox=[100, 100, 50, 50], score=0.5)
    # A car in the ignored region, with a higher score than the true one.
    inside = dict(image_id=2, category_id=4, bbox=[350, 150, 40, 40], score=0.9)
    evaluation = COCOeval(coco, coco.loadRes([hit, inside]), "bbox")
    evaluation.params.catIds, evaluation.params.imgIds = [4], [2]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, 0, 0, -1]
    assert precision.min() == pytest.approx(1.0 if ignored == "crowd" else 0.5)


def test_unreadable_images_are_skipped(root):
    image = root / "VisDrone2019-DET-train" / "images" / "0000002_00005_d_0000014.jpg"
    image.write_bytes(image.read_bytes()[:5000])
    summary = convert(root, "train")
    assert summary.images == 1
    assert summary.skipped[str(image)].startswith("truncated JPEG")
    other = root / "VisDrone2019-DET-train" / "images" / "0000003_00000_d_0000015.jpg"
    other.write_text("")
    summary.path.unlink()
    with pytest.raises(UserError, match="none of the 2 images can be read"):
        convert(root, "train")
    assert not summary.path.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3,4,1,4,0", "line 2 is '1,2,3,4,1,4,0'; expected the 8 integers left"),
        ("1,2,3,4,1,4,0,zero", "expected the 8 integers"),
        ("1,2,3,4,0.5,4,-1,-1", "expected the 8 integers"),
        ("1,2,3,4,1,12,0,0", "score 1 and category 12"),
        ("1,2,3,4,-1,4,-1,-1", "score -1 and category 4"),
    ],
)
def test_invalid_lines(root, line, message):
    path = root / "VisDrone2019-DET-train" / "annotations" / "0000002_00005_d_0000014.txt"
    path.write_text(f"1,2,3,4,1,4,0,0\n{line}\n")
    with pytest.raises(UserError, match=f"{path.name}: line 2 ") as caught:
        convert(root, "train")
    assert message in str(caught.value)
    assert not (root / "annotations").exists()


def test_wrong_folders(root, capsys, monkeypatch):
    def error(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / TOOL), run_name="__main__")
        assert stop.value.code == 1
        return capsys.readouterr().err

    assert "no folder VisDrone2019-DET-train" in error(root / "VisDrone2019-DET-val")
    assert "VisDrone2019-DET-test-dev/images: no such folder" in error(root, "--splits", "test-dev")
    text = root / "VisDrone2019-DET-train" / "annotations" / "0000003_00000_d_0000015.txt"
    text.rename(text.with_name("other.txt"))
    assert "1 images have no annotation file, e.g. 0000003_00000_d_0000015" in error(root)
    (root / "VisDrone2019-DET-train" / "images" / f"{text.stem}.jpg").unlink()
    assert "1 annotation files have no image, e.g. other" in error(root)


numbers = st.integers(-50, 2000)


@given(
    st.lists(
        st.tuples(
            *[numbers] * 4,
            st.integers(0, 1),
            st.integers(0, 11),
            st.integers(0, 2),
            st.integers(0, 2),
        )
    ),
    st.sampled_from([",".join, ", ".join, lambda values: ",".join(values) + ","]),
)
def test_written_lines_are_read_back(tmp_path_factory, lines, join):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_text("\r\n".join(join(map(str, line)) for line in lines))
    assert [tuple(line) for line in read_lines(path)] == lines
    assert len(FIELDS) == 8
