"""Detections on images that belong to no data set."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
from mmdet.structures import DetDataSample
from mmdet.structures.mask import encode_mask_results, mask2bbox

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.inference.detector import Detector, LoadedImage
from rfa_mmdet.inference.images import ImageError, none_readable
from rfa_mmdet.inference.names import class_names
from rfa_mmdet.inference.picture_names import picture_names


@dataclass
class Predictions:
    """What was found on images.

    Attributes:
        coco (dict): ``images``, ``categories`` and ``annotations`` in COCO's format, each
            annotation with its ``score``: a list that pycocotools' ``loadRes`` takes.
        skipped (dict[str, str]): What is wrong with files that have no results, by path.
        undrawn (dict[str, str]): Why images with results have no picture, by path.
        not_finite (int): Detections left out because their box or score is no number.
    """

    coco: dict
    skipped: dict[str, str] = field(default_factory=dict)
    undrawn: dict[str, str] = field(default_factory=dict)
    not_finite: int = 0


def predict(
    detector: Detector,
    paths: Sequence[str],
    folder: str | os.PathLike,
    score: float = 0.3,
    batch_size: int = 1,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Predictions:
    """Detect, and write annotated pictures and ``predictions.json``.

    Every file appears when it is complete; the JSON file, when all images are done. An image that
    fails, in whatever way, loses no results of the others.

    Args:
        detector (Detector): Of a config and a checkpoint.
        paths (Sequence[str]): Image files.
        folder (str | os.PathLike): Where to write; pictures go below ``pictures``, by their path
            below the images' common folder.
        score (float): Detections below are not drawn; the JSON file has all that the model's
            ``test_cfg`` lets pass. Defaults to 0.3.
        batch_size (int): Images in one forward. Defaults to 1.
        progress (Callable): Given the paths, yields them as they are dealt with.

    Returns:
        Predictions: What was found and what was left out.

    Raises:
        UserError: No image has results, or nothing can be written.
    """
    found = Predictions(dict(images=[], categories=[], annotations=[]))
    folder = Path(folder)
    try:  # now, not after hours
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: cannot be written")
    names = picture_names(paths)

    def readable() -> Iterator[LoadedImage]:
        for path in progress(paths):
            try:
                yield detector.load(path)
            except ImageError as error:
                found.skipped[path] = str(error)

    rest = readable()
    while images := list(islice(rest, batch_size)):
        for image, sample in _detections(detector, images, found.skipped):
            _add(found, image, sample)
            try:
                drawn = detector.draw(image.picture, sample, score)
                _write(drawn, folder / "pictures" / names[image.path][0])
            except Exception as error:  # such as a picture that is too large to draw on
                found.undrawn[image.path] = first_line(error)
    if not found.coco["images"]:
        raise none_readable(found.skipped)
    most = max((a["category_id"] for a in found.coco["annotations"]), default=0)
    classes = class_names(detector.model.dataset_meta, most)
    found.coco["categories"] = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    with written_whole(folder / "predictions.json") as part:
        part.write_text(json.dumps(found.coco, allow_nan=False), encoding="utf-8")
    return found


def first_line(error: Exception) -> str:
    r"""Return what an error says, in one line.

    Example:
        >>> first_line(ValueError()), first_line(ValueError("one\ntwo"))
        ('ValueError', 'one')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _detections(
    detector: Detector, images: list[LoadedImage], skipped: dict[str, str]
) -> list[tuple[LoadedImage, DetDataSample]]:
    """Detect on a batch, or one by one where one of its images fails, which is skipped."""
    try:
        samples = [sample.cpu() for sample in detector.detect(images)]
        if not {"bboxes", "masks"} & set(samples[0].get("pred_instances", {}).keys()):
            raise UserError("it finds no boxes or masks, which is what is written")
        return list(zip(images, samples, strict=True))
    except Exception as error:  # a model may fail in any way on an image of another kind
        if len(images) == 1:
            pixels = "x".join(map(str, images[0].pixels.shape))
            skipped[images[0].path] = f"the model fails on its {pixels} values: {first_line(error)}"
            return []
    return [pair for image in images for pair in _detections(detector, [image], skipped)]


def _write(picture: Any, path: Path) -> None:
    """Write a picture; OpenCV itself cannot open every name."""
    done, data = cv2.imencode(path.suffix, picture)
    if not done:
        raise UserError(f"OpenCV cannot write {path.suffix}")
    with written_whole(path) as part:
        part.write_bytes(data.tobytes())


def _add(found: Predictions, image: LoadedImage, sample: DetDataSample) -> None:
    """Put an image and its detections into a dict of COCO's format, and drop those of NaN."""
    coco = found.coco
    number = len(coco["images"]) + 1
    height, width = image.pixels.shape[:2]
    coco["images"].append(dict(id=number, file_name=image.path, width=width, height=height))
    instances = sample.pred_instances
    masks = instances.get("masks")
    if "bboxes" not in instances or (masks is not None and not instances.bboxes.any()):
        instances.bboxes = mask2bbox(masks)  # of models without boxes, such as SOLO
    finite = instances.bboxes.isfinite().all(1) & instances.scores.isfinite()
    found.not_finite += int((~finite).sum())
    sample.pred_instances = instances = instances[finite]
    coded = [None] * len(instances)
    if masks is not None:
        coded = encode_mask_results(instances.masks.numpy())
    columns = (instances.labels, instances.scores, instances.bboxes)
    rows = zip(*(column.tolist() for column in columns), coded, strict=True)
    for label, score, (x1, y1, x2, y2), mask in rows:
        annotation = dict(
            id=len(coco["annotations"]) + 1,
            image_id=number,
            category_id=label + 1,
            bbox=[x1, y1, x2 - x1, y2 - y1],
            area=(x2 - x1) * (y2 - y1),
            iscrowd=0,
            score=score,
        )
        if mask is not None:
            annotation["segmentation"] = {**mask, "counts": mask["counts"].decode()}
        coco["annotations"].append(annotation)
