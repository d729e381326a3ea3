"""Check every image and box of a config's data.

The checks before a run only look for what makes the run fail. The audit decodes every image as
training does, and compares it with its annotations.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

from mmdet.datasets import CocoDataset, XMLDataset
from mmengine.config import Config

from rfa_mmdet.cpus import available_cpus
from rfa_mmdet.data.check.coco_file import read_coco
from rfa_mmdet.data.check.find import Leaf, files_of, format_of, is_local, learns, leaves
from rfa_mmdet.data.check.images import NOT_DECODABLE, read_image
from rfa_mmdet.data.check.report import DataError
from rfa_mmdet.data.check.voc import voc_images
from rfa_mmdet.files import MISSING

# Kinds of problems with an image, worst first; the FATAL ones end a run that reads the image.
FATAL = (MISSING, "damaged", NOT_DECODABLE)
KINDS = (
    *FATAL,
    "other size than annotated",
    "box inverted or empty",
    "box outside",
    "box below 1 pixel",
    "box twice",
    "unknown class",
    "in two splits",
    "without boxes",
    "not annotated",
)
# Pixels by which a box may exceed the image: annotation tools round.
TOLERANCE = 1.0
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class Box(NamedTuple):
    """A box as annotated.

    Attributes:
        name (str): Name of its class.
        xyxy (tuple[float, float, float, float]): Corners in pixels, starting at 0.
    """

    name: str
    xyxy: tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotated:
    """An image and its annotations.

    Attributes:
        path (str): The image file.
        size (tuple[int, int] | None): Width and height, if the annotations give them.
        boxes (tuple[Box, ...]): Boxes that training learns from.
        unknown (tuple[str, ...]): Names or ids of classes that the dataset does not have.
    """

    path: str
    size: tuple[int, int] | None
    boxes: tuple[Box, ...]
    unknown: tuple[str, ...] = ()


class Problem(NamedTuple):
    """A problem with an image.

    Attributes:
        kind (str): One of :data:`KINDS`.
        split (str): 'train', 'val' or 'test'.
        path (str): The image file.
        text (str): Description.
        weight (float): Severity among problems of the same kind.
        box (Box | None): The box concerned, if any.
    """

    kind: str
    split: str
    path: str
    text: str
    weight: float = 0.0
    box: Box | None = None


@dataclass
class Audit:
    """Result of an audit.

    Attributes:
        problems (list[Problem]): All problems.
        images (dict[str, int]): Split -> number of images.
        boxes (dict[str, Counter]): Split -> number of boxes by class, including empty classes.
        annotations (dict[str, Annotated]): Path -> annotations, for images with a problem.
        skipped (list[str]): Config keys of datasets that are neither COCO nor VOC, or not local.
    """

    problems: list[Problem] = field(default_factory=list)
    images: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, Counter] = field(default_factory=dict)
    annotations: dict[str, Annotated] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def count(self, kind: str, split: str) -> int:
        """Return the number of problems of a kind in a split."""
        return sum(p.kind == kind and p.split == split for p in self.problems)


def audit(
    cfg: Config,
    splits: Sequence[str] = ("train", "val", "test"),
    threads: int | None = None,
    progress: Callable[[Iterable, int], Iterable] = lambda items, total: items,
) -> Audit:
    """Check every image of a config's datasets, and find images without annotations.

    Args:
        cfg (Config): A detector's config.
        splits (Sequence[str]): Splits to check: 'train', 'val' or 'test'. Files that several splits
            share are checked once.
        threads (int | None): Number of images to decode in parallel. Defaults to None: the number
            of CPUs.
        progress (Callable): Takes an iterator over the results and their number, and yields them.

    Returns:
        Audit: The result. Unreadable annotation files are skipped;
        :func:`~rfa_mmdet.data.check.find_problems` reports them.
    """
    found = Audit()
    work: list[tuple[str, Annotated]] = []
    seen: dict[tuple, str] = {}  # files of a dataset -> its first split
    # Real path -> its splits; None stands for a split that is not checked.
    splits_of: defaultdict[str, set[str | None]] = defaultdict(set)
    all_read = True
    for split in (*splits, *({"train", "val", "test"} - {*splits})):
        for leaf in leaves(cfg, split):
            read = _read(leaf)
            if read is None:
                all_read = False
                found.skipped += [leaf.key] if split in splits else []
                continue
            classes, records, source = read
            if split not in splits:  # its images are annotated, though not checked
                for record in records:
                    splits_of[os.path.realpath(record.path)].add(None)
                continue
            if source in seen:  # 'test' is often the same as 'val', which is not a problem
                for record in records if seen[source] == "train" else ():
                    splits_of[os.path.realpath(record.path)].add(split)
                continue
            seen[source] = split
            found.images[split] = found.images.get(split, 0) + len(records)
            counts = found.boxes.setdefault(split, Counter(dict.fromkeys(classes, 0)))
            for record in records:
                splits_of[os.path.realpath(record.path)].add(split)
                counts.update(box.name for box in record.boxes)
                work.append((split, record))
    pool = ThreadPool(threads or available_cpus())
    with pool:
        sizes = pool.imap(_look, [record.path for _, record in work], chunksize=4)
        for (split, record), (size, damage) in zip(work, progress(sizes, len(work)), strict=True):
            problems = [*_image_problems(split, record, size, damage)]
            having = sorted(filter(None, splits_of[os.path.realpath(record.path)]))
            if len(having) > 1:
                text = f"in {' and '.join(having)}"
                problems.append(Problem("in two splits", split, record.path, text))
            if problems:
                found.annotations[record.path] = record
                found.problems += problems
    if all_read:  # otherwise, an unreadable file may list them
        found.problems += _unnamed(work, splits_of)
    return found


def dataset_images(cfg: Config, split: str, number: int) -> list[str]:
    """Return the first image files of a split; an empty list if its data cannot be read.

    Args:
        cfg (Config): A detector's config.
        split (str): 'train', 'val' or 'test'.
        number (int): Maximum number of files.
    """
    read = [found for leaf in leaves(cfg, split) if (found := _read(leaf))]
    paths = (record.path for _, records, _ in read for record in records)
    return list(islice(paths, number))


def _read(leaf: Leaf) -> tuple[tuple[str, ...], list[Annotated], tuple] | None:
    """Return the classes, the images and a key that identifies the dataset's files, or None."""
    try:
        dataset = leaf.build()
        if not is_local(dataset.ann_file, getattr(dataset, "backend_args", None)):
            return None
        read = dict(coco=_coco, voc=_voc).get(format_of(dataset) or "")
        records = list(read(dataset)) if read else []
        if not read or not all(leaf.reads_locally(record.path) for record in records[:1]):
            return None
    # The checks before a run report what is wrong with the config or the file.
    except (DataError, KeyError, TypeError, OSError, RuntimeError, UnicodeDecodeError):
        return None
    return tuple(dataset.metainfo["classes"]), records, files_of(dataset)


def _coco(dataset: CocoDataset) -> Iterator[Annotated]:
    content = read_coco(dataset.ann_file, annotated=learns(dataset))
    names = {category["id"]: category["name"] for category in content["categories"]}
    classes = set(dataset.metainfo["classes"])
    boxes, unknown = defaultdict(list), defaultdict(list)
    for annotation in content["annotations"]:
        if annotation.get("iscrowd") or annotation.get("ignore"):
            continue  # regions that training ignores
        x, y, width, height = annotation["bbox"]
        name: str | None = names.get(annotation["category_id"])
        image = annotation["image_id"]
        if name is not None and name in classes:
            boxes[image].append(Box(name, (x, y, x + width, y + height)))
        else:
            unknown[image].append(name or f"category_id {annotation['category_id']}")
    for image in content["images"]:
        yield Annotated(
            os.path.join(dataset.data_prefix["img"], image["file_name"]),
            (image["width"], image["height"]),
            tuple(boxes[image["id"]]),
            tuple(unknown[image["id"]]),
        )


def _voc(dataset: XMLDataset) -> Iterator[Annotated]:
    classes = set(dataset.metainfo.get("classes") or ())
    for _, image in voc_images(dataset):
        if isinstance(image, DataError):
            continue
        yield Annotated(
            image.path,
            image.size if image.size and min(image.size) > 0 else None,
            tuple(Box(b.name, _from_zero(*b.xyxy)) for b in image.boxes),
            tuple(n for n in image.names if n not in classes),
        )


def _from_zero(x1: int, y1: int, x2: int, y2: int) -> tuple[float, float, float, float]:
    """Return corners starting at 0; VOC starts at 1."""
    return float(x1 - 1), float(y1 - 1), float(x2 - 1), float(y2 - 1)


def _look(path: str) -> tuple[tuple[int, int] | None, str | None]:
    """Return the width and height of an image, or what is wrong with the file."""
    image, damage = read_image(path)
    return (None, damage) if image is None else ((image.shape[1], image.shape[0]), None)


def _image_problems(
    split: str,
    record: Annotated,
    size: tuple[int, int] | None,
    damage: str | None,
) -> Iterator[Problem]:
    if damage:
        kinds = (kind for kind in (MISSING, NOT_DECODABLE) if damage.startswith(kind))
        yield Problem(next(kinds, "damaged"), split, record.path, damage)
    if size and record.size and size != record.size:
        turned = " (rotated)" if size == record.size[::-1] else ""
        text = "{} x {}, is {} x {}".format(*record.size, *size) + turned
        yield Problem("other size than annotated", split, record.path, text, 1 + bool(turned))
    for name, count in Counter(record.unknown).items():
        yield Problem("unknown class", split, record.path, f"{name} ({count})", count)
    for box, count in Counter(record.boxes).items():
        problem = box_problem(box, size or record.size)
        if problem:
            kind, weight = problem
            numbers = ", ".join(f"{value:g}" for value in box.xyxy)
            yield Problem(kind, split, record.path, f"{box.name}: {numbers}", weight, box)
        elif count > 1:
            yield Problem("box twice", split, record.path, f"{box.name} ({count})", count, box)
    if not record.boxes and not record.unknown:
        yield Problem("without boxes", split, record.path, "no box of any of the dataset's classes")


def box_problem(box: Box, size: tuple[int, int] | None) -> tuple[str, float] | None:
    """Return what is wrong with a box, or None.

    Args:
        box (Box): The box as annotated.
        size (tuple[int, int] | None): Width and height of the image, if known.

    Returns:
        tuple[str, float] | None: One of :data:`KINDS` and a weight, the higher the worse.

    Example:
        >>> box_problem(Box("cat", (5, 5, 3, 9)), (64, 48))
        ('box inverted or empty', 2)
        >>> box_problem(Box("cat", (50, 5, 70, 9)), (64, 48))
        ('box outside', 6)
        >>> box_problem(Box("cat", (50, 5, 64, 9)), (64, 48))
    """
    x1, y1, x2, y2 = box.xyxy
    side = min(x2 - x1, y2 - y1)
    if side <= 0:
        return "box inverted or empty", -side
    if size:
        over = max(-x1, -y1, x2 - size[0], y2 - size[1])
        if over > TOLERANCE:
            return "box outside", over
    return ("box below 1 pixel", 1 - side) if side < 1 else None


def _unnamed(work: list, splits_of: dict) -> Iterator[Problem]:
    """Yield image files that no split lists, in the folders of those listed."""
    folders: dict[str, str] = {}
    for split, record in work:
        folders.setdefault(os.path.dirname(record.path), split)
    for folder, split in folders.items():
        entries = sorted(os.listdir(folder)) if os.path.isdir(folder) else ()
        for name in entries:
            path = os.path.join(folder, name)
            if name.lower().endswith(_ENDINGS) and os.path.realpath(path) not in splits_of:
                yield Problem("not annotated", split, path, "not listed in any annotation file")
