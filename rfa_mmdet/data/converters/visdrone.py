"""Convert VisDrone2019-DET's text files to COCO JSON.

A line of a text file is ``left, top, width, height, score, category, truncation, occlusion``.
Objects with score 0 are to be ignored; category 0 marks ignored regions, 11 other objects.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

from rfa_mmdet.cpus import available_cpus
from rfa_mmdet.data.check.images import read_image
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

# In category order, starting at 1.
CLASSES = (
    *("pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle", "awning-tricycle"),
    *("bus", "motor"),
)
SPLITS = ("train", "val", "test-dev")
IGNORED_REGION, OTHERS = 0, 11
FIELDS = ("left", "top", "width", "height", "score", "category", "truncation", "occlusion")
IGNORED = ("crowd", "drop")


class Line(NamedTuple):
    """A line of an annotation file: a box in pixels, and the codes of the format."""

    left: int
    top: int
    width: int
    height: int
    score: int
    category: int
    truncation: int
    occlusion: int


@dataclass
class Summary:
    """Result of converting a split.

    Attributes:
        path (Path): The JSON file.
        images (int): Number of images in it.
        boxes (dict[str, int]): Number of boxes to learn from, by class.
        ignored (int): Number of ignored regions, other objects, and objects with score 0.
        clipped (int): Number of boxes clipped to the image.
        dropped (int): Number of boxes without any area in the image.
        skipped (dict[str, str]): Path of each unreadable image -> what is wrong with it.
    """

    path: Path
    images: int = 0
    boxes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))
    ignored: int = 0
    clipped: int = 0
    dropped: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def read_lines(path: str | os.PathLike) -> list[Line]:
    """Read an annotation file.

    Args:
        path (str | os.PathLike): A text file; lines may end with a comma.

    Raises:
        UserError: A line is invalid.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> with NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("684,8,273,116,0,0,0,0,")
        ...     file.flush()
        ...     read_lines(file.name)[0].width
        273
    """
    lines = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        values = line.strip().rstrip(",").split(",")
        if values == [""]:
            continue
        try:
            found = Line(*map(int, values))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path}: line {number} is {line!r}; expected the {len(FIELDS)} integers "
                f"{', '.join(FIELDS)}"
            ) from error
        if not IGNORED_REGION <= found.category <= OTHERS or found.score not in (0, 1):
            raise UserError(
                f"{path}: line {number} has score {found.score} and category {found.category}; "
                "expected a score of 0 or 1 and a category from 0 to 11. Files with other scores "
                "are detection results, not annotations"
            )
        lines.append(found)
    return lines


def convert(
    root: str | os.PathLike,
    split: str,
    ignored: str = "crowd",
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Summary:
    """Write ``annotations/{split}.json`` in the dataset's folder.

    Boxes are clipped to the image. Category ids are VisDrone's, 1 to 10.

    Args:
        root (str | os.PathLike): Folder that contains ``VisDrone2019-DET-{split}`` with ``images``
            and ``annotations``.
        split (str): 'train', 'val' or 'test-dev'.
        ignored (str): 'crowd' turns everything to be ignored into ``iscrowd`` annotations, which
            MMDetection ignores in training and COCO's evaluation does not count as false positives.
            COCO's crowds have a class: ignored regions and other objects become one annotation per
            class, objects with score 0 keep theirs. 'drop' removes all of them, so detections
            there count as false positives. Defaults to 'crowd'.
        progress (Callable): Takes an iterator over the images read and their number, and yields
            them.

    Returns:
        Summary: The content of the file.

    Raises:
        UserError: A folder or file is missing, or a file is invalid.
    """
    if ignored not in IGNORED:
        raise UserError(f"ignored={ignored!r}: must be one of {', '.join(IGNORED)}")
    root = Path(root)
    folder = root / f"VisDrone2019-DET-{split}"
    images = _images(folder)
    summary = Summary(root / "annotations" / f"{split}.json")
    coco = dict(
        info=dict(description=f"VisDrone2019-DET-{split}, what is to be ignored: {ignored}"),
        images=[],
        annotations=[],
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)],
    )
    lines = {path: read_lines(folder / "annotations" / f"{path.stem}.txt") for path in images}
    with ThreadPool(available_cpus()) as pool:
        sizes = progress(pool.imap(_size, images, chunksize=4), len(images))
        for path, (size, damage) in zip(images, sizes, strict=True):
            if damage:
                summary.skipped[str(path)] = damage
                continue
            _add(coco, summary, path.name, size, lines[path], ignored)
    if not coco["images"]:
        bad, damage = next(iter(summary.skipped.items()))
        raise UserError(f"none of the {len(images)} images can be read, e.g. {bad}: {damage}")
    with written_whole(summary.path) as part:
        part.write_text(json.dumps(coco), encoding="utf-8")
    return summary


def _images(folder: Path) -> list[Path]:
    for part in ("images", "annotations"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: no such folder; expected the dataset as published")
    images = {path.stem: path for path in sorted((folder / "images").glob("*.jpg"))}
    texts = {path.stem for path in (folder / "annotations").glob("*.txt")}
    for have, lack, what in (
        (images.keys(), texts, "images have no annotation file"),
        (texts, images.keys(), "annotation files have no image"),
    ):
        only = sorted(have - lack)
        if only:
            raise UserError(f"{folder}: {len(only)} {what}, e.g. {only[0]}")
    if not images:
        raise UserError(f"{folder / 'images'}: contains no .jpg files")
    return list(images.values())


def _size(path: Path) -> tuple[tuple[int, int] | None, str | None]:
    image, damage = read_image(str(path))
    return (None, damage) if image is None else ((image.shape[1], image.shape[0]), None)


def _add(
    coco: dict,
    summary: Summary,
    name: str,
    size: tuple[int, int],
    lines: list[Line],
    ignored: str,
) -> None:
    """Add an image and its boxes to the content of a COCO file."""
    image = len(coco["images"]) + 1
    coco["images"].append(dict(id=image, file_name=name, width=size[0], height=size[1]))
    summary.images += 1
    for line in lines:
        x1, y1 = max(line.left, 0), max(line.top, 0)
        x2 = min(line.left + line.width, size[0])
        y2 = min(line.top + line.height, size[1])
        if x2 <= x1 or y2 <= y1:
            summary.dropped += 1
            continue
        summary.clipped += (x2 - x1, y2 - y1) != (line.width, line.height)
        crowd = not line.score or line.category in (IGNORED_REGION, OTHERS)
        summary.ignored += crowd
        if crowd and ignored == "drop":
            continue
        for category in _categories(line):
            coco["annotations"].append(
                dict(
                    id=len(coco["annotations"]) + 1,
                    image_id=image,
                    category_id=category,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    area=(x2 - x1) * (y2 - y1),
                    iscrowd=int(crowd),
                    truncation=line.truncation,
                    occlusion=line.occlusion,
                )
            )
        if not crowd:
            summary.boxes[CLASSES[line.category - 1]] += 1


def _categories(line: Line) -> Iterator[int]:
    every = line.category in (IGNORED_REGION, OTHERS)
    yield from range(1, len(CLASSES) + 1) if every else (line.category,)
