"""Templates for custom data, with a Roboflow export in COCO and VOC format."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from rfa_mmdet.data.check import check_data
from rfa_mmdet.data.shapes import CLASSES, make_shapes
from tests.helpers.paths import ROOT

# As on Roboflow's web site, one with a space.
NAMES = dict(zip(CLASSES, ("traffic light", "car", "van", "bus"), strict=True))
GIVEN = ", ".join(NAMES.values())
SPLITS = {"train": "train", "valid": "val", "test": "val"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    # Enough images for every class to occur in both splits.
    make_shapes(root, num_train=8, num_val=8, image_size=(128, 96), seed=1, max_objects=5)
    return root


@pytest.fixture
def template(monkeypatch):
    def load(name: str, **variables: str) -> Config:
        splits = [f"{s}_{k}" for s in ("TRAIN", "VAL", "TEST") for k in ("SET", "ANN", "IMG")]
        for key in ("IMG_DIR", "ANN_DIR", *splits):
            monkeypatch.delenv(key, raising=False)
        for key, value in variables.items():
            monkeypatch.setenv(key, str(value))
        return Config.fromfile(ROOT / f"configs/custom/retinanet_r18-rfaconv_fpn_50e_{name}.py")

    return load


def export_coco(shapes: Path, root: Path) -> None:
    """Lay out a dataset like Roboflow: a parent category with id 0, images next to the file."""
    for split, drawn in SPLITS.items():
        (root / split).mkdir(parents=True)
        coco = json.loads((shapes / "annotations" / f"{drawn}.json").read_text())
        parent = dict(id=0, name="vehicles-abcd", supercategory="none")
        coco["categories"] = [
            parent,
            *(
                dict(id=one["id"], name=NAMES[one["name"]], supercategory=parent["name"])
                for one in coco["categories"]
            ),
        ]
        (root / split / "_annotations.coco.json").write_text(json.dumps(coco))
        for image in coco["images"]:
            shutil.copy(shapes / "JPEGImages" / image["file_name"], root / split)


def export_voc(shapes: Path, root: Path) -> None:
    """Lay out a dataset like Roboflow: an XML file next to each image, and no lists."""
    for split, drawn in SPLITS.items():
        (root / split).mkdir(parents=True)
        for path in (shapes / "Annotations").glob(f"{drawn}_*.xml"):
            text = path.read_text()
            for name, theirs in NAMES.items():
                text = text.replace(f"<name>{name}<", f"<name>{theirs}<")
            (root / split / path.name).write_text(text)
            shutil.copy(shapes / "JPEGImages" / f"{path.stem}.jpg", root / split)


def boxes(cfg: Config, split: str) -> list[tuple]:
    """Return image, class name and box of all annotations of a dataset, sorted."""
    init_default_scope("mmdet")
    dataset = DATASETS.build(cfg[f"{split}_dataloader"].dataset)
    return sorted(
        (
            Path(item["img_path"]).name,
            dataset.metainfo["classes"][one["bbox_label"]],
            *map(int, one["bbox"]),
        )
        for item in (dataset.get_data_info(i) for i in range(len(dataset)))
        for one in item["instances"]
    )


def drawn_boxes(shapes: Path, split: str) -> list[tuple]:
    coco = json.loads((shapes / "annotations" / f"{split}.json").read_text())
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    found = []
    for one in coco["annotations"]:
        x, y, width, height = one["bbox"]
        name = NAMES[CLASSES[one["category_id"] - 1]]
        found.append((files[one["image_id"]], name, x, y, x + width, y + height))
    return sorted(found)


def check(cfg: Config, shapes: Path) -> None:
    assert cfg.model.bbox_head.num_classes == 4
    assert check_data(cfg, ("train", "val", "test")) == []
    for split, drawn in (("train", "train"), ("val", "val"), ("test", "val")):
        assert boxes(cfg, split) == drawn_boxes(shapes, drawn)


def test_roboflow_coco(template, shapes, tmp_path):
    export_coco(shapes, tmp_path)
    cfg = template("roboflow", DATA_ROOT=tmp_path, CLASSES=GIVEN)
    check(cfg, shapes)
    assert cfg.val_evaluator.ann_file == f"{tmp_path}/valid/_annotations.coco.json"
    assert cfg.test_evaluator.ann_file == f"{tmp_path}/test/_annotations.coco.json"


def test_roboflow_voc_by_the_commands_of_the_readme(template, shapes, tmp_path):
    export_voc(shapes, tmp_path)
    readme = (ROOT / "configs/custom/README.md").read_text()
    commands = readme.split("cd data/export && ")[1].split("&& cd -")[0]
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True)
    variables = dict(VAL_SET="valid", TEST_SET="test", IMG_DIR=".", ANN_DIR=".")
    assert " ".join(f"{key}={value}" for key, value in variables.items()) in readme
    cfg = template("custom-voc", DATA_ROOT=tmp_path, CLASSES=GIVEN, **variables)
    check(cfg, shapes)


def test_other_places_in_coco_format(template, shapes, tmp_path):
    export_coco(shapes, tmp_path)
    cfg = template(
        "custom-coco",
        DATA_ROOT=tmp_path,
        CLASSES=GIVEN,
        TRAIN_ANN="train/_annotations.coco.json",
        VAL_ANN="valid/_annotations.coco.json",
        VAL_IMG="valid",
    )
    check(cfg, shapes)


@pytest.fixture
def without_test(shapes, tmp_path):
    """Return a VOC dataset without a third split, and with images of several suffixes."""
    make_shapes(tmp_path, num_train=8, num_val=8, image_size=(128, 96), seed=1, max_objects=5)
    for i, path in enumerate(sorted(tmp_path.glob("JPEGImages/*.jpg"))):
        path.rename(path.with_suffix((".JPG", ".jpeg", ".jpg")[i % 3]))
    (tmp_path / "ImageSets" / "Main" / "test.txt").unlink(missing_ok=True)
    return tmp_path


def test_voc_without_a_test_split_tests_on_val(template, without_test):
    cfg = template("custom-voc", DATA_ROOT=without_test, CLASSES=f"{','.join(CLASSES)},")
    assert check_data(cfg, ("train", "val", "test")) == []
    assert boxes(cfg, "test") == boxes(cfg, "val")
    assert len({name for name, *_ in boxes(cfg, "train")}) == 8
    other = template("custom-voc", DATA_ROOT=without_test, CLASSES="circle", VAL_SET="train")
    assert other.test_dataloader.dataset.ann_file == "ImageSets/Main/train.txt"


def test_unused_test_split_gives_a_warning(template, without_test):
    lists = without_test / "ImageSets" / "Main"
    shutil.copy(lists / "val.txt", lists / "test.txt")
    cfg = template("custom-voc", DATA_ROOT=without_test, CLASSES=",".join(CLASSES))
    assert check_data(cfg, ("train", "val")) == []
    (warning,) = check_data(cfg, ("test",))
    assert f"although {lists}/test.txt exists; with this package's templates, set" in warning
    cfg = template("custom-voc", DATA_ROOT=without_test, CLASSES=",".join(CLASSES), TEST_SET="test")
    assert check_data(cfg, ("test",)) == []


def test_coco_tests_on_val_or_the_given_split(template):
    cfg = template("custom-coco", VAL_ANN="v.json", VAL_IMG="v")
    for key in ("ann_file", "data_prefix"):
        assert cfg.test_dataloader.dataset[key] == cfg.val_dataloader.dataset[key]
    assert cfg.test_evaluator == cfg.val_evaluator
    cfg = template("custom-coco", TEST_ANN="t.json", TEST_IMG="t", DATA_ROOT="here")
    assert cfg.test_dataloader.dataset.ann_file == "t.json"
    assert cfg.test_dataloader.dataset.data_prefix == dict(img="t/")
    assert cfg.test_evaluator.ann_file == "here/t.json"
    assert cfg.val_evaluator.ann_file == "here/annotations/val.json"


def test_roboflow_without_a_test_folder(template, shapes, tmp_path):
    export_coco(shapes, tmp_path)
    shutil.rmtree(tmp_path / "test")
    cfg = template("roboflow", DATA_ROOT=tmp_path, CLASSES=GIVEN)
    assert check_data(cfg, ("train", "val")) == []  # read by training
    cfg = template("roboflow", DATA_ROOT=tmp_path, CLASSES=GIVEN, TEST_SET="valid")
    check(cfg, shapes)


def test_wrong_order_of_classes_gives_a_warning(template, shapes, tmp_path):
    export_coco(shapes, tmp_path)
    cfg = template("roboflow", DATA_ROOT=tmp_path, CLASSES="car,bus,van,traffic light")
    warnings = check_data(cfg, ("train",))
    assert any("are not in the order of the categories" in warning for warning in warnings)
