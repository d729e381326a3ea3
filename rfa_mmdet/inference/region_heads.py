"""Find the heads of a two-stage detector that run on pooled regions."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import Tensor, nn

# Subclasses that override one of these use their heads differently.
_DETECTOR_METHODS = ("predict",)
_ROI_HEAD_METHODS = (
    *("predict", "predict_bbox", "predict_mask"),
    *("_bbox_forward", "_mask_forward", "_refine_roi"),
)


@dataclass(frozen=True)
class RegionHead:
    """A head that maps pooled regions to its raw outputs.

    Attributes:
        kind (str): 'box' or 'mask'.
        stage (int | None): Stage of a cascade, starting at 0; None if there is only one.
        module (nn.Module): The head.
        region (tuple[int, int, int]): Channels, height and width of a pooled region.
        outputs (tuple[str, ...]): Names of its outputs: a tuple of tensors, or a single tensor.
    """

    kind: str
    stage: int | None
    module: nn.Module
    region: tuple[int, int, int]
    outputs: tuple[str, ...]


def region_heads(detector: nn.Module) -> list[RegionHead]:
    """Return the heads that run between RoIAlign and the post-processing.

    Args:
        detector (nn.Module): The detector, in eval mode.

    Returns:
        list[RegionHead]: The heads in execution order. Empty if the detector has no RPN or a shared
        head, or does not predict like Faster, Mask and Cascade R-CNN.

    Example:
        >>> region_heads(nn.Identity())
        []
    """
    if not _predicts_as(detector, TwoStageDetector, _DETECTOR_METHODS) or not detector.with_rpn:
        return []
    head: Any = detector.roi_head
    bases = (StandardRoIHead, CascadeRoIHead)
    known = any(_predicts_as(head, base, _ROI_HEAD_METHODS) for base in bases)
    if not known or head.with_shared_head or not head.with_bbox:
        return []
    found = _stages("box", head.bbox_head, head.bbox_roi_extractor, ("cls_score", "bbox_pred"))
    if head.with_mask:
        found += _stages("mask", head.mask_head, head.mask_roi_extractor, ("mask_preds",))
    return found if all(map(_returns_its_outputs, found)) else []


def _predicts_as(module: nn.Module, base: type, methods: Iterable[str]) -> bool:
    return isinstance(module, base) and all(
        getattr(type(module), name, None) is getattr(base, name, None) for name in methods
    )


def _stages(
    kind: str, heads: nn.Module, extractors: nn.Module, outputs: tuple[str, ...]
) -> list[RegionHead]:
    def made(stage: int | None, head: nn.Module, extractor: Any) -> RegionHead:
        region = (extractor.out_channels, *extractor.roi_layers[0].output_size)
        return RegionHead(kind, stage, head, region, outputs)

    if isinstance(heads, nn.ModuleList) and isinstance(extractors, nn.ModuleList):
        pairs = zip(heads, extractors, strict=True)
        return [made(stage, *pair) for stage, pair in enumerate(pairs)]
    return [made(None, heads, extractors)]


@torch.no_grad()
def _returns_its_outputs(head: RegionHead) -> bool:
    """Return whether a head has plain outputs; e.g. SABL's returns tuples of tuples."""
    device = next(head.module.parameters()).device
    found = head.module(torch.zeros(1, *head.region, device=device))
    if isinstance(found, Tensor):
        return len(head.outputs) == 1
    return len(found) == len(head.outputs) > 1 and all(isinstance(x, Tensor) for x in found)
