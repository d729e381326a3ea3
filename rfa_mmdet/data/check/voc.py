"""Check datasets in Pascal VOC format: a list of image names, and an XML file for each."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from mmdet.datasets import XMLDataset

from rfa_mmdet.data.check.classes import class_source, metainfo_fix
from rfa_mmdet.data.check.find import Leaf
from rfa_mmdet.data.check.loaded import Loaded, kept
from rfa_mmdet.data.check.report import DataError, Findings, missing_path, some
from rfa_mmdet.data.voc import VocImage, describe_corrections, read_voc
from rfa_mmdet.data.voc_dataset import AnyImageXMLDataset, decoded_size, is_outside, with_size

FILTER = "dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1))"


def voc_images(dataset: XMLDataset) -> Iterator[tuple[str, VocImage | DataError]]:
    """Yield the name of each image that a dataset lists, once, with its annotation or the error.

    Raises:
        DataError: The list cannot be read.
    """
    folder = os.path.join(dataset.sub_data_root, dataset.ann_subdir)
    images = os.path.join(dataset.sub_data_root, dataset.img_subdir)
    for name in dict.fromkeys(_image_names(dataset)):
        xml = os.path.join(folder, f"{name}.xml")
        try:
            if isinstance(dataset, AnyImageXMLDataset):
                yield name, dataset.read(name)
            else:
                image = read_voc(xml, dataset.metainfo["classes"])
                yield name, replace(image, path=os.path.join(images, f"{name}.jpg"))
        except DataError as error:
            yield name, error
        except FileNotFoundError:
            yield name, DataError(missing_path(xml))
        except OSError as error:
            yield name, DataError(f"{xml} cannot be read: {error.strerror}")


def check_voc(leaf: Leaf, dataset: XMLDataset, found: Findings) -> Loaded:
    """Check the XML files of a VOC dataset. Its list of images must exist.

    Raises:
        DataError: The problem prevents further checks of the dataset.
    """
    classes = dataset.metainfo["classes"]
    images: dict[str, VocImage] = {}
    problems, corrected = [], defaultdict(list)
    twice = [name for name, count in Counter(_image_names(dataset)).items() if count > 1]
    if twice:
        found.warnings.append(
            f"{leaf.key}: {dataset.ann_file} lists {len(twice)} images more than once, and each "
            f"occurrence counts: {some(twice)}"
        )
    beside = os.path.join(os.path.dirname(dataset.ann_file), "test.txt")
    if leaf.key.startswith("test_") and os.path.isfile(beside) and dataset.ann_file != beside:
        found.warnings.append(
            f"{leaf.key} reads {dataset.ann_file}, although {beside} exists; with this package's "
            "templates, set TEST_SET=test to test on it"
        )
    for name, image in voc_images(dataset):
        if isinstance(image, DataError):
            problems.append(str(image))
            continue
        images[name] = image
        for what in image.corrected:
            corrected[what].append(name)
    if problems:
        raise DataError(
            f"{leaf.key}: {len(problems)} of the {len(images) + len(problems)} XML files listed in "
            f"{dataset.ann_file} cannot be read: {some(problems, 3)}"
        )
    if corrected:
        found.warnings.append(f"{leaf.key}: {describe_corrections(corrected)}")
    _check_names(leaf, dataset, images, found)
    sizes = {name: _size(image) for name, image in images.items()}
    names = kept(
        dataset,
        list(images),
        lambda name: min(sizes[name] or (float("inf"),)),
        lambda name: bool(images[name].boxes),
    )
    if not names:
        raise DataError(
            f"{leaf.key}: no images left: filter_cfg={dataset.filter_cfg} and "
            f"indices={dataset._indices} remove all {len(images)} images of {dataset.ann_file}. "
            "min_size applies to <size> in the XML files, which some tools write as 0"
        )
    without = [name for name in images.keys() - set(names) if min(sizes[name] or (1,)) < 1]
    if without:
        found.warnings.append(
            f"{leaf.key}: {len(without)} of {len(images)} images are skipped by "
            f"filter_cfg={dataset.filter_cfg}, because <size> is 0 in {some(sorted(without))}; "
            "type='AnyImageXMLDataset' reads the size from the image"
        )
    boxes = _check_boxes(leaf, dataset, {name: images[name] for name in names}, found)
    paths = [images[name].path for name in names]
    return Loaded(tuple(classes), paths, boxes, [sizes[name] for name in names])


def _image_names(dataset: XMLDataset) -> list[str]:
    if isinstance(dataset, AnyImageXMLDataset):
        return dataset.image_ids()
    path = dataset.ann_file
    folder = os.path.join(dataset.sub_data_root, dataset.ann_subdir)
    with open(path, encoding="utf-8") as file:
        lines = [line.rstrip("\r\n") for line in file]
    # MMDetection takes every line literally, including blanks and empty lines.
    for number, line in enumerate(lines, 1):
        if line.split() == [line] or os.path.exists(os.path.join(folder, f"{line}.xml")):
            continue
        if line.strip() and line.split()[1:]:
            right = f"Use one name per line; per-class lists ('{line}') have another format"
        else:
            right = "To remove blanks and empty lines:  "
            right += f"sed -i 's/[[:space:]]*$//; /^$/d' {path}"
        raise DataError(
            f"{path}: line {number} is {line!r}, for which MMDetection would read "
            f"{os.path.join(folder, f'{line}.xml')!r}. {right}"
        )
    return lines


def _size(image: VocImage) -> tuple[int, int] | None:
    """Return the width and height, or None if the image is missing, which is reported elsewhere."""
    try:
        return image.size or decoded_size(image.path)
    except FileNotFoundError:
        return None


def _check_names(leaf: Leaf, dataset: XMLDataset, images: dict, found: Findings) -> None:
    classes = dataset.metainfo["classes"]
    names = Counter(name for image in images.values() for name in image.names)
    counts = some((f"{name!r} ({count})" for name, count in names.most_common()), 30)
    if names and not names.keys() & set(classes):
        raise DataError(
            f"{leaf.key}: none of its classes occurs in the XML files of {dataset.ann_file}. "
            f"They contain {counts}; the dataset's classes: {some(map(repr, classes), 80)} "
            f"({class_source(leaf)}). {metainfo_fix(leaf, tuple(sorted(map(str, names))))}"
        )
    absent = [name for name in classes if name not in names]
    if absent:
        found.warnings.append(
            f"{leaf.key}: classes {some(map(repr, absent))} do not occur in the XML files of "
            f"{dataset.ann_file}, which contain {counts or 'no objects'}"
        )
    ignored = [f"{n!r} ({count})" for n, count in names.most_common() if n not in classes]
    if ignored:
        found.warnings.append(f"{leaf.key}: objects of other classes are ignored: {some(ignored)}")


def _check_boxes(leaf: Leaf, dataset: XMLDataset, images: dict, found: Findings) -> int:
    """Report boxes without any area in the image; return the number of boxes to learn from."""
    flat, outside, learnt, risky = [], [], 0, 0
    ours = isinstance(dataset, AnyImageXMLDataset)
    smallest = dataset.bbox_min_size
    for name, image in images.items():
        with suppress(FileNotFoundError):
            image = with_size(image)  # once for all boxes
        for box in image.boxes:
            # Difficult boxes and those below bbox_min_size do not enter the loss.
            ignored = box.difficult or (smallest is not None and min(box.sides) < smallest)
            empty = box.is_empty()
            if empty:
                flat.append(f"{name}.xml")
            elif is_outside(box, image):
                outside.append(f"{name}.xml")
                empty = True
            learnt += not (ignored or empty)
            risky += empty and not (ignored or ours)
    if not (flat or outside):
        return learnt
    wrong = [
        f"{len(files)} boxes {what}, in {some(dict.fromkeys(files))}"
        for files, what in (
            (flat, "are inverted or empty (xmax <= xmin or ymax <= ymin)"),
            (outside, "are outside their image"),
        )
        if files
    ]
    text = f"{leaf.key}: {'; '.join(wrong)}"
    if dataset.test_mode:
        found.warnings.append(f"{text}; the evaluation counts them as missed")
    elif not risky or _is_filtered(leaf, behind_resize=bool(outside)):
        found.warnings.append(f"{text}; they are ignored in training")
    else:
        # Box coders take the logarithm of the sides, which is NaN below zero and infinite at zero.
        found.errors.append(
            f"{text}. MMDetection's {type(dataset).__name__} keeps them, and the loss becomes NaN "
            "or infinite. Fix the XML files, use type='AnyImageXMLDataset', or add to the training "
            f"pipeline, after {'Resize' if outside else 'LoadAnnotations'}:  {FILTER}"
        )
    return learnt


def _is_filtered(leaf: Leaf, behind_resize: bool) -> bool:
    """Return whether the pipeline drops empty boxes, including those that Resize empties."""
    filtered = False
    for name, transform in leaf.transforms():
        if name == "FilterAnnotations" and transform.get("by_box", True):
            filtered = True
        elif "Resize" in name and behind_resize:
            filtered = False
    return filtered
