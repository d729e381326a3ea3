"""A small dataset of drawn shapes, to try a detector on without downloading anything.

Circles, squares, triangles and stars on textured backgrounds, written as COCO and as VOC, so that
``CocoDataset`` and ``XMLDataset`` read the same boxes. Image i of a split follows from
(seed, split, i) alone: a larger set begins with the images of a smaller one.
"""

import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import default_rng

from rfa_mmdet.data.drawing import CLASSES, Shape, draw_image
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

SPLITS = ("train", "val")
# COCO's classes of size, and the area in pixels at which each ends.
SIZE_LIMITS = {"small": 32**2, "medium": 96**2, "large": float("inf")}
# Smallest and largest value of num_train and num_val, image_size, seed and max_objects.
NUMBERS, SIDES, SEEDS, OBJECTS = (1, 1_000_000), (64, 4096), (0, 2**63 - 1), (1, 20)
# Increased when the same arguments give other images.
_VERSION = 2


@dataclass(frozen=True)
class ShapesSummary:
    """The dataset that :func:`make_shapes` wrote.

    Attributes:
        root (Path): The folder.
        images (dict[str, int]): Images in each split.
        boxes (dict[str, dict[str, dict[str, int]]]): Boxes by split, class and COCO's class of
            size.
        drawn (bool): False if the folder already contained this dataset.
    """

    root: Path
    images: dict[str, int]
    boxes: dict[str, dict[str, dict[str, int]]]
    drawn: bool


def make_shapes(
    root: str | os.PathLike,
    num_train: int = 960,
    num_val: int = 120,
    image_size: Sequence[int] = (160, 160),
    seed: int = 0,
    max_objects: int = 8,
) -> ShapesSummary:
    """Draw the dataset into a folder, unless it is there already.

    Args:
        root (str | os.PathLike): Output folder; created if missing.
        num_train, num_val (int): Images in each split. A small RetinaNet memorises 240
            images, but not the default number.
        image_size (Sequence[int]): Width and height in pixels. Large objects (COCO's class) need
            at least 128.
        seed (int): The same seed gives the same images.
        max_objects (int): Largest number of objects in an image; the smallest is one.

    Returns:
        ShapesSummary: The dataset.

    Raises:
        UserError: An argument is invalid, or the folder contains other files.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     make_shapes(folder, num_train=2, num_val=1).images
        {'train': 2, 'val': 1}
    """
    counts = {
        "train": _int_in("num_train", num_train, *NUMBERS),
        "val": _int_in("num_val", num_val, *NUMBERS),
    }
    width, height = _size(image_size)
    seed = _int_in("seed", seed, *SEEDS)
    max_objects = _int_in("max_objects", max_objects, *OBJECTS)
    parameters = {
        "version": _VERSION,
        **{f"num_{split}": number for split, number in counts.items()},
        "image_size": [width, height],
        "seed": seed,
        "max_objects": max_objects,
    }

    root = Path(root)
    _claim(root, parameters)
    drawn = not _complete(root, counts)
    if drawn:
        for folder in ("annotations", "Annotations", "JPEGImages", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for split, number in counts.items():
            _write_split(root, split, number, parameters)
    boxes = {split: _count_boxes(root / "annotations" / f"{split}.json") for split in SPLITS}
    return ShapesSummary(root, counts, boxes, drawn)


# --- files -------------------------------------------------------------------------------------


def _write_split(root: Path, split: str, number: int, parameters: dict[str, Any]) -> None:
    width, height = image_size = tuple(parameters["image_size"])
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(number):
        rng = default_rng([parameters["seed"], SPLITS.index(split), index])
        pixels, shapes = draw_image(rng, image_size, parameters["max_objects"])
        stem = _stem(split, index)
        _, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        _write(root / "JPEGImages" / f"{stem}.jpg", jpeg.tobytes())
        images.append(
            dict(id=index + 1, file_name=f"{stem}.jpg", width=width, height=height),
        )
        found = [_annotation(shape) for shape in shapes]
        _write_voc(root, stem, image_size, found)
        for annotation in found:
            identity = dict(id=len(annotations) + 1, image_id=index + 1)
            annotations.append({**identity, **annotation})
    names = "".join(f"{_stem(split, index)}\n" for index in range(number))
    _write(root / "ImageSets" / "Main" / f"{split}.txt", names.encode())
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
    coco = dict(images=images, annotations=annotations, categories=categories)
    # Last, since its presence says that the split is complete.
    _write(root / "annotations" / f"{split}.json", json.dumps(coco).encode())


def _annotation(shape: Shape) -> dict[str, Any]:
    columns, rows = (np.flatnonzero(shape.mask.any(axis=axis)) for axis in (0, 1))
    x, y = int(columns[0]), int(rows[0])
    return dict(
        category_id=shape.label + 1,
        bbox=[x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        area=round(float(cv2.contourArea(shape.polygon.astype(np.float32))), 2),
        iscrowd=0,
        segmentation=[shape.polygon.ravel().tolist()],
        visible=round(float(shape.visible.sum() / shape.mask.sum()), 4),
    )


def _write_voc(root: Path, stem: str, image_size: tuple[int, int], found: list[dict]) -> None:
    """Write VOC's XML, with the coordinates that mmdet turns into those of the COCO file.

    mmdet's XMLDataset takes 1 from all four. In COCO, x + width is one beyond the last pixel, so
    xmax is here one more than the last pixel counted from 1.
    """
    annotation = ET.Element("annotation")
    ET.SubElement(annotation, "folder").text = "JPEGImages"
    ET.SubElement(annotation, "filename").text = f"{stem}.jpg"
    size = ET.SubElement(annotation, "size")
    for name, value in zip(("width", "height", "depth"), (*image_size, 3), strict=True):
        ET.SubElement(size, name).text = str(value)
    for one in found:
        item = ET.SubElement(annotation, "object")
        ET.SubElement(item, "name").text = CLASSES[one["category_id"] - 1]
        ET.SubElement(item, "difficult").text = "0"
        box = ET.SubElement(item, "bndbox")
        x, y, width, height = one["bbox"]
        corners = dict(xmin=x, ymin=y, xmax=x + width, ymax=y + height)
        for name, value in corners.items():
            ET.SubElement(box, name).text = str(value + 1)
    ET.indent(annotation)
    _write(root / "Annotations" / f"{stem}.xml", ET.tostring(annotation))


def _stem(split: str, index: int) -> str:
    return f"{split}_{index:04d}"


def _write(path: Path, content: bytes) -> None:
    # Whole: an interrupted run, or a second process, must not leave or see half a file.
    with written_whole(path) as part:
        part.write_bytes(content)


def _claim(root: Path, parameters: dict[str, Any]) -> None:
    """Make the folder ours, or raise if it holds anything but this set."""
    record = root / "shapes.json"
    if root.exists() and not root.is_dir():
        raise UserError(f"root={str(root)!r}: is a file; name a new folder, or one of an older run")
    if not record.is_file():
        if root.is_dir() and any(root.iterdir()):
            raise UserError(
                f"root={str(root)!r}: holds files, but no shapes.json of an earlier run; "
                "name a new or an empty folder"
            )
        root.mkdir(parents=True, exist_ok=True)
        _write(record, json.dumps(parameters, indent=2).encode())
        return
    try:
        found = json.loads(record.read_text())
        differences = [
            f"{key}={found.get(key)!r} instead of {value!r}"
            for key, value in parameters.items()
            if found.get(key) != value
        ]
    except (ValueError, AttributeError) as error:
        raise UserError(f"root={str(root)!r}: its shapes.json cannot be read ({error})") from error
    if differences:
        raise UserError(
            f"root={str(root)!r}: holds another set of shapes ({', '.join(differences)}); "
            "name another folder, or delete this one"
        )


def _complete(root: Path, counts: dict[str, int]) -> bool:
    wanted = [
        *(f"annotations/{split}.json" for split in counts),
        *(f"ImageSets/Main/{split}.txt" for split in counts),
    ]
    for split, number in counts.items():
        for stem in (_stem(split, index) for index in range(number)):
            wanted += [f"JPEGImages/{stem}.jpg", f"Annotations/{stem}.xml"]
    return all((root / name).is_file() for name in wanted)


def _count_boxes(path: Path) -> dict[str, dict[str, int]]:
    counts = {name: dict.fromkeys(SIZE_LIMITS, 0) for name in CLASSES}
    for annotation in json.loads(path.read_text())["annotations"]:
        size = next(name for name, limit in SIZE_LIMITS.items() if annotation["area"] < limit)
        counts[CLASSES[annotation["category_id"] - 1]][size] += 1
    return counts


# --- arguments ---------------------------------------------------------------------------------


def _int_in(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name}={value!r}: must be an int from {low} to {high}")
    return value


def _size(value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise UserError(f"image_size={value!r}: must be (width, height)")
    width, height = (_int_in("image_size", side, *SIDES) for side in value)
    return width, height
