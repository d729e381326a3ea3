"""Small COCO and VOC datasets to damage, and configs that read them."""

import json
import shutil
from pathlib import Path

import cv2
import mmdet
import numpy as np
import pytest
from mmengine.config import Config

from rfa_mmdet.data.check import DataError, check_data
from rfa_mmdet.data.check.classes import heads

CLASSES = ("cat", "dog", "traffic light")
LOAD = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
MODELS = Path(mmdet.__file__).parent / ".mim/configs/_base_/models"
FILTER = dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1))


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))


def coco_content():
    return dict(
        images=[dict(id=i, file_name=f"{i}.jpg", width=64, height=48) for i in range(4)],
        categories=[dict(id=10 + i, name=name) for i, name in enumerate(CLASSES)],
        annotations=[
            dict(
                id=i + 1,  # pycocotools does not accept 0 as an id
                image_id=i % 4,
                category_id=10 + i % 3,
                bbox=[5, 5, 20, 20],
                area=400,
                iscrowd=0,
            )
            for i in range(6)
        ],
    )


def voc_xml(*objects):
    text = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, difficult, (x1, y1, x2, y2) in objects
    )
    size = "<size><width>64</width><height>48</height></size>"
    return f"<annotation>{size}{text}</annotation>"


@pytest.fixture(scope="session")
def coco_made(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(coco_content()))
    for i in range(4):
        write_image(root / "images" / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def voc_made(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    (root / "Annotations").mkdir()
    for i in range(3):
        write_image(root / "JPEGImages" / f"{i}.jpg")
        box = (CLASSES[i], 0, (5, 5, 30, 30))
        (root / "Annotations" / f"{i}.xml").write_text(voc_xml(box, (CLASSES[0], 0, (1, 1, 9, 9))))
    (root / "train.txt").write_text("0\n1\n2\n")
    return root


@pytest.fixture
def coco(coco_made, tmp_path):
    """Return the folder of a COCO dataset to damage."""
    return shutil.copytree(coco_made, tmp_path / "coco")


@pytest.fixture
def voc(voc_made, tmp_path):
    """Return the folder of a VOC dataset to damage."""
    return shutil.copytree(voc_made, tmp_path / "voc")


def coco_dataset(root, split="train", **changes):
    dataset = dict(
        type="CocoDataset",
        data_root=str(root),
        ann_file=f"{split}.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=CLASSES),
        pipeline=LOAD,
        backend_args=None,
    )
    if split == "train":
        dataset["filter_cfg"] = dict(filter_empty_gt=True, min_size=32)
    else:
        dataset["test_mode"] = True
    return {**dataset, **changes}


def voc_dataset(root, **changes):
    dataset = dict(
        type="XMLDataset",
        data_root=str(root),
        ann_file="train.txt",
        data_prefix=dict(sub_data_root=""),
        metainfo=dict(classes=CLASSES),
        pipeline=LOAD,
    )
    return {**dataset, **changes}


def config(train, val=None, model="retinanet_r50_fpn", num_classes=3, **more):
    """Return a config of an mmdet model, with ``num_classes`` in its heads unless None."""
    cfg = Config.fromfile(MODELS / f"{model}.py") if model else Config(dict())
    if model and num_classes is not None:
        cfg.merge_from_dict({f"{key}.num_classes": num_classes for key, _ in heads(cfg.model)})
    new = dict(train_dataloader=dict(dataset=train), **more)
    if val is not None:
        new["val_dataloader"] = dict(dataset=val)
    cfg.merge_from_dict(new)
    return cfg


def errors_of(cfg, splits=("train",)):
    with pytest.raises(DataError) as caught:
        check_data(cfg, splits)
    return str(caught.value)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def told_of(coco, change, split="train", **dataset):
    """Return errors and warnings as lines, after a change to a file's content."""
    edit_json(coco / f"{split}.json", change)
    evaluator = dict(
        type="CocoMetric", ann_file=str(coco / "val.json"), **dataset.pop("metric", {})
    )
    cfg = config(
        coco_dataset(coco, **dataset), coco_dataset(coco, "val"), None, val_evaluator=evaluator
    )
    try:
        return check_data(cfg, ("train", "val") if split == "val" else ("train",))
    except DataError as error:
        return str(error).splitlines()


def setting(name, /, **values):
    """Return a change of the second entry of a list; None removes a field."""

    def change(content):
        for key, value in values.items():
            if value is None:
                content[name][1].pop(key, None)
            else:
                content[name][1][key] = value

    return change


def every(name, key, make):
    """Return a change of a field in all entries of a list."""

    def change(content):
        for entry in content[name]:
            entry[key] = make(entry.get(key))

    return change
