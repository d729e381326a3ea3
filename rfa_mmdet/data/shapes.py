"""A small data set of drawn shapes, to try a detector on without downloading anything.

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
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator, default_rng

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

CLASSES = ("circle", "square", "triangle", "star")
SPLITS = ("train", "val")
# COCO's classes of size, and the area in pixels at which each ends.
SIZE_LIMITS = {"small": 32**2, "medium": 96**2, "large": float("inf")}
# An object of which less can be seen is not in the set.
MIN_VISIBLE = 0.35
# Of a shape to what surrounds it, as a distance in CIE Lab (black to white is 100).
MIN_CONTRAST = 40.0

# The longer side of the box in pixels, and how often it is drawn from that range. The longest
# are limited by the image.
_SIDES = ((16, 31), (36, 88), (100, 1000))
_SIDE_ODDS = (0.35, 0.5, 0.15)
_MAX_SIDE = 0.85
# Each shape is turned from its upright position by at most so much, in radians. More would be
# fairer to nature, but needs more images than a CPU sees in minutes.
_MAX_TURN = np.deg2rad(15)
# Corners, and the distance of every other one from the centre (of the others: 1).
_OUTLINES = {"circle": (48, 1), "square": (4, 1), "triangle": (3, 1), "star": (10, 0.45)}
# Tries to place an object before the image does without it.
_TRIES = 30
# Changes when the same arguments draw other images.
_VERSION = 1


@dataclass(frozen=True)
class ShapesSummary:
    """What :func:`make_shapes` has put into a folder.

    Args:
        root (Path): The folder.
        images (dict[str, int]): Images in each split.
        boxes (dict[str, dict[str, dict[str, int]]]): Boxes by split, class and COCO's class of
            size.
        drawn (bool): False where the folder held this very set already.
    """

    root: Path
    images: dict[str, int]
    boxes: dict[str, dict[str, dict[str, int]]]
    drawn: bool


class _Shape(NamedTuple):
    label: int
    polygon: np.ndarray  # (N, 2) of x, y; a pixel is the square from (x, y) to (x + 1, y + 1)
    mask: np.ndarray  # (H, W) of bool: the whole shape, covered by others or not
    visible: np.ndarray  # (H, W) of bool: what no later shape covers


def make_shapes(
    root: str | os.PathLike,
    num_train: int = 960,
    num_val: int = 120,
    image_size: Sequence[int] = (160, 160),
    seed: int = 0,
    max_objects: int = 6,
) -> ShapesSummary:
    """Draw the data set into a folder, unless the folder holds it already.

    Args:
        root (str | os.PathLike): Folder, made if it is missing.
        num_train, num_val (int): Images in each split. A small RetinaNet learns the default set;
            240 images it learns by heart.
        image_size (Sequence[int]): Width and height in pixels. Large objects (COCO's class) need
            128 at least.
        seed (int): Same seed, same images.
        max_objects (int): Each image has one object to this many.

    Returns:
        ShapesSummary: What the folder holds.

    Raises:
        UserError: A ValueError; an argument is wrong, or the folder holds something else.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     make_shapes(folder, num_train=2, num_val=1).images
        {'train': 2, 'val': 1}
    """
    counts = {
        "train": _int_in("num_train", num_train, 1, 1_000_000),
        "val": _int_in("num_val", num_val, 1, 1_000_000),
    }
    width, height = _size(image_size)
    seed = _int_in("seed", seed, 0, 2**63 - 1)
    max_objects = _int_in("max_objects", max_objects, 1, 20)
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


def draw_image(
    rng: Generator, image_size: tuple[int, int], max_objects: int
) -> tuple[np.ndarray, list[_Shape]]:
    """Draw one image.

    Args:
        rng (Generator): Where all chance comes from.
        image_size (tuple[int, int]): Width and height.
        max_objects (int): At most so many shapes, and one at least.

    Returns:
        tuple[np.ndarray, list]: (H, W, 3) of uint8 in BGR, and the shapes, later ones in front.

    Example:
        >>> image, shapes = draw_image(default_rng(0), (96, 64), max_objects=3)
        >>> image.shape, 1 <= len(shapes) <= 3
        ((64, 96, 3), True)
    """
    width, height = image_size
    canvas = _background(rng, width, height)
    # The largest first: in front, it would hide all others.
    sides = sorted(
        (_random_side(rng, image_size) for _ in range(rng.integers(1, max_objects + 1))),
        reverse=True,
    )
    shapes: list[_Shape] = []
    for side in sides:
        for _ in range(_TRIES):
            shape, alpha = _random_shape(rng, side, image_size)
            behind = [s._replace(visible=s.visible & ~shape.mask) for s in shapes]
            if any(s.visible.sum() < MIN_VISIBLE * s.mask.sum() for s in behind):
                continue
            colour = _contrasting_colour(rng, canvas, shape.mask)
            if colour is None:
                continue
            canvas += alpha[..., None] * (_shaded(rng, colour, width, height) - canvas)
            shapes = [*behind, shape]
            break
    if not shapes:  # a background on which no colour stands out; rare, so simply draw another
        return draw_image(rng, image_size, max_objects)

    if rng.random() < 0.4:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 0.9))
    canvas += rng.normal(0, rng.uniform(1, 7), canvas.shape)
    return _to_bytes(canvas), shapes


# --- drawing: canvases are (H, W, 3) of float in BGR, 0 to 255 ---------------------------------


def _background(rng: Generator, width: int, height: int) -> np.ndarray:
    noise = np.zeros((height, width))
    for octave in range(5):
        cells = rng.normal(size=(3 * 2**octave, 3 * 2**octave))
        smooth = np.asarray(cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC), float)
        noise += smooth / 1.7**octave
    first = rng.uniform(30, 225, 3)
    second = first + rng.normal(0, 45, 3)
    share = 1 / (1 + np.exp(-rng.uniform(1, 3) * noise[..., None]))
    canvas = first + share * (second - first)

    canvas += _waves(rng, width, height, cycles=(0.1, 0.4), amplitude=(0, 40))  # a gradient
    if rng.random() < 0.6:  # stripes
        canvas += _waves(rng, width, height, cycles=(4, 20), amplitude=(4, 20))
    canvas += rng.normal(0, rng.uniform(1, 8), (height, width, 1))
    return np.clip(canvas, 0, 255)


def _waves(rng, width, height, cycles, amplitude) -> np.ndarray:
    """Return (H, W, 3): a sine in a random direction, of so many cycles an image."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width] / max(width, height)
    phase = 2 * np.pi * rng.uniform(*cycles) * (x * np.cos(angle) + y * np.sin(angle))
    wave = np.sin(phase + rng.uniform(0, 2 * np.pi))
    return wave[..., None] * rng.uniform(*amplitude) * rng.uniform(0.5, 1, 3)


def _random_side(rng: Generator, image_size: tuple[int, int]) -> float:
    longest = _MAX_SIDE * min(image_size)
    low, high = _SIDES[rng.choice(len(_SIDES), p=_SIDE_ODDS)]
    if low > longest:
        low, high = _SIDES[1]
    return rng.uniform(low, min(high, longest))


def _random_shape(
    rng: Generator, side: float, image_size: tuple[int, int]
) -> tuple[_Shape, np.ndarray]:
    """Return a shape whose box has this longer side, and how much of each pixel it covers."""
    label = int(rng.integers(len(CLASSES)))
    corners, inner = _OUTLINES[CLASSES[label]]
    # The first corner points up; a square stands on a side.
    first = -np.pi / 2 + (np.pi / 4 if corners == 4 else 0)
    angle = first + rng.uniform(-_MAX_TURN, _MAX_TURN)
    turns = angle + 2 * np.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2, inner, 1)
    polygon = radii[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    polygon *= side / np.ptp(polygon, axis=0).max()
    # A pixel of margin: VOC's xmax, as mmdet reads it, is one beyond the last pixel (_write_voc).
    room = np.array(image_size) - 2 - np.ptp(polygon, axis=0)
    polygon += 1 + rng.uniform(0, 1, 2) * room - polygon.min(axis=0)
    polygon = polygon.round(2)

    alpha = _coverage(polygon, image_size)
    # Less than half a pixel is enough: the tips of a star are thinner than one.
    mask = alpha >= 0.3
    return _Shape(label, polygon, mask, mask), alpha


def _coverage(polygon: np.ndarray, image_size: tuple[int, int], scale: int = 4) -> np.ndarray:
    """Return (H, W): the share of each pixel that lies in the polygon."""
    width, height = image_size
    fine = np.zeros((height * scale, width * scale), np.float32)
    points = np.round(polygon * scale - 0.5).astype(np.int32)
    cv2.fillPoly(fine, [points], 1.0)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)


def _contrasting_colour(
    rng: Generator, canvas: np.ndarray, mask: np.ndarray, tries: int = 20
) -> np.ndarray | None:
    """Return a random colour that stands out from nearly all that surrounds the mask."""
    around = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool) & ~mask
    surroundings = _lab(canvas[around])
    for colour in rng.uniform(0, 255, (tries, 3)):
        distances = np.linalg.norm(surroundings - _lab(colour[None]), axis=1)
        if np.percentile(distances, 10) >= MIN_CONTRAST:
            return colour
    return None


def _lab(colours: np.ndarray) -> np.ndarray:
    """Return (N, 3) in CIE Lab for (N, 3) in BGR."""
    scaled = np.clip(colours, 0, 255).astype(np.float32)[None] / 255
    return cv2.cvtColor(scaled, cv2.COLOR_BGR2Lab)[0]


def _shaded(rng: Generator, colour: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a canvas of the colour, lit from one side and with some grain."""
    light = _waves(rng, width, height, cycles=(0.3, 1), amplitude=(0, 18))
    return np.clip(colour + light + rng.normal(0, rng.uniform(0, 5), light.shape), 0, 255)


def _to_bytes(canvas: np.ndarray) -> np.ndarray:
    return np.clip(canvas.round(), 0, 255).astype(np.uint8)


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


def _annotation(shape: _Shape) -> dict[str, Any]:
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
    width, height = (_int_in("image_size", side, 64, 4096) for side in value)
    return width, height
