"""Annotation files in Pascal VOC's format: a list of image names, an XML file for each."""

import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from mmdet.datasets import XMLDataset

from rfa_mmdet.data.check.classes import class_source, metainfo_fix
from rfa_mmdet.data.check.find import Leaf
from rfa_mmdet.data.check.loaded import Loaded, kept
from rfa_mmdet.data.check.report import DataError, Findings, missing_path, some

FILTER = "dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1))"


@dataclass(frozen=True)
class VocBox:
    """A box: corners, and whether it is marked as difficult, which keeps it out of training."""

    name: str
    xyxy: tuple[int, int, int, int]
    difficult: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height."""
        return self.xyxy[2] - self.xyxy[0], self.xyxy[3] - self.xyxy[1]


@dataclass(frozen=True)
class VocImage:
    """An image's XML file.

    Attributes:
        size (tuple[int, int] | None): Width and height, if the file gives them.
        names (list[str]): Of all objects.
        boxes (list[VocBox]): Of the objects of the wanted classes.
    """

    size: tuple[int, int] | None
    names: list[str]
    boxes: list[VocBox]


def read_voc(path: str, classes: Collection[str]) -> VocImage:
    """Read an XML file as MMDetection does.

    Args:
        path (str): The XML file.
        classes (Collection[str]): Objects of other names are not looked into.

    Raises:
        DataError: It is missing, cut off, not XML, or MMDetection cannot read it.
    """
    try:
        root: Any = ET.parse(path).getroot()
        node = root.find("size")
        size = None
        if node is not None:
            size = int(node.find("width").text), int(node.find("height").text)
        objects = [(o.find("name").text, o) for o in root.findall("object")]
        boxes = [_box(name, o) for name, o in objects if name in classes]
    except FileNotFoundError as error:
        raise DataError(missing_path(path)) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except ET.ParseError as error:
        raise DataError(
            f"{path} ({os.path.getsize(path):,} bytes) is cut off or not XML: {error}"
        ) from error
    # A tag that is not there is a None without .text, or int(None).
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: <size> needs width and height as whole numbers; every <object> a name, and "
            f"a bndbox of xmin, ymin, xmax, ymax ({error})"
        ) from error
    return VocImage(size, [name for name, _ in objects], boxes)


def _box(name: str, node: Any) -> VocBox:
    corners = node.find("bndbox")
    x1, y1, x2, y2 = (int(float(corners.find(c).text)) for c in ("xmin", "ymin", "xmax", "ymax"))
    difficult = node.find("difficult")
    return VocBox(name, (x1, y1, x2, y2), difficult is not None and int(difficult.text) != 0)


def check_voc(leaf: Leaf, dataset: XMLDataset, found: Findings) -> Loaded:
    """Check the XML files of a VOC dataset, whose list of images must exist.

    Raises:
        DataError: Nothing further can be said about the dataset.
    """
    classes = dataset.metainfo["classes"]
    folder = os.path.join(dataset.sub_data_root, dataset.ann_subdir)
    images, problems = {}, []
    listed = _image_names(dataset.ann_file, folder)
    twice = [name for name, count in Counter(listed).items() if count > 1]
    if twice:
        found.warnings.append(
            f"{leaf.key}: {dataset.ann_file} names {len(twice)} images more than once, and each "
            f"counts as often: {some(twice)}"
        )
    for name in dict.fromkeys(listed):
        try:
            images[name] = read_voc(os.path.join(folder, f"{name}.xml"), set(classes))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(
            f"{leaf.key}: {len(problems)} of the {len(images) + len(problems)} XML files that "
            f"{dataset.ann_file} asks for cannot be read: {some(problems, 3)}"
        )
    _check_names(leaf, dataset, images, found)
    names = kept(
        dataset,
        list(images),
        lambda name: min(images[name].size or (float("inf"),)),
        lambda name: bool(images[name].boxes),
    )
    if not names:
        raise DataError(
            f"{leaf.key}: none of the {len(images)} images of {dataset.ann_file} is left to read "
            f"(filter_cfg={dataset.filter_cfg}, indices={dataset._indices}). min_size goes by "
            "<size> in the XML files, which some tools write as 0"
        )
    boxes = _check_boxes(leaf, dataset, {name: images[name] for name in names}, found)
    folder = os.path.join(dataset.sub_data_root, dataset.img_subdir)
    return Loaded(tuple(classes), [os.path.join(folder, f"{name}.jpg") for name in names], boxes)


def _image_names(path: str, folder: str) -> list[str]:
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\r\n") for line in file]
    # MMDetection takes a line as it is, blanks included, and an empty one as a name, too.
    for number, line in enumerate(lines, 1):
        if line.split() == [line] or os.path.exists(os.path.join(folder, f"{line}.xml")):
            continue
        if line.strip() and line.split()[1:]:
            right = f"one name per line; lists of one class ('{line}') have another format"
        else:
            right = f"without blanks and empty lines:  sed -i 's/[[:space:]]*$//; /^$/d' {path}"
        raise DataError(
            f"{path}: line {number} is {line!r}, for which MMDetection would read "
            f"{os.path.join(folder, f'{line}.xml')!r}. Right would be {right}"
        )
    return lines


def _check_names(leaf: Leaf, dataset: XMLDataset, images: dict, found: Findings) -> None:
    classes = dataset.metainfo["classes"]
    names = Counter(name for image in images.values() for name in image.names)
    counts = some((f"{name!r} ({count})" for name, count in names.most_common()), 30)
    if names and not names.keys() & set(classes):
        raise DataError(
            f"{leaf.key}: none of its classes occurs in the XML files of {dataset.ann_file}. "
            f"They have {counts}; the dataset's classes: {some(map(repr, classes), 80)} "
            f"({class_source(leaf)}). {metainfo_fix(leaf, tuple(sorted(map(str, names))))}"
        )
    absent = [name for name in classes if name not in names]
    if absent:
        found.warnings.append(
            f"{leaf.key}: classes {some(map(repr, absent))} occur in no XML file of "
            f"{dataset.ann_file}, which has {counts or 'no objects'}"
        )
    ignored = [f"{n!r} ({count})" for n, count in names.most_common() if n not in classes]
    if ignored:
        found.warnings.append(
            f"{leaf.key}: objects of other names than its classes are ignored: {some(ignored)}"
        )


def _check_boxes(leaf: Leaf, dataset: XMLDataset, images: dict, found: Findings) -> int:
    """Report inverted boxes; return the number of boxes to learn from."""
    flat, learnt, risky = [], 0, 0
    smallest = dataset.bbox_min_size
    for name, image in images.items():
        for box in image.boxes:
            # Boxes below bbox_min_size and difficult ones are kept out of the loss.
            ignored = box.difficult or (smallest is not None and min(box.sides) < smallest)
            learnt += not ignored
            if min(box.sides) <= 0:
                flat.append(f"{name}.xml")
                risky += not ignored
    if not flat:
        return learnt
    text = (
        f"{leaf.key}: {len(flat)} boxes are inverted or empty (xmax <= xmin or ymax <= ymin), in "
        f"{some(dict.fromkeys(flat))}"
    )
    filtered = any(
        name == "FilterAnnotations" and transform.get("by_box", True)
        for name, transform in leaf.transforms()
    )
    if dataset.test_mode:
        found.warnings.append(f"{text}; the evaluation counts them as missed")
    elif filtered or not risky:
        found.warnings.append(f"{text}; they are left out of training")
    else:
        # Box coders take the logarithm of the sides: NaN below zero, infinite at zero.
        found.errors.append(
            f"{text}. MMDetection's {type(dataset).__name__} keeps them, and the loss becomes NaN "
            "or infinite. Mend the XML files, or add to the training pipeline, after "
            f"LoadAnnotations:  {FILTER}"
        )
    return learnt - risky
