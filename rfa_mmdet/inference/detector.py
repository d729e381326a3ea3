"""A detector with its checkpoint, on images loaded by the pipeline of its config."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.apis import DetInferencer
from mmdet.models.backbones.csp_darknet import Focus
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import nn

from rfa_mmdet.checkpoints.files import read_checkpoint
from rfa_mmdet.checkpoints.weights import load_weights
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import image_damage
from rfa_mmdet.inference.images import ImageError, transformed


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


def build_detector(cfg: Config) -> nn.Module:
    """Build the detector of a config for a single process, with its initial weights.

    Args:
        cfg (Config): Of a detector; stays as it is.

    Returns:
        nn.Module: In eval mode, on the CPU.
    """
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        return revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model))).eval()


def load_detector(cfg: Config, checkpoint: str) -> nn.Module:
    """Build the detector of a config and load its checkpoint.

    Args:
        cfg (Config): Of a detector; stays as it is.
        checkpoint (str): File or URL.

    Returns:
        nn.Module: In eval mode, on the CPU.

    Raises:
        UserError: The checkpoint is missing, damaged, or of another model.
    """
    content = read_checkpoint(checkpoint)  # before the model is built, for its errors
    detector = build_detector(cfg)
    load_weights(detector, content, checkpoint)
    return detector


def image_channels(detector: nn.Module) -> int:
    """Return the number of channels that a detector's first convolution expects of an image.

    Raises:
        UserError: The detector has no convolution.

    Example:
        >>> image_channels(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 8, 3)))
        1
    """
    for module in detector.modules():
        if isinstance(module, Focus):  # YOLOX stacks 2 x 2 pixels as channels first
            return module.conv.conv.in_channels // 4
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise UserError(f"{type(detector).__name__}: has no convolution")


@dataclass(frozen=True)
class LoadedImage:
    """An image loaded by a config's test pipeline.

    Attributes:
        path (str): The file.
        pixels (np.ndarray): (H, W) or (H, W, C) of any dtype, as the pipeline's loader reads it.
        data (dict): Output of the whole pipeline: ``inputs`` and ``data_samples``.
    """

    path: str
    pixels: np.ndarray
    data: dict[str, Any]

    @property
    def picture(self) -> np.ndarray:
        """The image for display: (H, W, 3) uint8, BGR.

        An image with values above 255, such as 16-bit ones, is scaled so that its largest is 255.

        Example:
            >>> grey = np.array([[0, 1000, 4000]], np.uint16)
            >>> LoadedImage("a.png", grey, {}).picture[..., 0]
            array([[  0,  63, 255]], dtype=uint8)
        """
        pixels = np.atleast_3d(self.pixels)
        colour = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., [0, 0, 0]]
        most = colour.max(initial=0)
        if most > 255:
            colour = colour * (255.0 / most)
        return np.ascontiguousarray(colour.clip(0, 255).astype(np.uint8))


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

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict, cfg: Config) -> None:
        load_weights(model, checkpoint, self._checkpoint)
        meta = checkpoint.setdefault("meta", {})
        if "dataset_meta" not in meta and "CLASSES" not in meta:
            # Without names, MMDetection takes COCO's, whatever the number of classes.
            dataset = DATASETS.build({**cfg.test_dataloader.dataset, "lazy_init": True})
            meta["dataset_meta"] = dataset.metainfo
        super()._load_weights_to_model(model, checkpoint, cfg)

    def load(self, path: str) -> LoadedImage:
        """Load an image with the test pipeline of the config.

        Args:
            path (str): The file.

        Returns:
            LoadedImage: To be given to :meth:`detect`.

        Raises:
            ImageError: The file is missing, damaged, cannot be decoded by the pipeline's loader, or
                is so narrow that resizing leaves nothing of it.
        """
        if damage := image_damage(path):
            raise ImageError(damage)
        load_file, *transforms = self.pipeline.transforms
        try:
            results = load_file(path)
        except AssertionError:  # mmcv's, if the decoder returns None
            results = None
        except Exception as error:  # decoders raise what they like
            raise ImageError(f"not decodable: {error}") from error
        if results is None:
            raise ImageError(f"not decodable by {load_file.from_file.imdecode_backend}")
        pixels = results["img"]
        for transform in transforms:
            results = transformed(transform, results)
        return LoadedImage(path, pixels, results)

    def batch(self, images: Sequence[LoadedImage]) -> dict[str, Any]:
        """Collate images for the model's ``test_step``."""
        return self.collate_fn([image.data for image in images])

    def detect(self, images: Sequence[LoadedImage]) -> list[DetDataSample]:
        """Run the detector on a batch of images.

        Args:
            images (Sequence[LoadedImage]): From :meth:`load`.

        Returns:
            list[DetDataSample]: Detections of each image, in its own pixel coordinates.
        """
        return self.forward(self.batch(images))

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
