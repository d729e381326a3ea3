"""Detections on images that belong to no data set."""

import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import mmcv
import numpy as np
import torch
from mmdet.apis import DetInferencer
from mmdet.apis.det_inferencer import IMG_EXTENSIONS
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import Config

from rfa_mmdet.checkpoints.weights import load_weights, read_checkpoint
from rfa_mmdet.data.check.images import read_image
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole


def find_images(inputs: Sequence[str], without: str | os.PathLike | None = None) -> list[str]:
    """Return the image files that a command line names.

    Args:
        inputs (Sequence[str]): Files, folders (searched to any depth) and patterns such as
            'data/**/*.png'.
        without (str | os.PathLike | None): A folder whose files are left out: the results of an
            earlier run. Defaults to None.

    Returns:
        list[str]: Every file once, in the order of the inputs, those of a folder sorted.

    Raises:
        UserError: One of the inputs names no image.

    Example:
        >>> find_images(["/no/such/*.jpg"])
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: input '/no/such/*.jpg': no file matches
    """
    found = {}
    own = os.path.realpath(without) + os.sep if without else None
    for one in inputs:
        if os.path.isfile(one):
            files = [one]
        elif os.path.isdir(one):
            files = _images_below(one)
            if not files:
                raise UserError(
                    f"input {one!r}: no image in it; looked for *{', *'.join(_ENDINGS)}"
                )
        else:
            names = sorted(glob.glob(one, recursive=True))
            files = [n for n in names if os.path.isfile(n) and n.lower().endswith(_ENDINGS)]
            if not files:
                pattern = glob.has_magic(one)
                raise UserError(f"input {one!r}: no {'file matches' if pattern else 'such file'}")
        for file in files:
            real = os.path.realpath(file)
            if not (own and real.startswith(own)):
                found.setdefault(real, file)
    if not found:
        raise UserError(f"input {inputs[0]!r}: holds nothing but results of an earlier run")
    return list(found.values())


_ENDINGS = tuple(IMG_EXTENSIONS)


def _images_below(folder: str) -> list[str]:
    return sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(_ENDINGS) and not name.startswith(".")
    )


def check_device(device: str | None) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: It is no device, or none of this machine.

    Example:
        >>> check_device("cpu")
        >>> check_device("gpu")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: device='gpu': is no device; cpu or cuda:0 would be
    """
    try:
        wanted = torch.device(device or "cpu")
    except RuntimeError as error:
        raise UserError(f"device={device!r}: is no device; cpu or cuda:0 would be") from error
    count = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise UserError(
            f"device={device!r}: PyTorch sees {count} GPUs here; tools/doctor.py may say why"
        )


class Detector(DetInferencer):
    """MMDetection's inferencer, with a checkpoint that must be the model's own.

    Args:
        cfg (Config): Of the detector.
        checkpoint (str): File or URL.
        device (str | None): Defaults to None: a GPU where there is one.

    Raises:
        UserError: The checkpoint is missing, damaged, or of another model; or there is no such
            device.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None) -> None:
        check_device(device)
        read_checkpoint(checkpoint)  # before the model is built, for its errors
        self._checkpoint = checkpoint
        super().__init__(cfg, checkpoint, device=device, show_progress=False)

    def _load_weights_to_model(self, model, checkpoint, cfg) -> None:
        load_weights(model, checkpoint, self._checkpoint)
        meta = checkpoint.setdefault("meta", {})
        if "dataset_meta" not in meta and "CLASSES" not in meta:
            # Without names, MMDetection takes COCO's, whatever the number of classes.
            dataset = DATASETS.build({**cfg.test_dataloader.dataset, "lazy_init": True})
            meta["dataset_meta"] = dataset.metainfo
        super()._load_weights_to_model(model, checkpoint, cfg)

    def draw(self, image: np.ndarray, sample: DetDataSample, score: float) -> np.ndarray:
        """Return an image with its detections.

        Args:
            image (np.ndarray): (H, W, 3) uint8, BGR.
            sample (DetDataSample): Its detections.
            score (float): Those below are left out.

        Returns:
            np.ndarray: Of the same shape, BGR.
        """
        rgb = np.ascontiguousarray(image[..., ::-1])
        self.visualizer.add_datasample("", rgb, sample, draw_gt=False, pred_score_thr=score)
        return self.visualizer.get_image()[..., ::-1]


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

    def readable():
        for path in progress(paths):
            image, damage = read_image(path)
            if damage:
                found.skipped[path] = damage
            else:
                yield path, image

    rest = readable()
    while batch := list(islice(rest, batch_size)):
        images = [image for _, image in batch]
        answer = detector(images, batch_size=len(batch), return_datasamples=True)
        for (path, image), sample in zip(batch, answer["predictions"], strict=True):
            _add(found.coco, path, image, detector.pred2dict(sample))
            relative = os.path.relpath(os.path.abspath(path), common)
            with written_whole(folder / "pictures" / relative) as part:
                mmcv.imwrite(detector.draw(image, sample, score), str(part))
    if not found.coco["images"]:
        path, damage = next(iter(found.skipped.items()))
        raise UserError(f"none of the {len(paths)} images can be read, such as {path}: {damage}")
    with written_whole(folder / "predictions.json") as part:
        part.write_text(json.dumps(found.coco), encoding="utf-8")
    return found


def _add(coco: dict, path: str, image: np.ndarray, result: dict) -> None:
    """Put an image and its detections into a dict of COCO's format."""
    number = len(coco["images"]) + 1
    height, width = image.shape[:2]
    coco["images"].append(dict(id=number, file_name=path, width=width, height=height))
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
