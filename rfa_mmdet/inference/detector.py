"""A detector with its checkpoint, for images loaded by the config's pipeline."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import isclass
from typing import Any, cast

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose as Nested
from mmdet.registry import MODELS, VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, revert_sync_batchnorm
from mmengine.registry import FUNCTIONS, DefaultScope, init_default_scope
from mmengine.runner import autocast
from torch import nn

from rfa_mmdet.checkpoints.files import read_checkpoint
from rfa_mmdet.checkpoints.weights import load_weights
from rfa_mmdet.data.check.classes import heads
from rfa_mmdet.data.check.find import Leaf, leaves
from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.files import image_damage
from rfa_mmdet.inference.images import ImageError, transformed
from rfa_mmdet.inference.names import class_colours, class_names
from rfa_mmdet.inference.visualizer import LegibleVisualizer
from rfa_mmdet.texts import drawable, drawn_as_written, first_line


def check_device(device: str | None) -> None:
    """Raise an error if a device does not exist on this machine.

    Raises:
        UserError: The device is invalid or not available.

    Example:
        >>> check_device("cpu")
        >>> check_device("gpu")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: device='gpu': not a device; use e.g. cpu or cuda:0
    """
    try:
        wanted = torch.device(device or "cpu")
    except RuntimeError as error:
        raise UserError(f"device={device!r}: not a device; use e.g. cpu or cuda:0") from error
    count = torch.cuda.device_count()
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        raise UserError(
            f"device={device!r}: PyTorch finds {count} GPUs; "
            "run `python -m rfa_mmdet doctor` to see why"
        )


def build_detector(cfg: Config) -> nn.Module:
    """Build the detector of a config for a single process, with its initial weights.

    Args:
        cfg (Config): A detector's config; not modified.

    Returns:
        nn.Module: The detector, in eval mode on the CPU.
    """
    model = copy.deepcopy(cfg.model)
    if cfg.get("data_preprocessor") is not None:  # as a Runner does
        model.setdefault("data_preprocessor", copy.deepcopy(cfg.data_preprocessor))
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        return revert_sync_batchnorm(MODELS.build(model)).eval()


def load_detector(cfg: Config, checkpoint: str) -> nn.Module:
    """Build the detector of a config and load its checkpoint.

    Args:
        cfg (Config): A detector's config; not modified.
        checkpoint (str): Checkpoint file or URL.

    Returns:
        nn.Module: The detector, in eval mode on the CPU.

    Raises:
        UserError: The checkpoint is missing, damaged, or does not fit the model.
    """
    content = read_checkpoint(checkpoint)  # fail before the model is built
    detector = build_detector(cfg)
    load_weights(detector, content, checkpoint)
    return detector


def image_channels(detector: nn.Module) -> Iterator[int]:
    """Yield the numbers of image channels that a detector may take, the likeliest first.

    Configs do not contain the number. The first convolution shows it, unless pixels become channels
    before it or another module is registered first. Callers should try one number after another.

    Example:
        >>> next(image_channels(nn.Sequential(nn.ReLU(), nn.Conv2d(1, 8, 3))))
        1
        >>> next(image_channels(nn.Sequential(nn.Flatten(), nn.Linear(48, 8))))
        3
    """
    backbone = getattr(detector, "backbone", detector)
    first = next((m for m in backbone.modules() if hasattr(m, "in_channels")), None)
    yield from dict.fromkeys((getattr(first, "in_channels", 3), 3, 1, 4, 2, *range(5, 17)))


@dataclass(frozen=True)
class LoadedImage:
    """An image loaded by a config's test pipeline.

    Attributes:
        path (str): The file.
        pixels (np.ndarray): (H, W) or (H, W, C) of any dtype, as read by the pipeline's loader.
        data (dict): Output of the whole pipeline: ``inputs`` and ``data_samples``.
    """

    path: str
    pixels: np.ndarray
    data: dict[str, Any]

    @property
    def picture(self) -> np.ndarray:
        """The image for display: (H, W, 3) uint8, BGR.

        Values above 255, e.g. of 16-bit images, are stretched to that range after clipping the
        darkest and brightest thousandth; float images from 0 to 1 are scaled.

        Example:
            >>> grey = np.array([[0, 1000, 4000]], np.uint16)
            >>> LoadedImage("a.png", grey, {}).picture[..., 0]
            array([[  0,  63, 255]], dtype=uint8)
        """
        pixels = np.atleast_3d(self.pixels)
        colour = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., [0, 0, 0]]
        if colour.dtype != np.uint8:
            colour = np.nan_to_num(colour.astype(np.float32))
            most = colour.max(initial=0)
            if most > 255:
                low, high = np.percentile(colour, (0.1, 99.9))
                low = low if high > low else 0
                colour = (colour - low) * (255 / max(high - low, 1))
            elif self.pixels.dtype.kind == "f" and most <= 1:
                colour = colour * 255
        return np.ascontiguousarray(colour.clip(0, 255).astype(np.uint8))


class Detector:
    """A detector for image files, configured as in a test of its config.

    Args:
        cfg (Config): The detector's config.
        checkpoint (str): Checkpoint file or URL; must fit the model.
        device (str | None): Device to run on. Defaults to None: the GPU if there is one.

    Attributes:
        model (nn.Module): The model in eval mode; its ``dataset_meta`` has ``classes`` and
            ``palette``.

    Raises:
        UserError: The checkpoint is missing, damaged, or does not fit the model; the config has no
            test dataset, whose pipeline is needed; or the device does not exist.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None) -> None:
        check_device(device)
        found = leaves(cfg, "test")
        if not found:
            raise ConfigError("test_dataloader: missing; its pipeline is needed to load images")
        if cfg.model.get("language_model"):
            raise ConfigError(
                "model.language_model: detectors that read text, such as GLIP and Grounding DINO, "
                "are not supported; use MMDetection's DetInferencer"
            )
        init_default_scope(cfg.get("default_scope") or "mmdet")
        content = read_checkpoint(checkpoint)  # fail before the model is built
        self.model = cast(Any, build_detector(cfg))
        own = self.model.module if isinstance(self.model, BaseTTAModel) else self.model
        load_weights(own, content, checkpoint)
        self.model.dataset_meta = _metainfo(cfg, found[0], content, checkpoint)
        self.model.to(device or get_device())
        self._transforms = list(_flat(_pipeline(found)))
        self._collate = _collate(cfg.test_dataloader)
        self._half = bool((cfg.get("test_cfg") or {}).get("fp16"))
        given = cfg.get("visualizer") or dict(type="DetLocalVisualizer")
        kind = given["type"] if isclass(given["type"]) else VISUALIZERS.get(given["type"])
        if kind is DetLocalVisualizer:
            given = {**given, "type": LegibleVisualizer}
        # Its backends are only for logging.
        built = VISUALIZERS.build({**given, "name": f"visualizer {id(self)}", "vis_backends": None})
        self._visualizer = built if hasattr(built, "dataset_meta") else LegibleVisualizer()

    def load(self, path: str) -> LoadedImage:
        """Load an image with the test pipeline of the config.

        Args:
            path (str): The file.

        Returns:
            LoadedImage: Input for :meth:`detect`.

        Raises:
            ImageError: The file is missing, damaged, or not an image that the pipeline can load.
        """
        if damage := image_damage(path):
            raise ImageError(damage)
        # As a dataset describes an image without annotations.
        results: Any = dict(img_path=path, img_id=0, sample_idx=0, seg_map_path=None, instances=[])
        pixels = None
        for transform in self._transforms:
            try:
                results = transformed(transform, results)
            except ImageError:
                raise
            except Exception as error:  # decoders raise anything
                raise ImageError(_reason(transform, error, pixels is None)) from error
            if results is None:
                raise ImageError(f"dropped by {type(transform).__name__}")
            if pixels is None and "img" in results:
                pixels = results["img"].copy()
                height, width = results.get("ori_shape", pixels.shape[:2])
                results = {"height": height, "width": width, **results}
                if pixels.shape[:2] != (height, width):  # loaded and resized at once
                    pixels = cv2.resize(pixels, (width, height))
        if pixels is None:
            raise ImageError("the test pipeline loads no image: no transform returns 'img'")
        return LoadedImage(path, pixels, results)

    def batch(self, images: Sequence[LoadedImage]) -> dict[str, Any]:
        """Collate images for the model's ``test_step``."""
        return self._collate([image.data for image in images])

    @torch.no_grad()
    def detect(self, images: Sequence[LoadedImage]) -> list[DetDataSample]:
        """Run the detector on a batch of images.

        Args:
            images (Sequence[LoadedImage]): Images returned by :meth:`load`.

        Returns:
            list[DetDataSample]: Detections of each image, in its own pixel coordinates.
        """
        with autocast(enabled=self._half):
            return self.model.test_step(self.batch(images))

    def draw(self, image: np.ndarray, sample: DetDataSample, score: float) -> np.ndarray:
        """Return an image with its detections.

        Args:
            image (np.ndarray): (H, W, 3) uint8, BGR.
            sample (DetDataSample): Its detections.
            score (float): Lowest score to draw.

        Returns:
            np.ndarray: The drawn image, with the same shape, BGR.
        """
        rgb = np.ascontiguousarray(image[..., ::-1])
        options = dict(draw_gt=False, pred_score_thr=score)
        return draw(self._visualizer, rgb, sample, self.model.dataset_meta, **options)[..., ::-1]


def draw(
    visualizer: DetLocalVisualizer,
    image: np.ndarray,
    sample: DetDataSample,
    metainfo: dict[str, Any],
    **options: Any,
) -> np.ndarray:
    """Draw a sample with literal class names, and a colour for every class.

    Args:
        visualizer (DetLocalVisualizer): The visualizer.
        image (np.ndarray): (H, W, 3) uint8, RGB.
        sample (DetDataSample): Ground truth, detections, or both.
        metainfo (dict): ``classes`` and ``palette``, see :mod:`rfa_mmdet.inference.names`.
        **options: Options of the visualizer's ``add_datasample``.

    Returns:
        np.ndarray: (H, W, 3) uint8, RGB.
    """
    parts = [sample.get(key, {}) for key in ("gt_instances", "pred_instances")]
    labels = [int(label) for part in parts for label in part.get("labels", ())]
    names = [drawable(n) for n in class_names(metainfo, max(labels, default=-1) + 1)]
    palette = class_colours(metainfo, len(names))
    visualizer.dataset_meta = dict(classes=names, palette=palette)
    with warnings.catch_warnings(), drawn_as_written(names):
        warnings.filterwarnings("ignore", "Warning: The .* is out of bounds")
        visualizer.add_datasample("", image, sample, **options)
    return visualizer.get_image()


def _metainfo(cfg: Config, leaf: Leaf, checkpoint: dict, name: str) -> dict[str, Any]:
    """Return the classes that the checkpoint was trained on, and the config's colours."""
    meta = checkpoint.get("meta") or {}
    old = {"classes": meta["CLASSES"]} if "CLASSES" in meta else {}  # MMDetection 2.x
    theirs = {k.lower(): v for k, v in (meta.get("dataset_meta") or old).items()}
    ours = leaf.build().metainfo
    counts = dict(heads(cfg.model))
    fitting = (
        names
        for names in (class_names(theirs), class_names(ours))
        if names and all(len(names) == count for count in counts.values())
    )
    classes = next(fitting, class_names(theirs))
    if not classes and counts:
        key, count = next(iter(counts.items()))
        raise ConfigError(
            f"{key}.num_classes={count}, but checkpoint={name!r} has no class names and {leaf.key} "
            f"has {len(class_names(ours))}; set metainfo=dict(classes=(...)) in that dataset"
        )
    classes = classes or class_names(ours)
    palette = class_colours({**theirs, **ours}, len(classes))
    return dict(classes=classes, palette=palette)


def _pipeline(found: list[Leaf]) -> list:
    """Return the dataset's pipeline, followed by those of its wrappers."""
    pipelines = [[t for part in reversed(leaf.pipelines) for t in part] for leaf in found]
    if any(other != pipelines[0] for other in pipelines):
        raise ConfigError(
            f"{found[0].key}.pipeline: differs from the pipelines of the other test datasets, so "
            "it is unclear how to load an image; use a single dataset in test_dataloader"
        )
    return Compose(pipelines[0]).transforms


def _flat(transforms: Sequence) -> Iterator:
    for one in transforms:
        if isinstance(one, (Compose, Nested)):
            yield from _flat(one.transforms)
        else:
            yield one


def _collate(loader: dict) -> partial:
    """Build the collate function as a Runner does."""
    given = loader.get("collate_fn") or dict(type="pseudo_collate")
    if not isinstance(given, dict):
        return partial(given)
    rest = {key: value for key, value in given.items() if key != "type"}
    kind = given["type"]
    return partial(FUNCTIONS.get(kind) if isinstance(kind, str) else kind, **rest)


def _reason(transform: Any, error: Exception, loads: bool) -> str:
    text = first_line(error)
    if not loads:
        return f"{type(transform).__name__} fails: {text}"
    if isinstance(error, AssertionError):  # mmcv's, if the decoder returns None
        return f"not decodable by {getattr(transform, 'imdecode_backend', 'its loader')}"
    return f"not decodable: {text}"
