"""Warm-start a retrofitted detector, verify that its outputs are unchanged, and save it."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import BaseDetector, DetectionTransformer
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from rfa_mmdet.checkpoints.files import read_checkpoint, writable, write_checkpoint
from rfa_mmdet.errors import UserError
from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.warm_start.plugin import Plugin
from rfa_mmdet.models.retrofit.new_layers import new_layers


class Equality(NamedTuple):
    """How far a retrofitted detector deviates from the plain one.

    Attributes:
        outputs (dict[str, float]): Part of the detector -> largest difference of its raw outputs,
            relative to their largest value, over all levels.
        changing (frozenset[str]): Names of new layers that may change the outputs: plug-ins that
            are not the identity, and convolutions of other packages.
    """

    outputs: dict[str, float]
    changing: frozenset[str]

    @property
    def largest(self) -> float:
        """The largest difference of all parts."""
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
    """Convert a plain detector's checkpoint into a warm-started one of the retrofitted detector.

    Args:
        plain_cfg (Config): Config of the plain detector.
        cfg (Config): Config of the retrofitted detector.
        source (str): Checkpoint of the plain detector, a file or URL.
        target (str | Path): File to write.
        image (Tensor | None): Image to compare on, (3, H, W), BGR in 0 to 255. Defaults to None:
            noise.
        tolerance (float): Largest accepted relative difference, without the plug-ins that are not
            the identity; not checked with convolutions of other packages. Defaults to 1e-3.
        overwrite (bool): Whether to replace an existing ``target``. Defaults to False.

    Returns:
        Equality: Comparison of both detectors on the image.

    Raises:
        UserError: A file cannot be read or written, the checkpoint does not fit the plain config,
            or the detectors differ. Nothing is written then.
    """
    target = writable(target, overwrite)
    checkpoint = read_checkpoint(source)
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{source}: contains no state dict")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        plain, net = (
            revert_sync_batchnorm(MODELS.build(copy.deepcopy(c.model))) for c in (plain_cfg, cfg)
        )
    _load_plain(plain, state, source)
    load_state_dict(net, state)
    image = _noise() if image is None else image
    found = rest = compare(plain, net, image)
    # Nothing is known about other packages' convolutions, which have the plain ones' places.
    foreign = found.changing & dict(plain.named_modules()).keys()
    if found.changing and not foreign:
        with _bypassed(net, found.changing):
            rest = compare(plain, net, image)
    if not foreign and not rest.largest <= tolerance:  # NaN is not
        raise UserError(
            f"the retrofitted detector's {_worst(rest)} differs from the plain one's by a "
            f"relative {rest.largest:.1e} > tolerance={tolerance:.1e}; nothing written. If a "
            "layer has inputs below 0, set its input_floor, see RFAConv"
        )
    meta = checkpoint.get("meta", {}) if "state_dict" in checkpoint else {}
    kept = {key: meta[key] for key in ("dataset_meta", "CLASSES") if key in meta}
    write_checkpoint(dict(meta=kept, state_dict=net.state_dict()), target)
    return found


@contextmanager
def _bypassed(net: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let some modules return their input."""
    handles = [
        net.get_submodule(name).register_forward_hook(lambda module, inputs, output: inputs[0])
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _largest(values: Iterable[float]) -> float:
    values = list(values)
    # max() would lose a NaN that is not the first.
    return next((v for v in values if v != v), max(values, default=0.0))


def _worst(found: Equality) -> str:
    parts, values = zip(*found.outputs.items(), strict=True)
    return parts[values.index(found.largest)]  # finds a NaN by identity


def _load_plain(plain: nn.Module, state: dict, source: str) -> None:
    missing = [
        key
        for key in plain.state_dict()
        if key not in state and not key.endswith("num_batches_tracked")
    ]
    if missing:
        raise UserError(
            f"{source}: not a checkpoint of the plain detector: {len(missing)} of its keys are "
            f"missing, e.g. {', '.join(missing[:3])}"
        )
    wrong = [
        f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in plain.state_dict().items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        raise UserError(
            f"{source}: not a checkpoint of the plain detector: {len(wrong)} of its keys have "
            f"different shapes, e.g. {wrong[0]}"
        )
    plain.load_state_dict(state, strict=False)


@torch.no_grad()
def compare(plain: BaseDetector, net: BaseDetector, image: Tensor) -> Equality:
    """Compare the raw outputs of two detectors, in eval mode.

    Args:
        plain, net (BaseDetector): Detectors with the same config except for this package's layers.
        image (Tensor): Image, (3, H, W), BGR in 0 to 255.

    Returns:
        Equality: Comparison of the feature maps, dense head, RPN head and RoI heads that exist.
        Both RoI heads get the proposals of the plain detector.
    """
    sample = DetDataSample(
        metainfo=dict(
            img_shape=tuple(image.shape[1:]),
            ori_shape=tuple(image.shape[1:]),
            scale_factor=(1.0, 1.0),
        )
    )
    # Sparse R-CNN's heads ask for them.
    none = torch.zeros(0)
    sample.gt_instances = InstanceData(bboxes=none.view(0, 4), labels=none.long())
    outputs, proposals = [], None
    for model in (plain.eval(), net.eval()):
        data = dict(inputs=[image], data_samples=[copy.deepcopy(sample)])
        data = model.data_preprocessor(data, training=False)
        maps = model.extract_feat(data["inputs"])
        found = {"maps": maps}
        if isinstance(model, DetectionTransformer):
            found["bbox_head"] = model(**data, mode="tensor")
        elif getattr(model, "rpn_head", None) is not None:
            if isinstance(model.rpn_head, BaseDenseHead):  # Sparse R-CNN's learns its proposals
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
    changing = frozenset(
        name
        for name, layer in new_layers(net)
        if not isinstance(layer, AttentionConv2d)
        and not (isinstance(layer, Plugin) and layer.is_identity())
    )
    return Equality(differences, changing)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12))


def _flat(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.numel() else []
    parts = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return [t for part in parts for t in _flat(part)] if isinstance(parts, (list, tuple)) else []


def _noise() -> Tensor:
    """Return a reproducible image with structure at many scales."""
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, 256, 320)
    for scale in (1, 4, 16, 64):
        coarse = torch.rand(1, 3, 256 // scale, 320 // scale, generator=generator)
        image += nn.functional.interpolate(coarse, size=image.shape[2:], mode="nearest")
    return image[0] * (255 / 4)
