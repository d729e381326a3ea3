"""The graphs of a detector, and what each of them replaces in MMDetection's prediction."""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors import BaseDetector, SingleStageDetector
from torch import Tensor, nn

from rfa_mmdet.errors import UserError
from rfa_mmdet.inference.region_heads import RegionHead, region_heads

Run = Callable[[Tensor], list[Tensor]]

# Map sizes must match where a neck adds maps.
_DIVISOR = 32


class Part(nn.Module):
    """A part of a detector that becomes a graph: one input tensor, a flat tuple of output tensors.

    Subclasses implement ``forward`` and :meth:`stand_ins`.

    Args:
        suffix (str): Suffix of the file name, before '.onnx'.
        holds (str): Description, for the file's metadata.
        inputs (tuple[str, dict[int, str]]): Name of the input, and its dynamic axes.
        outputs (dict[str, dict[int, str]]): Names of the outputs in order -> their dynamic axes.
        example (Tensor): Input to trace the part with.
        other_shape (tuple[int, ...]): Input shape that differs in every dynamic axis.
        facts (dict[str, str] | None): More metadata that is needed to run the graph. Defaults to
            None.
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
        """Yield the replacements that make the detector use the graph.

        Args:
            run (Run): Function that runs the graph.

        Yields:
            tuple: A module, the name of its method, and the function to call instead.
        """
        raise NotImplementedError


class DensePart(Part):
    """Backbone, neck and a dense head.

    Args:
        detector (BaseDetector): The detector, in eval mode.
        head (str): Attribute name of the head.
        keep_maps (bool): Whether to also output the neck's maps, for other parts.
        images (Tensor): Batch to trace with.
        holds (str): See :class:`Part`.

    Raises:
        UserError: The head has no anchors or points, or does not return tensors per level.
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
        divisor = math.lcm(_DIVISOR, detector.data_preprocessor.pad_size_divisor)
        height, width = (-(-side // divisor) * divisor for side in images.shape[2:])
        super().__init__(
            *("", holds, ("images", {0: "batch", 2: "height", 3: "width"}), outputs, images),
            (2, images.shape[1], height + divisor, width + 2 * divisor),
            _preprocessing(detector.data_preprocessor),
        )
        self.detector: BaseDetector = detector
        self.head = head
        self.maps = len(maps) if keep_maps else 0
        self.levels = len(module.prior_generator.strides)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps, if they are outputs, and the outputs of the head."""
        maps = self.detector.extract_feat(images)
        outputs = _flat(getattr(self.detector, self.head)(maps))
        return (*maps, *outputs) if self.maps else outputs

    def stand_ins(self, run: Run) -> Iterator[tuple[nn.Module, str, Callable]]:
        """Run the graph for the maps, and keep the head's outputs until it is called."""
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
        head (RegionHead): The head of a detector in eval mode.
    """

    def __init__(self, head: RegionHead) -> None:
        cascade = head.stage is not None
        size = " x ".join(map(str, head.region))
        axes = {0: "regions"}
        super().__init__(
            {"box": ".roi", "mask": ".mask"}[head.kind] + (f"_{head.stage}" if cascade else ""),
            f"{head.kind} head{f' of stage {head.stage}' if cascade else ''}, for regions pooled "
            f"with RoIAlign to {size}",
            ("regions", axes),
            dict.fromkeys(head.outputs, axes),
            torch.randn(5, *head.region, generator=torch.Generator().manual_seed(0)),
            (8, *head.region),
        )
        self.head = head.module

    def forward(self, regions: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the head for pooled regions."""
        return _flat([self.head(regions)])

    def stand_ins(self, run: Run) -> Iterator[tuple[nn.Module, str, Callable]]:
        """Run the graph instead of the head."""

        def forward(regions: Tensor) -> Tensor | tuple[Tensor, ...]:
            found = run(regions)
            return tuple(found) if len(found) > 1 else found[0]

        yield self.head, "forward", forward


def parts(detector: BaseDetector, images: Tensor) -> list[Part]:
    """Return the parts of a detector that become graphs.

    Args:
        detector (BaseDetector): The detector, in eval mode.
        images (Tensor): A normalised, padded batch.

    Returns:
        list[Part]: The parts in execution order.

    Raises:
        UserError: The detector is neither a single-stage detector with dense outputs nor Faster,
            Mask or Cascade R-CNN.
    """
    if heads := region_heads(detector):
        holds = "backbone, neck and RPN head; the other graphs take regions of the maps"
        return [
            DensePart(detector, "rpn_head", True, images, holds),
            *(RegionPart(head) for head in heads),
        ]
    check_supported(detector)
    return [DensePart(detector, "bbox_head", False, images, "backbone, neck and head")]


def check_supported(detector: nn.Module) -> None:
    """Raise an error for unsupported detectors, before loading images.

    Raises:
        UserError: It is neither a single-stage detector nor Faster, Mask or Cascade R-CNN.
    """
    single = isinstance(detector, SingleStageDetector) and hasattr(detector, "bbox_head")
    if not single and not region_heads(detector):
        raise _unsupported(detector)


def _unsupported(detector: nn.Module) -> UserError:
    return UserError(
        f"model.type={type(detector).__name__!r}: not supported; can only export single-stage "
        "detectors with anchors or points, and Faster, Mask and Cascade R-CNN with an RPN and "
        "without a shared head"
    )


def _kinds(
    detector: BaseDetector, head: Any, maps: tuple[Tensor, ...]
) -> tuple[list[str], tuple[list[Tensor], ...]]:
    """Run a dense head; name its outputs like the arguments of ``predict_by_feat``."""
    outputs = head(maps)
    parameters = list(inspect.signature(head.predict_by_feat).parameters)
    # Many heads inherit a last argument, e.g. for centerness, without a matching output.
    kinds = parameters[: parameters.index("batch_img_metas")][: len(outputs)]
    levels = len(head.prior_generator.strides)
    # E.g. RTMDet-Ins also returns a map shared by all levels.
    dense = (not isinstance(one, Tensor) and len(_flat(one)) == levels for one in outputs)
    if len(kinds) != len(outputs) or not all(dense):
        raise _unsupported(detector)
    return kinds, outputs


def _flat(outputs: Iterable) -> tuple[Tensor, ...]:
    """Flatten nested lists and tuples of tensors."""
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
    """Return the values before their conversion to float32."""
    return [float(f"{value:.6g}") for value in tensor.flatten().tolist()]
