"""Two-image datasets at the paths and in the formats of a config."""

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS

from rfa_mmdet.data.shapes import CLASSES

SPLIT_KEYS = ("train_dataloader", "val_dataloader", "test_dataloader")


def leaves(node: Any) -> Iterator[dict]:
    """Yield the datasets that read files, inside repeated, concatenated and mixed ones."""
    if isinstance(node, dict):
        if "ann_file" in node:
            yield node
        else:
            for value in node.values():
                yield from leaves(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from leaves(value)


def classes_of(leaf: dict) -> tuple[str, ...]:
    """Return the classes of a dataset's config, or else of its type."""
    own = DATASETS.get(leaf["type"]).METAINFO
    return tuple(leaf.get("metainfo", own)["classes"])


def draw_sets(cfg: dict, shapes: Path) -> None:
    """Write every dataset that a config reads, relative to the working directory.

    Args:
        cfg (dict): Config of a run; files shared by its dataloaders are written once.
        shapes (Path): Dataset drawn by make_shapes, whose images replace those of the dataset.
    """
    for key in SPLIT_KEYS:
        for leaf in leaves(cfg[key].dataset):
            split = "val" if leaf.get("test_mode") else "train"
            coco = json.loads((shapes / "annotations" / f"{split}.json").read_text())
            root = Path(leaf["data_root"])
            folder = root / leaf["data_prefix"].get("img", "")
            if (root / leaf["ann_file"]).exists():
                continue
            (root / leaf["ann_file"]).parent.mkdir(parents=True, exist_ok=True)
            stems = [Path(image["file_name"]).stem for image in coco["images"]]
            if "Coco" in leaf["type"]:
                folder.mkdir(parents=True, exist_ok=True)
                for stem in stems:
                    shutil.copy(shapes / "JPEGImages" / f"{stem}.jpg", folder)
                renamed = _renamed(coco, classes_of(leaf))
                (root / leaf["ann_file"]).write_text(json.dumps(renamed))
            else:
                _write_voc(leaf, shapes, stems)


def stand_ins(classes: tuple[str, ...]) -> list[int]:
    """Return the labels to use for the drawn shapes, including the first and the last."""
    last = len(CLASSES) - 1
    return [i * (len(classes) - 1) // last for i in range(len(CLASSES))]


def _renamed(coco: dict, classes: tuple[str, ...]) -> dict:
    labels = stand_ins(classes)
    annotations = [
        {**one, "category_id": labels[one["category_id"] - 1] + 1} for one in coco["annotations"]
    ]
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
    return {**coco, "annotations": annotations, "categories": categories}


def _write_voc(leaf: dict, shapes: Path, stems: list[str]) -> None:
    classes = classes_of(leaf)
    names = dict(zip(CLASSES, (classes[i] for i in stand_ins(classes)), strict=True))
    root = Path(leaf["data_root"])
    folder = root / leaf["data_prefix"].get("sub_data_root", "")
    images = folder / leaf.get("img_subdir", "JPEGImages")
    annotations = folder / leaf.get("ann_subdir", "Annotations")
    for place in (images, annotations):
        place.mkdir(parents=True, exist_ok=True)
    for i, stem in enumerate(stems):
        suffix = ".JPG" if leaf["type"] == "AnyImageXMLDataset" and i % 2 else ".jpg"
        shutil.copy(shapes / "JPEGImages" / f"{stem}.jpg", images / f"{stem}{suffix}")
        tree = ET.parse(shapes / "Annotations" / f"{stem}.xml")
        for node in tree.getroot().findall("object/name"):
            node.text = names[node.text]
        tree.write(annotations / f"{stem}.xml")
    (root / leaf["ann_file"]).write_text("".join(f"{stem}\n" for stem in stems))
