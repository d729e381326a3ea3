"""Annotation files in COCO's format."""

import gc
import json
import math
import os
from collections import Counter
from typing import Any

from mmdet.datasets import CocoDataset

from rfa_mmdet.data.check.classes import class_source, metainfo_fix
from rfa_mmdet.data.check.find import Leaf
from rfa_mmdet.data.check.loaded import Loaded, kept
from rfa_mmdet.data.check.report import DataError, Findings, some

# What MMDetection reads of every entry.
_ENTRIES = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}


def read_coco(path: str, annotated: bool = True) -> dict:
    """Read an annotation file.

    Args:
        path (str): Of a file that exists.
        annotated (bool): Whether ``annotations`` must be there. The images that COCO publishes
            for submissions have none.

    Returns:
        dict: Its content; every list is there, every entry has what MMDetection reads.

    Raises:
        DataError: It is cut off, not JSON, or not in COCO's format.
    """
    size = f"{os.path.getsize(path):,} bytes"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        # Collecting garbage amid the millions of new objects of COCO triples the time.
        gc.disable()
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} ({size}) is cut off or not JSON: {error.msg} at character {error.pos:,} "
            f"(line {error.lineno}); copy or export it again"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} ({size}) is not JSON: no text at byte {error.start:,}") from error
    finally:
        gc.enable()
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}; COCO's format is a dict with {_lists()}"
        )
    if not annotated:
        content.setdefault("annotations", [])
    for name, keys in _ENTRIES.items():
        if not isinstance(content.get(name), list):
            raise DataError(
                f"{path} has no list {name!r}, only {some(map(repr, content), 8)}; COCO's format "
                f"needs {_lists()}"
            )
        _check_entries(path, name, content[name], keys)
    return content


def _lists() -> str:
    return ", ".join(map(repr, _ENTRIES))


def _check_entries(path: str, name: str, entries: list, keys: tuple[str, ...]) -> None:
    lacking = [
        f"{name}[{i}] (id {entry.get('id') if isinstance(entry, dict) else '?'})"
        for i, entry in enumerate(entries)
        if not isinstance(entry, dict) or any(entry.get(key) is None for key in keys)
    ]
    if lacking:
        raise DataError(
            f"{path}: {some(lacking)} lack one of {', '.join(map(repr, keys))}, which MMDetection "
            "reads of every entry"
        )
    repeated = [i for i, count in Counter(e["id"] for e in entries).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: ids of {name!r} must be unique, but more than one has: {some(repeated)}"
        )
    if name == "annotations":
        wrong = [e["id"] for e in entries if not _is_box(e["bbox"])]
        if wrong:
            raise DataError(
                f"{path}: bbox of annotations {some(wrong)} is not [x, y, w, h] in finite numbers"
            )


def _is_box(bbox: Any) -> bool:
    if not isinstance(bbox, list) or len(bbox) != 4:
        return False
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in bbox)


def check_coco(leaf: Leaf, dataset: CocoDataset, found: Findings) -> Loaded:
    """Check the annotation file of a COCO dataset, which must exist.

    Raises:
        DataError: Nothing further can be said about the dataset.
    """
    content = read_coco(dataset.ann_file, annotated=not dataset.test_mode)
    classes = tuple(dataset.metainfo["classes"])
    labels = _labels(leaf, dataset.ann_file, classes, content["categories"], found)
    images, boxes = _boxes(leaf, dataset, content, found)
    folder = dataset.data_prefix["img"]
    return Loaded(labels, [os.path.join(folder, i["file_name"]) for i in images], boxes)


def _labels(leaf: Leaf, path: str, classes: tuple, categories: list, found: Findings) -> tuple:
    names = tuple(category["name"] for category in categories)
    absent = [name for name in classes if name not in names]
    if absent:
        # The categories that are there would move up into the wrong labels.
        raise DataError(
            f"{leaf.key}: {len(absent)} of its {len(classes)} classes are no categories of "
            f"{path}: {some(map(repr, absent))}. The file's categories: "
            f"{some(map(repr, names), 80)}; the dataset's classes: "
            f"{some(map(repr, classes), 80)} ({class_source(leaf)}). "
            f"{metainfo_fix(leaf, names)}"
        )
    # MMDetection numbers labels in the order of the file, whatever the order of the classes.
    labels = tuple(name for name in names if name in classes)
    if len(set(labels)) < len(labels):
        repeated = [name for name, count in Counter(labels).items() if count > 1]
        raise DataError(
            f"{path}: several categories have the same name ({some(map(repr, repeated))}); "
            "each would get a label of its own, more than the head has. Merge them"
        )
    if labels != classes:
        found.warnings.append(
            f"{leaf.key}: classes={classes!r} are in another order than the categories of "
            f"{path}, and MMDetection numbers labels in the order of the file, so pictures would "
            f"show wrong names. Right would be classes={labels!r}"
        )
    return labels


def _boxes(
    leaf: Leaf, dataset: CocoDataset, content: dict, found: Findings
) -> tuple[list[dict], int]:
    classes = dataset.metainfo["classes"]
    wanted = {c["id"] for c in content["categories"] if c["name"] in classes}
    by_id = {image["id"]: image for image in content["images"]}
    annotated, used = set(), set()
    learnt: Counter[int] = Counter()
    flat, lost = [], []
    for ann in content["annotations"]:
        image = by_id.get(ann["image_id"])
        if image is None:
            lost.append(ann["id"])
            continue
        if ann["category_id"] not in wanted:
            continue
        used.add(ann["category_id"])
        annotated.add(ann["image_id"])
        x, y, w, h = ann["bbox"]
        if w <= 0 or h <= 0:
            flat.append(image["file_name"])
        # The rest is what CocoDataset.parse_data_info drops or marks as ignored.
        elif (
            min(w, h) >= 1
            and ann["area"] > 0
            and min(x + w, image["width"]) > max(x, 0)
            and min(y + h, image["height"]) > max(y, 0)
            and not ann.get("ignore")
            and not ann.get("iscrowd")
        ):
            learnt[ann["image_id"]] += 1
    if flat:
        found.warnings.append(
            f"{leaf.key}: {len(flat)} boxes of {dataset.ann_file} are inverted or empty "
            f"(w <= 0 or h <= 0) and will be dropped, in {some(dict.fromkeys(flat))}"
        )
    if lost:
        found.warnings.append(
            f"{leaf.key}: {len(lost)} annotations of {dataset.ann_file} have an image_id that no "
            f"image has, and are ignored: ids {some(lost)}"
        )
    unused = [c["name"] for c in content["categories"] if c["id"] in wanted - used]
    if unused and used and not dataset.test_mode:
        found.warnings.append(
            f"{leaf.key}: classes {some(map(repr, unused))} have no box in {dataset.ann_file}"
        )
    images = kept(
        dataset,
        content["images"],
        lambda image: min(image["width"], image["height"]),
        lambda image: image["id"] in annotated,
    )
    if not images:
        raise DataError(
            f"{leaf.key}: none of the {len(content['images'])} images of {dataset.ann_file} is "
            f"left to read (filter_cfg={dataset.filter_cfg}, indices={dataset._indices}); "
            f"{len(content['annotations'])} annotations, {len(annotated)} images with one of the "
            "classes"
        )
    return images, sum(learnt[image["id"]] for image in images)
