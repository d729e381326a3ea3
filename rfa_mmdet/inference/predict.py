"""Run a detector on image files and save the detections."""

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
from rfa_mmdet.files import check_folder, written_whole
from rfa_mmdet.inference.detector import Detector, LoadedImage
from rfa_mmdet.inference.images import ImageError, none_readable
from rfa_mmdet.inference.names import class_names
from rfa_mmdet.inference.picture_names import picture_names
from rfa_mmdet.texts import first_line


@dataclass
class Predictions:
    """Detections on images.

    Attributes:
        coco (dict): ``images``, ``categories`` and ``annotations`` in COCO format. Annotations have
            a ``score``, so pycocotools' ``loadRes`` accepts the list.
        skipped (dict[str, str]): Path of each image without results -> reason.
        undrawn (dict[str, str]): Path of each other image without a picture -> reason.
        not_finite (int): Number of detections dropped because their box or score is not finite.
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
    """Run a detector; write annotated pictures and ``predictions.json``.

    All files are written atomically; the JSON file after all images are done. An image that fails,
    for any reason, does not affect the others.

    Args:
        detector (Detector): The detector.
        paths (Sequence[str]): Image files.
        folder (str | os.PathLike): Output folder; pictures go to ``pictures``, with their path
            relative to the images' common folder.
        score (float): Lowest score to draw; the JSON file has all detections that the model's
            ``test_cfg`` keeps. Defaults to 0.3.
        batch_size (int): Batch size. Defaults to 1.
        progress (Callable): Wraps the iterable of paths, e.g. in a progress bar.

    Returns:
        Predictions: The detections, and what was skipped.

    Raises:
        UserError: No image has results, or the folder is not writable.
    """
    found = Predictions(dict(images=[], categories=[], annotations=[]))
    folder = Path(folder)
    check_folder(folder / "pictures", "folder")  # fail now rather than after hours
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
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
            except Exception as error:  # e.g. the picture is too large to draw on
                found.undrawn[image.path] = first_line(error)
    if not found.coco["images"]:
        raise none_readable(found.skipped)
    most = max((a["category_id"] for a in found.coco["annotations"]), default=0)
    classes = class_names(detector.model.dataset_meta, most)
    found.coco["categories"] = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    with written_whole(folder / "predictions.json") as part:
        part.write_text(json.dumps(found.coco, allow_nan=False), encoding="utf-8")
    return found


def _detections(
    detector: Detector, images: list[LoadedImage], skipped: dict[str, str]
) -> list[tuple[LoadedImage, DetDataSample]]:
    """Detect on a batch; if that fails, on each image alone, and skip those that fail."""
    try:
        samples = [sample.cpu() for sample in detector.detect(images)]
        if not {"bboxes", "masks"} & set(samples[0].get("pred_instances", {}).keys()):
            raise UserError("it predicts no boxes or masks")
        return list(zip(images, samples, strict=True))
    except Exception as error:  # a model may fail in any way on an unusual image
        if len(images) == 1:
            pixels = "x".join(map(str, images[0].pixels.shape))
            reason = f"the model fails on its pixels of shape {pixels}: {first_line(error)}"
            skipped[images[0].path] = reason
            return []
    return [pair for image in images for pair in _detections(detector, [image], skipped)]


def _write(picture: Any, path: Path) -> None:
    """Write a picture; OpenCV cannot open all file names itself."""
    done, data = cv2.imencode(path.suffix, picture)
    if not done:
        raise UserError(f"OpenCV cannot write {path.suffix}")
    with written_whole(path) as part:
        part.write_bytes(data.tobytes())


def _add(found: Predictions, image: LoadedImage, sample: DetDataSample) -> None:
    """Add an image and its detections to a dict in COCO format; drop non-finite detections."""
    coco = found.coco
    number = len(coco["images"]) + 1
    height, width = image.pixels.shape[:2]
    coco["images"].append(dict(id=number, file_name=image.path, width=width, height=height))
    instances = sample.pred_instances
    masks = instances.get("masks")
    if "bboxes" not in instances or (masks is not None and not instances.bboxes.any()):
        instances.bboxes = mask2bbox(masks)  # for models without boxes, e.g. SOLO
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
