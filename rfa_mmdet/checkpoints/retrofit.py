"""Warm-start a retrofitted detector once, prove that it computes the same, and write the file."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from rfa_mmdet.checkpoints.files import read_checkpoint, writable, write_checkpoint
from rfa_mmdet.errors import UserError
from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.warm_start.plugin import Plugin
from rfa_mmdet.models.retrofit.new_layers import new_layers


class Equality(NamedTuple):
    """How far a retrofitted detector is from the plain one.

    Attributes:
        outputs (dict[str, float]): Part of the detector to the largest difference of its raw
            outputs, over their largest value, level by level.
        plugins (tuple[str, ...]): Names of plug-ins that are not the identity, and so change it.
    """

    outputs: dict[str, float]
    plugins: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest of all."""
        return _largest(self.outputs.values())


def retrofit_checkpoint(
    plain_cfg: Config,
    cfg: Config,
    source: str,
    target: str | Path,
    image: Tensor | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
) -> Equality:
    """Write a warm-started checkpoint of a retrofitted detector, from one of the plain detector.

    Args:
        plain_cfg (Config): Of the plain detector.
        cfg (Config): Of the retrofitted one.
        source (str): Checkpoint of the plain detector: file or URL.
        target (str | Path): File to write.
        image (Tensor | None): (3, H, W), BGR in 0 to 255, for the comparison. None: drawn noise.
        tolerance (float): Largest relative difference to accept, where no plug-in makes one.
        overwrite (bool): Whether ``target`` may exist.

    Returns:
        Equality: Of both detectors on the image.

    Raises:
        UserError: A file cannot be read or written, does not belong to the plain config, or the
            two detectors differ; then nothing is written.
    """
    target = writable(target, overwrite)
    checkpoint = read_checkpoint(source)
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{source}: holds no state dict")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        plain, net = (
            revert_sync_batchnorm(MODELS.build(copy.deepcopy(c.model))) for c in (plain_cfg, cfg)
        )
    _load_plain(plain, state, source)
    load_state_dict(net, state)
    found = compare(plain, net, _noise() if image is None else image)
    if not found.plugins and not found.largest <= tolerance:  # NaN is not
        raise UserError(
            f"the retrofitted detector differs from the plain one by {found.largest:.1e} > "
            f"tolerance={tolerance:.1e}, relative, in {_worst(found)}; nothing written. Inputs "
            "below 0 need input_floor, see RFAConv"
        )
    meta = checkpoint.get("meta", {}) if "state_dict" in checkpoint else {}
    kept = {key: meta[key] for key in ("dataset_meta", "CLASSES") if key in meta}
    write_checkpoint(dict(meta=kept, state_dict=net.state_dict()), target)
    return found


def _largest(values: Iterable[float]) -> float:
    values = list(values)
    # max() would lose a NaN that is not the first.
    return next((v for v in values if v != v), max(values, default=0.0))


def _worst(found: Equality) -> str:
    parts, values = zip(*found.outputs.items(), strict=True)
    return parts[values.index(found.largest)]  # which finds a NaN by identity


def _load_plain(plain: nn.Module, state: dict, source: str) -> None:
    missing = [
        key
        for key in plain.state_dict()
        if key not in state and not key.endswith("num_batches_tracked")
    ]
    if missing:
        raise UserError(
            f"{source}: is no checkpoint of the plain detector, as {len(missing)} of its keys are "
            f"missing, such as {', '.join(missing[:3])}"
        )
    wrong = [
        f"{key} has the shape {tuple(state[key].shape)} there, and {tuple(value.shape)} here"
        for key, value in plain.state_dict().items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise UserError(
            f"{source}: is no checkpoint of the plain detector, as {len(wrong)} of its keys have "
            f"other shapes, such as {wrong[0]}"
        )
    plain.load_state_dict(state, strict=False)


@torch.no_grad()
def compare(plain: BaseDetector, net: BaseDetector, image: Tensor) -> Equality:
    """Compare the raw outputs of two detectors, in eval mode.

    Args:
        plain, net (BaseDetector): Of one config but for this package's layers.
        image (Tensor): (3, H, W), BGR in 0 to 255.

    Returns:
        Equality: Of maps, dense head, proposals' head and RoI heads, as far as there are any; the
        RoI heads of both see the proposals of the plain one.
    """
    sample = DetDataSample(
        metainfo=dict(
            img_shape=tuple(image.shape[1:]),
            ori_shape=tuple(image.shape[1:]),
            scale_factor=(1.0, 1.0),
        )
    )
    outputs, proposals = [], None
    for model in (plain.eval(), net.eval()):
        data = dict(inputs=[image], data_samples=[copy.deepcopy(sample)])
        data = model.data_preprocessor(data, training=False)
        maps = model.extract_feat(data["inputs"])
        found = {"maps": maps}
        if getattr(model, "rpn_head", None) is not None:
            found["rpn_head"] = model.rpn_head(maps)
            if proposals is None:
                proposals = model.rpn_head.predict(maps, data["data_samples"], rescale=False)
            found["roi_head"] = model.roi_head.forward(
                maps, copy.deepcopy(proposals), data["data_samples"]
            )
        elif getattr(model, "bbox_head", None) is not None:
            found["bbox_head"] = model.bbox_head(maps)
        outputs.append(found)
    differences = {
        part: _largest(_relative(a, b) for a, b in zip(*map(_flat, pair), strict=True))
        for part, *pair in ((part, outputs[0][part], outputs[1][part]) for part in outputs[0])
    }
    changing = [
        name
        for name, layer in new_layers(net)
        if not isinstance(layer, AttentionConv2d)
        and not (isinstance(layer, Plugin) and layer.is_identity())
    ]
    return Equality(differences, tuple(changing))


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def _flat(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.numel() else []
    return (
        [t for part in outputs for t in _flat(part)] if isinstance(outputs, (list, tuple)) else []
    )


def _noise() -> Tensor:
    """Return an image with structure at many scales, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, 256, 320)
    for scale in (1, 4, 16, 64):
        coarse = torch.rand(1, 3, 256 // scale, 320 // scale, generator=generator)
        image += nn.functional.interpolate(coarse, size=image.shape[2:], mode="nearest")
    return image[0] * (255 / 4)
