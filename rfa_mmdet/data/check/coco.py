"""Check datasets and evaluators that read COCO annotation files."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pycocotools.mask
from mmdet.datasets import CocoDataset

from rfa_mmdet.data.check.classes import class_source, metainfo_fix
from rfa_mmdet.data.check.coco_file import LARGEST_SIDE, Number, of_no_category, to_fix
from rfa_mmdet.data.check.find import Evaluator, Leaf
from rfa_mmdet.data.check.loaded import Loaded, kept
from rfa_mmdet.data.check.report import DataError, Findings, literal, some

_COORDINATE = Number(-LARGEST_SIDE, LARGEST_SIDE)
_RUN = Number(0, 2**31, whole=True)
_NO_POLYGON = "with polygons of fewer than 3 points, or with an odd number of coordinates"
_FIX_MASKS = (
    "it must be a list of polygons [x1, y1, x2, y2, x3, y3, ...], or a dict with 'size' and "
    "'counts'. Remove these annotations, or use no masks (a detector without a mask head, "
    "with_mask=False)"
)
# Compressed masks must be decoded to be checked, which is too slow for all of them.
_DECODED = 300


def check_coco(leaf: Leaf, dataset: CocoDataset, content: dict, found: Findings) -> Loaded:
    """Check the content of a COCO dataset's annotation file.

    Args:
        leaf (Leaf): The dataset's place in the config.
        dataset (CocoDataset): The dataset, built but not loaded.
        content (dict): Returned by :func:`~rfa_mmdet.data.check.coco_file.read_coco`.
        found (Findings): Collects errors and warnings.

    Raises:
        DataError: The problem prevents further checks of the dataset.
    """
    if "img" not in dataset.data_prefix:
        raise DataError(
            f"{leaf.key}.data_prefix={leaf.cfg.get('data_prefix')}: must have the key 'img', the "
            "folder of the images"
        )
    classes = tuple(dataset.metainfo["classes"])
    labels = _labels(leaf, dataset.ann_file, classes, content["categories"], found)
    found.errors += [f"{leaf.key}: {text}" for text in of_no_category(dataset.ann_file, content)]
    images, boxes = _boxes(leaf, dataset, content, found)
    folder = dataset.data_prefix["img"]
    return Loaded(
        labels,
        [os.path.join(folder, image["file_name"]) for image in images],
        boxes,
        [(int(image["width"]), int(image["height"])) for image in images],
        {image["id"] for image in images},
    )


def _labels(leaf: Leaf, path: str, classes: tuple, categories: list, found: Findings) -> tuple:
    names = tuple(category["name"] for category in categories)
    absent = [name for name in classes if name not in names]
    if absent:
        # Existing categories would shift to wrong labels.
        raise DataError(
            f"{leaf.key}: {len(absent)} of its {len(classes)} classes are not among the categories "
            f"of {path}: {some(map(literal, absent))}. The file's categories: "
            f"{some(map(literal, names), 80)}; the dataset's classes: "
            f"{some(map(literal, classes), 80)} ({class_source(leaf)}). "
            f"{metainfo_fix(leaf, names)}"
        )
    # MMDetection numbers the labels in file order, regardless of the order of the classes.
    labels = tuple(name for name in names if name in classes)
    if len(set(labels)) < len(labels):
        repeated = [name for name, count in Counter(labels).items() if count > 1]
        raise DataError(
            f"{path}: several categories have the same name ({some(map(literal, repeated))}); "
            "each would get its own label, more than the head has. Merge them"
        )
    if labels != classes:
        found.warnings.append(
            f"{leaf.key}: classes={some(map(literal, classes), 80)} are not in the order of the "
            f"categories of {path}; MMDetection numbers labels in file order, so pictures would "
            f"show wrong names. Use classes={labels!r}"
        )
    return labels


class _Columns:
    """The annotations of a file as arrays, for the images and classes of a dataset.

    Attributes:
        image (np.ndarray): Index in ``images`` of each annotation's image; -1 if there is none.
        wanted (np.ndarray): Whether the annotation has an image and one of the classes.
        crowd (np.ndarray): Whether it is a crowd region, which training ignores.
    """

    def __init__(self, content: dict, classes: Sequence[str]) -> None:
        annotations = content["annotations"]
        self.ids = {c["id"] for c in content["categories"] if c["name"] in classes}
        place = {image["id"]: i for i, image in enumerate(content["images"])}
        self.image = np.array([place.get(a["image_id"], -1) for a in annotations], dtype=int)
        of_class = np.array([a["category_id"] in self.ids for a in annotations], dtype=bool)
        self.wanted = of_class & (self.image >= 0)
        self.crowd = np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool)

    def dropped(self, content: dict) -> dict[str, np.ndarray]:
        """Return which of the wanted annotations MMDetection drops, by reason."""
        annotations = content["annotations"]
        flat = chain.from_iterable(a["bbox"] for a in annotations)
        x, y, w, h = np.fromiter(flat, float).reshape(-1, 4).T
        area = np.array([a["area"] for a in annotations], dtype=float)
        sizes = np.array([(i["width"], i["height"]) for i in content["images"]], dtype=float)
        width, height = sizes.reshape(-1, 2)[self.image].T if len(sizes) else (w, h)
        # As in CocoDataset.parse_data_info.
        over = (np.minimum(x + w, width) <= np.maximum(x, 0)) | (
            np.minimum(y + h, height) <= np.maximum(y, 0)
        )
        left = self.wanted & ~np.array([bool(a.get("ignore")) for a in annotations], dtype=bool)
        reasons = {
            "are inverted or empty (w <= 0 or h <= 0)": (w <= 0) | (h <= 0),
            "are narrower than 1 pixel": (w < 1) | (h < 1),
            "have an area of 0 or less": area <= 0,
            "are outside the image's width and height as given in the file": over,
        }
        found = {}
        for reason, where in reasons.items():
            found[reason] = left & where
            left &= ~where
        self.left = left
        return found


def _boxes(
    leaf: Leaf, dataset: CocoDataset, content: dict, found: Findings
) -> tuple[list[dict], int]:
    classes, path = dataset.metainfo["classes"], dataset.ann_file
    images, annotations = content["images"], content["annotations"]
    columns = _Columns(content, classes)
    then = "counted as missed in the evaluation" if dataset.test_mode else "ignored in training"
    dropped = {}
    for reason, where in columns.dropped(content).items():
        if count := int(where.sum()):
            names = (images[i]["file_name"] for i in np.unique(columns.image[where]))
            dropped[reason] = count
            found.warnings.append(
                f"{leaf.key}: {count} of {len(annotations)} boxes of {path} {reason}, and will be "
                f"{then}: {some(names)}"
            )
    if leaf.asks("with_mask"):
        masked = np.flatnonzero(columns.left)
        for reason, text in _masks(path, content, masked):
            if reason == _NO_POLYGON:
                found.warnings.append(
                    f"{leaf.key}: {text}. Training skips these polygons, and ignores annotations "
                    "without others"
                )
            else:
                found.errors.append(f"{leaf.key}: {text}, but the config needs masks; {_FIX_MASKS}")
        _check_polygons_only(leaf, path, annotations, masked[~columns.crowd[masked]], found)
    lost = np.flatnonzero(columns.image < 0)
    if len(lost):
        found.warnings.append(
            f"{leaf.key}: {len(lost)} annotations of {path} have an image_id without an image, and "
            f"are ignored: ids {some(literal(annotations[i]['id']) for i in lost)}"
        )
    used = {annotations[i]["category_id"] for i in np.flatnonzero(columns.wanted)}
    unused = [c["name"] for c in content["categories"] if c["id"] in columns.ids - used]
    if unused and used and not dataset.test_mode:
        found.warnings.append(
            f"{leaf.key}: classes {some(map(literal, unused))} have no box in {path}"
        )
    counts = Counter(image["file_name"] for image in images)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        found.warnings.append(
            f"{leaf.key}: {len(twice)} image files occur more than once in {path}, each time with "
            f"different boxes: {some(twice)}"
        )
    annotated = {images[i]["id"] for i in np.unique(columns.image[columns.wanted])}
    read = kept(
        dataset,
        images,
        lambda image: min(image["width"], image["height"]),
        lambda image: image["id"] in annotated,
    )
    if not read:
        raise DataError(
            f"{leaf.key}: no images left: filter_cfg={dataset.filter_cfg} and "
            f"indices={dataset._indices} remove all {len(images)} images of {path} "
            f"({len(annotations)} annotations, {len(annotated)} images with one of the classes)"
        )
    smallest = 0 if dataset.test_mode else (dataset.filter_cfg or {}).get("min_size", 0)
    small = [i["file_name"] for i in images if min(i["width"], i["height"]) < smallest]
    if small:
        found.warnings.append(
            f"{leaf.key}: {len(small)} of {len(images)} images are skipped, because they are "
            f"smaller than min_size={smallest} of filter_cfg: {some(small)}"
        )
    ids = {image["id"] for image in read}
    of_read = np.array([image["id"] in ids for image in images], dtype=bool)
    learnt = int((columns.left & ~columns.crowd & of_read[columns.image]).sum())
    return read, learnt


def _masks(path: str, content: dict, chosen: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the masks of the chosen annotations: the reason, and a sentence."""
    annotations = content["annotations"]
    size_of = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    wrong: dict[str, list[int]] = {}
    compressed = []
    for i in chosen:
        annotation = annotations[i]
        mask = annotation.get("segmentation")
        reason = _mask_problem(mask, size_of[annotation["image_id"]])
        if reason:
            wrong.setdefault(reason, []).append(i)
        elif isinstance(mask, dict) and isinstance(mask["counts"], str):
            compressed.append(i)
    for i in compressed[:: -(-len(compressed) // _DECODED) or 1]:
        try:
            pycocotools.mask.decode(annotations[i]["segmentation"])
        except ValueError:
            wrong.setdefault("with damaged 'counts'", []).append(i)
    for reason, indices in wrong.items():
        ids = some((literal(annotations[i]["id"]) for i in indices), 3)
        yield (
            reason,
            f"{path}: {len(indices)} of {len(annotations)} annotations have a 'segmentation' "
            f"{reason} (ids {ids})",
        )


def _mask_problem(mask: Any, size: tuple[int, int]) -> str | None:
    if mask is None or mask in ([], {}, ""):
        return "that is missing or empty"
    if isinstance(mask, list):
        if not all(isinstance(polygon, list) for polygon in mask):
            return f"such as {literal(mask)}"
        if _COORDINATE.wrong([*chain.from_iterable(mask)]):
            return f"with coordinates that are not numbers or above {LARGEST_SIDE:,}"
        no_polygon = any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask)
        return _NO_POLYGON if no_polygon else None
    if not isinstance(mask, dict) or "size" not in mask or "counts" not in mask:
        return f"such as {literal(mask)}"
    if mask["size"] != [size[1], size[0]]:
        return "whose 'size' is not the image's [height, width]"
    counts = mask["counts"]
    if isinstance(counts, list):
        if _RUN.wrong(counts) or sum(counts) != size[0] * size[1]:
            return "with 'counts' that do not add up to the image's number of pixels"
        return None
    return None if isinstance(counts, str) and counts else "with 'counts' of another type"


def _check_polygons_only(
    leaf: Leaf, path: str, annotations: list, chosen: np.ndarray, found: Findings
) -> None:
    polygons = any(
        name == "LoadAnnotations" and not transform.get("poly2mask", True)
        for name, transform in leaf.transforms()
    )
    bits = [i for i in chosen if isinstance(annotations[i].get("segmentation"), dict)]
    if polygons and bits:
        found.errors.append(
            f"{leaf.key}: {len(bits)} of {len(annotations)} annotations of {path} have a "
            "'segmentation' with 'counts', which LoadAnnotations with poly2mask=False ignores "
            f"(ids {some(literal(annotations[i]['id']) for i in bits)}); use poly2mask=True, which "
            "reads both kinds"
        )


def check_evaluator(
    metric: Evaluator, content: dict, loaded: Sequence[Loaded], found: Findings
) -> None:
    """Check that a CocoMetric's annotation file matches the datasets of its split.

    Args:
        metric (Evaluator): The metric and its annotation file.
        content (dict): Content of that file.
        loaded (Sequence[Loaded]): The split's datasets, at least one.
        found (Findings): Collects errors and warnings.
    """
    path, labels = metric.ann_file, loaded[0].labels
    categories = content["categories"]
    ids = [category["id"] for category in categories if category["name"] in labels]
    sort = "c['categories'].sort(key=lambda k: k['id'])"
    if metric.cfg.get("sort_categories"):
        categories = sorted(categories, key=lambda category: category["id"])
    names = tuple(category["name"] for category in categories if category["name"] in labels)
    say: Callable[[str], None] = lambda text: found.errors.append(f"{metric.key}: {text}")  # noqa: E731
    if names != labels:
        say(
            f"{path} has the classes {some(map(literal, names), 80)}, but the dataset has "
            f"{some(map(literal, labels), 80)}: detections would be compared with boxes of other "
            "classes. The order of 'categories' must be the same in all files"
        )
        return
    if metric.cfg.get("classwise") and ids != sorted(ids):
        say(
            f"classwise=True, but the 'categories' of {path} are not sorted by id, so MMDetection "
            "would print one class's AP under the name of another. Sort them in all annotation "
            f"files, including the training set's{to_fix(path, sort)}"
        )
    for text in of_no_category(path, content):
        if not any(text in error for error in found.errors):  # not already reported for the dataset
            say(text)
    columns = _Columns(content, labels)
    if not (columns.wanted & ~columns.crowd).any():
        say(
            f"none of the {len(content['annotations'])} annotations of {path} is a box of one of "
            f"the classes {some(map(literal, labels), 80)} in one of its images: AP would be -1"
        )
    if "segm" in metric.names:
        for _, text in _masks(path, content, np.flatnonzero(columns.wanted)):
            say(f"{text}, but the config needs masks; {_FIX_MASKS}")
    every = {image["id"] for image in content["images"]}
    read = set().union(*(one.ids for one in loaded))
    if not read <= every:
        say(
            f"{len(read - every)} of the {len(read)} images that the split reads are not in "
            f"{path} (ids {some(map(literal, read - every))}); the evaluation would fail"
        )
    elif read != every:
        found.warnings.append(
            f"{metric.key}: {len(every - read)} of the {len(every)} images of {path} are not in "
            "the split: their boxes count as missed"
        )
