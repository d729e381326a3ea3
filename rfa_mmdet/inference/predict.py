"""Detections on images that belong to no data set."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import mmcv

from rfa_mmdet.files import written_whole
from rfa_mmdet.inference.detector import Detector, LoadedImage
from rfa_mmdet.inference.images import ImageError, none_readable


@dataclass
class Predictions:
    """What was found on images.

    Attributes:
        coco (dict): ``images``, ``categories`` and ``annotations`` in COCO's format, each
            annotation with its ``score``: a list that pycocotools' ``loadRes`` takes.
        skipped (dict[str, str]): What is wrong with files that could not be read, by path.
    """

    coco: dict
    skipped: dict[str, str] = field(default_factory=dict)


def predict(
    detector: Detector,
    paths: Sequence[str],
    folder: str | os.PathLike,
    score: float = 0.3,
    batch_size: int = 1,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> Predictions:
    """Detect, and write annotated pictures and ``predictions.json``.

    Every file appears when it is complete; the JSON file, when all images are done.

    Args:
        detector (Detector): Of a config and a checkpoint.
        paths (Sequence[str]): Image files; those that cannot be read are skipped.
        folder (str | os.PathLike): Where to write; pictures go below ``pictures``, by their path
            below the images' common folder.
        score (float): Detections below are not drawn; the JSON file has all that the model's
            ``test_cfg`` lets pass. Defaults to 0.3.
        batch_size (int): Images in one forward. Defaults to 1.
        progress (Callable): Given the paths, yields them as they are dealt with.

    Returns:
        Predictions: What was found and what was skipped.

    Raises:
        UserError: No image can be read, or nothing can be written.
    """
    names = detector.model.dataset_meta["classes"]
    categories = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    found = Predictions(dict(images=[], categories=categories, annotations=[]))
    folder = Path(folder)
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])

    def readable() -> Iterator[LoadedImage]:
        for path in progress(paths):
            try:
                yield detector.load(path)
            except ImageError as error:
                found.skipped[path] = str(error)

    rest = readable()
    while images := list(islice(rest, batch_size)):
        for image, sample in zip(images, detector.detect(images), strict=True):
            _add(found.coco, image, detector.pred2dict(sample))
            relative = os.path.relpath(os.path.abspath(image.path), common)
            with written_whole(folder / "pictures" / relative) as part:
                mmcv.imwrite(detector.draw(image.picture, sample, score), str(part))
    if not found.coco["images"]:
        raise none_readable(found.skipped)
    with written_whole(folder / "predictions.json") as part:
        part.write_text(json.dumps(found.coco), encoding="utf-8")
    return found


def _add(coco: dict, image: LoadedImage, result: dict) -> None:
    """Put an image and its detections into a dict of COCO's format."""
    number = len(coco["images"]) + 1
    height, width = image.pixels.shape[:2]
    coco["images"].append(dict(id=number, file_name=image.path, width=width, height=height))
    masks = result.get("masks") or [None] * len(result["labels"])
    detections = zip(result["labels"], result["scores"], result["bboxes"], masks, strict=True)
    for label, score, (x1, y1, x2, y2), mask in detections:
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
            annotation["segmentation"] = mask
        coco["annotations"].append(annotation)
