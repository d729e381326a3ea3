"""Which graphs a detector needs, and what each takes the place of when MMDetection predicts."""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors import BaseDetector, SingleStageDetector
from torch import Tensor, nn

from rfa_mmdet.errors import UserError
from rfa_mmdet.inference.region_heads import RegionHead, region_heads

Run = Callable[[Tensor], list[Tensor]]

# Sizes of maps must fit where a neck adds them up.
_DIVISOR = 32


class Part(nn.Module):
    """A part of a detector that becomes a graph: one tensor in, a flat tuple of tensors out.

    Subclasses have ``forward`` and :meth:`stand_ins`.

    Args:
        suffix (str): Of the file's name, before '.onnx'.
        holds (str): What it is, for whoever finds the file.
        inputs (tuple[str, dict[int, str]]): Name of the input, and its dynamic axes.
        outputs (dict[str, dict[int, str]]): Those of the outputs, in their order.
        example (Tensor): An input to trace the part with.
        other_shape (tuple[int, ...]): Of an input that differs in every dynamic axis.
        facts (dict[str, str] | None): What else whoever runs the graph must know. Defaults to None.
    """

    def __init__(
        self,
        suffix: str,
        holds: str,
        inputs: tuple[str, dict[int, str]],
        outputs: dict[str, dict[int, str]],
        example: Tensor,
        other_shape: tuple[int, ...],
        facts: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.suffix, self.holds, self.facts = suffix, holds, facts or {}
        self.input_name, self.axes = inputs
        self.outputs = outputs
        self.example, self.other_shape = example, other_shape

    def stand_ins(self, run: Run) -> Iterator[tuple[nn.Module, str, Callable]]:
        """Yield what to replace so that the detector predicts by the graph.

        Args:
            run (Run): Runs the graph.

        Yields:
            tuple: A module, the name of its method, and what to call instead.
        """
        raise NotImplementedError


class DensePart(Part):
    """Backbone, neck and a dense head, from the images on.

    Args:
        detector (BaseDetector): In eval mode.
        head (str): The detector's attribute.
        keep_maps (bool): Whether the neck's maps are outputs too: others need them.
        images (Tensor): A batch to trace with.
        holds (str): See :class:`Part`.

    Raises:
        UserError: The head is none with anchors or points, or returns something else than tensors
            for each of its levels.
    """

    def __init__(
        self, detector: BaseDetector, head: str, keep_maps: bool, images: Tensor, holds: str
    ) -> None:
        module = getattr(detector, head)
        if not (hasattr(module, "prior_generator") and hasattr(module, "predict_by_feat")):
            raise _unsupported(detector)
        with torch.no_grad():
            maps = detector.extract_feat(images)
            found = {"map": maps} if keep_maps else {}
            for kind, levels in zip(*_kinds(detector, module, maps), strict=True):
                found[f"rpn_{kind}" if keep_maps else kind] = levels
        outputs = {
            f"{name}_{level}": {0: "batch", 2: f"height_{level}", 3: f"width_{level}"}
            for name, levels in found.items()
            for level in range(len(levels))
        }
        height, width = (-(-side // _DIVISOR) * _DIVISOR for side in images.shape[2:])
        super().__init__(
            *("", holds, ("images", {0: "batch", 2: "height", 3: "width"}), outputs, images),
            (2, images.shape[1], height + _DIVISOR, width + 2 * _DIVISOR),
            _preprocessing(detector.data_preprocessor),
        )
        self.detector: BaseDetector = detector
        self.head = head
        self.maps = len(maps) if keep_maps else 0
        self.levels = len(module.prior_generator.strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps, if they are outputs, and what the head makes of them."""
        maps = self.detector.extract_feat(images)
        outputs = _flat(getattr(self.detector, self.head)(maps))
        return (*maps, *outputs) if self.maps else outputs

    def stand_ins(self, run: Run) -> Iterator[tuple[nn.Module, str, Callable]]:
        """Have the graph run for the maps, and keep the head's outputs until it is called."""
        kept: list[Tensor] = []

        def extract_feat(images: Tensor) -> tuple[Tensor, ...]:
            kept[:] = run(images)
            return tuple(kept[: self.maps])

        def forward(_: tuple[Tensor, ...]) -> tuple[list[Tensor], ...]:
            starts = range(self.maps, len(kept), self.levels)
            return tuple(kept[start : start + self.levels] for start in starts)

        yield self.detector, "extract_feat", extract_feat
        yield getattr(self.detector, self.head), "forward", forward


class RegionPart(Part):
    """A head on pooled regions.

    Args:
        head (RegionHead): Of a detector in eval mode.
    """

    def __init__(self, head: RegionHead) -> None:
        cascade = head.stage is not None
        size = " x ".join(map(str, head.region))
        axes = {0: "regions"}
        super().__init__(
            {"box": ".roi", "mask": ".mask"}[head.kind] + (f"_{head.stage}" if cascade else ""),
            f"{head.kind} head{f' of stage {head.stage}' if cascade else ''}, on regions pooled by "
            f"RoIAlign to {size}",
            ("regions", axes),
            dict.fromkeys(head.outputs, axes),
            torch.randn(5, *head.region, generator=torch.Generator().manual_seed(0)),
            (8, *head.region),
        )
        self.head = head.module

    def forward(self, regions: Tensor) -> tuple[Tensor, ...]:
        """Return what the head makes of pooled regions."""
        return _flat([self.head(regions)])

    def stand_ins(self, run: Run) -> Iterator[tuple[nn.Module, str, Callable]]:
        """Have the graph run where the head is called."""

        def forward(regions: Tensor) -> Tensor | tuple[Tensor, ...]:
            found = run(regions)
            return tuple(found) if len(found) > 1 else found[0]

        yield self.head, "forward", forward


def parts(detector: BaseDetector, images: Tensor) -> list[Part]:
    """Return the graphs that a detector needs.

    Args:
        detector (BaseDetector): In eval mode.
        images (Tensor): A normalised, padded batch.

    Returns:
        list[Part]: In the order in which they run.

    Raises:
        UserError: Neither a single-stage detector with dense outputs nor Faster, Mask or Cascade
            R-CNN.
    """
    if heads := region_heads(detector):
        holds = "backbone, neck and RPN head; the other graphs see regions of the maps"
        return [
            DensePart(detector, "rpn_head", True, images, holds),
            *(RegionPart(head) for head in heads),
        ]
    check_supported(detector)
    return [DensePart(detector, "bbox_head", False, images, "backbone, neck and head")]


def check_supported(detector: nn.Module) -> None:
    """Refuse a detector of another kind, for which no image need be loaded.

    Raises:
        UserError: It is neither a single-stage detector nor Faster, Mask or Cascade R-CNN.
    """
    single = isinstance(detector, SingleStageDetector) and hasattr(detector, "bbox_head")
    if not single and not region_heads(detector):
        raise _unsupported(detector)


def _unsupported(detector: nn.Module) -> UserError:
    return UserError(
        f"model.type={type(detector).__name__!r}: only single-stage detectors with anchors or "
        "points, and Faster, Mask and Cascade R-CNN with an RPN and without a shared head, can be "
        "exported"
    )


def _kinds(
    detector: BaseDetector, head: Any, maps: tuple[Tensor, ...]
) -> tuple[list[str], tuple[list[Tensor], ...]]:
    """Run a dense head; name what it returns as its ``predict_by_feat`` does: cls_scores, ..."""
    outputs = head(maps)
    parameters = list(inspect.signature(head.predict_by_feat).parameters)
    # Many inherit an argument for centerness and the like, the last one, and return none.
    kinds = parameters[: parameters.index("batch_img_metas")][: len(outputs)]
    levels = len(head.prior_generator.strides)
    # RTMDet-Ins, for one, also returns a map that all levels share.
    dense = (not isinstance(one, Tensor) and len(_flat(one)) == levels for one in outputs)
    if len(kinds) != len(outputs) or not all(dense):
        raise _unsupported(detector)
    return kinds, outputs


def _flat(outputs: Iterable) -> tuple[Tensor, ...]:
    """Return all tensors of nested lists and tuples, in their order."""
    found: list[Tensor] = []
    for one in outputs:
        found += [one] if isinstance(one, Tensor) else _flat(one)
    return tuple(found)


def _preprocessing(preprocessor: DetDataPreprocessor) -> dict[str, str]:
    facts = {}
    for name in ("mean", "std"):
        value = getattr(preprocessor, name, None)
        facts[name] = json.dumps(None if value is None else _short(value))
    facts["channels"] = "RGB" if preprocessor._channel_conversion else "as read, BGR"
    facts["pad_size_divisor"] = str(preprocessor.pad_size_divisor)
    return facts


def _short(tensor: Tensor) -> list[float]:
    """Return values as they were before they became float32."""
    return [float(f"{value:.6g}") for value in tensor.flatten().tolist()]
