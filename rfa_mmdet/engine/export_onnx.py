"""A detector's network as ONNX, compared with itself through MMDetection's post-processing.

Exported is what maps a normalised, padded batch to the raw outputs of the heads: backbone, neck and
head. A single-stage detector is one graph. Faster R-CNN is two, with RoIAlign between them left to
whoever runs them: the first ends in the neck's maps and the RPN head's outputs, the second is the
box head on pooled regions. Batch, height and width are dynamic.
"""

import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rfa_mmdet.engine.data_check.images import read_image
from rfa_mmdet.engine.errors import UserError
from rfa_mmdet.engine.files import written_whole
from rfa_mmdet.engine.predict import Detector

# Beyond these, the graph does not compute what the model does: pixels, and a share of one.
BOX_LIMIT, SCORE_LIMIT = 0.5, 0.01
# Detections that differ by rounding can be kept here and suppressed there.
UNMATCHED_LIMIT = 0.01
# Sizes of maps must fit where a neck adds them up.
_DIVISOR = 32


@dataclass(frozen=True)
class Part:
    """A module that becomes a graph.

    Attributes:
        suffix (str): Of the file's name, before '.onnx'.
        module (nn.Module): Takes one tensor, returns a flat tuple of tensors.
        input_name (str): What the graph calls the tensor.
        dynamic (dict[int, str]): Its dynamic axes.
        outputs (tuple[str, ...]): Names of the outputs.
        holds (str): What it is, for whoever finds the file.
    """

    suffix: str
    module: nn.Module
    input_name: str
    dynamic: dict[int, str]
    outputs: tuple[str, ...]
    holds: str


@dataclass
class Comparison:
    """How far ONNX Runtime is from PyTorch.

    Attributes:
        images (int): Compared through the post-processing.
        detections (int): PyTorch's on them.
        unmatched (int): Detections of either that the other does not have.
        box (float): Largest difference of a corner, in pixels of the image.
        score (float): Largest difference of a score.
        raw (dict[str, float]): Largest difference of a graph's outputs over their largest value,
            by the shape of its input: the first image's, and another batch, height and width.
        skipped (dict[str, str]): What is wrong with images that could not be read, by path.
    """

    images: int = 0
    detections: int = 0
    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0
    raw: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether the graph computes what the model does."""
        return (
            self.box <= BOX_LIMIT
            and self.score <= SCORE_LIMIT
            and self.unmatched <= UNMATCHED_LIMIT * self.detections
            and max(self.raw.values(), default=0) <= SCORE_LIMIT
        )


class _SingleStage(nn.Module):
    def __init__(self, detector: SingleStageDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.detector.bbox_head(self.detector.extract_feat(images)))


class _FirstStage(nn.Module):
    def __init__(self, detector: TwoStageDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.detector.extract_feat(images)
        return (*maps, *_flat(self.detector.rpn_head(maps)))


class _SecondStage(nn.Module):
    def __init__(self, detector: TwoStageDetector) -> None:
        super().__init__()
        self.head = detector.roi_head.bbox_head

    def forward(self, regions: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.head(regions))


def _flat(outputs: Iterable) -> tuple[Tensor, ...]:
    """Return all tensors of nested lists and tuples, in their order."""
    found: list[Tensor] = []
    for one in outputs:
        found += [one] if isinstance(one, Tensor) else _flat(one)
    return tuple(found)


def _names(head: nn.Module, levels: int) -> tuple[str, ...]:
    """Name the outputs of a dense head as its ``predict_by_feat`` does: cls_scores_0, ..."""
    parameters = list(inspect.signature(head.predict_by_feat).parameters)
    kinds = parameters[: parameters.index("batch_img_metas")]
    # Many inherit the argument for centerness and the like, and have none.
    if "score_factors" in kinds and not _has_score_factors(head):
        kinds.remove("score_factors")
    return tuple(f"{kind}_{level}" for kind in kinds for level in range(levels))


@torch.no_grad()
def _has_score_factors(head: nn.Module) -> bool:
    maps = [torch.zeros(1, head.in_channels, 8, 8) for _ in head.prior_generator.strides]
    return len(head(tuple(maps))) > 2


def parts(detector: nn.Module) -> list[Part]:
    """Return the graphs that a detector needs.

    Args:
        detector (nn.Module): In eval mode.

    Raises:
        UserError: Neither a single-stage detector with dense outputs nor Faster R-CNN.
    """
    axes = {0: "batch", 2: "height", 3: "width"}
    if isinstance(detector, TwoStageDetector) and _is_faster_rcnn(detector):
        levels = len(detector.rpn_head.prior_generator.strides)
        maps = tuple(f"map_{level}" for level in range(levels))
        rpn = tuple(f"rpn_{name}" for name in _names(detector.rpn_head, levels))
        return [
            Part(
                *("", _FirstStage(detector), "images", axes, (*maps, *rpn)),
                "backbone, neck and RPN head; RoIAlign on the maps follows, then the second graph",
            ),
            Part(
                *(".roi", _SecondStage(detector), "regions", {0: "regions"}),
                *(("cls_score", "bbox_pred"), "box head, on regions pooled by RoIAlign"),
            ),
        ]
    if isinstance(detector, SingleStageDetector) and hasattr(detector, "bbox_head"):
        head = detector.bbox_head
        if hasattr(head, "prior_generator") and hasattr(head, "predict_by_feat"):
            names = _names(head, len(head.prior_generator.strides))
            return [
                Part("", _SingleStage(detector), "images", axes, names, "backbone, neck and head")
            ]
    raise UserError(
        f"model.type={type(detector).__name__!r}: only single-stage detectors with anchors or "
        "points, and Faster R-CNN without masks, can be exported"
    )


def _is_faster_rcnn(detector: TwoStageDetector) -> bool:
    head = detector.roi_head
    one_stage = head.with_bbox and not isinstance(head.bbox_head, nn.ModuleList)
    return detector.with_rpn and one_stage and not head.with_mask and not head.with_shared_head


def export_onnx(
    detector: Detector,
    paths: Sequence[str],
    out: str | os.PathLike,
    opset: int = 17,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> tuple[list[tuple[Path, str]], Comparison]:
    """Export, compare on images, and only then give the files their names.

    Args:
        detector (Detector): Of a config and a checkpoint, on the CPU.
        paths (Sequence[str]): Images to compare on; those that cannot be read are left out.
        out (str | os.PathLike): Of the first graph, '.onnx'.
        opset (int): ONNX operator set. Defaults to 17.
        progress (Callable): Given the images, yields them as they are dealt with.

    Returns:
        tuple: (file, what it holds) of each graph, and the comparison.

    Raises:
        UserError: The detector cannot be exported, no image can be read, or ONNX Runtime computes
            something else than PyTorch; nothing is written then.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: the file's name must end in .onnx")
    _need("onnx", "onnxruntime")
    read = {path: read_image(path) for path in paths}
    images = [image for image, _ in read.values() if image is not None]
    skipped = {path: damage for path, (_, damage) in read.items() if damage}
    if not images:
        path, damage = next(iter(skipped.items()))
        raise UserError(f"none of the {len(paths)} images can be read, such as {path}: {damage}")
    model = detector.model
    needed = parts(model)
    batches = [_batch(detector, image) for image in images]
    files = []
    with ExitStack() as stack, torch.no_grad():
        sessions = []
        for part in needed:
            path = out.with_name(f"{out.stem}{part.suffix}.onnx")
            file = stack.enter_context(written_whole(path))
            example = _example(model, part, batches[0][0])
            _export(part, example, file, opset)
            _describe(file, part, detector)
            sessions.append(_session(file))
            files.append((path, part.holds))
        found = Comparison(images=len(images), skipped=skipped)
        for part, session in zip(needed, sessions, strict=True):
            _compare_raw(found, model, part, session, batches[0][0])
        for inputs, samples in progress(batches):
            with _through(model, needed, sessions):
                ours = model.predict(inputs, [sample.clone() for sample in samples])
            theirs = model.predict(inputs, [sample.clone() for sample in samples])
            _compare(found, theirs[0], ours[0])
        if not found.agrees:
            raise UserError(
                f"ONNX Runtime computes something else than PyTorch, so nothing was written: boxes "
                f"differ by up to {found.box:.3g} pixels, scores by {found.score:.3g}, "
                f"{found.unmatched} of {found.detections} detections are not in both, outputs "
                f"differ by up to {max(found.raw.values()):.3g} of their largest value"
            )
    return files, found


def _need(*modules: str) -> None:
    for name in modules:
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f"{name} cannot be imported: pip install {name}") from error


def _batch(detector: Detector, image: np.ndarray) -> tuple[Tensor, list[DetDataSample]]:
    """Return what the test pipeline and the preprocessor make of an image."""
    data = pseudo_collate([detector.pipeline(image)])
    data = detector.model.data_preprocessor(data, False)
    return data["inputs"], data["data_samples"]


def _example(model: nn.Module, part: Part, images: Tensor) -> Tensor:
    """Return an input of a graph: a batch of images, or regions of their maps."""
    if part.input_name == "images":
        return images
    extractor = model.roi_head.bbox_roi_extractor
    side = extractor.roi_layers[0].output_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, extractor.out_channels, *side, generator=generator)


def _export(part: Part, example: Tensor, file: Path, opset: int) -> None:
    # The other exporter needs onnxscript, and before PyTorch 2.5 there is no choice.
    known = inspect.signature(torch.onnx.export).parameters
    chosen = {"dynamo": False} if "dynamo" in known else {}
    with warnings.catch_warnings():
        # Of tracing: sizes that Python compares. Whether they matter, the comparison tells.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                part.module.eval(),
                (example,),
                str(file),
                input_names=[part.input_name],
                output_names=list(part.outputs),
                dynamic_axes={part.input_name: part.dynamic, **_output_axes(part)},
                opset_version=opset,
                **chosen,
            )
        except (RuntimeError, ValueError) as error:  # the exporter's own are among them
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"opset {opset}: PyTorch cannot export the model: {reason}") from error


def _output_axes(part: Part) -> dict[str, dict[int, str]]:
    if part.input_name == "regions":
        return {name: {0: "regions"} for name in part.outputs}
    return {
        name: {0: "batch", 2: f"height_{name[-1]}", 3: f"width_{name[-1]}"} for name in part.outputs
    }


def _describe(file: Path, part: Part, detector: Detector) -> None:
    """Write into the file what whoever runs it must know, and check it."""
    import onnx

    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    preprocessor = detector.model.data_preprocessor
    facts = dict(holds=part.holds, classes=json.dumps(detector.model.dataset_meta["classes"]))
    if part.input_name == "images":
        for name in ("mean", "std"):
            value = getattr(preprocessor, name, None)
            facts[name] = json.dumps(None if value is None else _short(value))
        facts["channels"] = "RGB" if preprocessor._channel_conversion else "as read, BGR"
        facts["pad_size_divisor"] = str(preprocessor.pad_size_divisor)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, str(file))


def _short(tensor: Tensor) -> list[float]:
    """Return values as they were before they became float32."""
    return [float(f"{value:.6g}") for value in tensor.flatten().tolist()]


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Tensor) -> list[Tensor]:
    feed = {session.get_inputs()[0].name: inputs.numpy()}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _compare_raw(
    found: Comparison, model: nn.Module, part: Part, session: Any, images: Tensor
) -> None:
    """Compare a graph's outputs, with the traced shape and with another one."""
    traced = _example(model, part, images)
    if part.input_name == "images":
        height, width = (-(-side // _DIVISOR) * _DIVISOR for side in images.shape[2:])
        shape = (2, 3, height + _DIVISOR, width + 2 * _DIVISOR)
    else:
        shape = (8, *traced.shape[1:])
    other = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for inputs in (traced, other):
        name = f"{part.input_name} {' x '.join(map(str, inputs.shape))}"
        expected = part.module(inputs)
        try:
            outputs = _run(session, inputs)
        except Exception as error:  # onnxruntime's errors have no common class
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"ONNX Runtime cannot run the graph on {name}: {reason}") from error
        for ours, theirs in zip(outputs, expected, strict=True):
            if ours.shape != theirs.shape:
                raise UserError(
                    f"ONNX Runtime gives {tuple(ours.shape)} on {name}, PyTorch "
                    f"{tuple(theirs.shape)}: the graph holds a fixed size"
                )
            scale = theirs.abs().max().clamp_min(1e-6)
            difference = ((ours - theirs).abs().max() / scale).item()
            found.raw[name] = max(found.raw.get(name, 0.0), difference)


@contextmanager
def _through(model: nn.Module, needed: list[Part], sessions: list) -> Iterator[None]:
    """Have the model's network run by ONNX Runtime; all else stays MMDetection's."""
    replaced: list[tuple[nn.Module, str]] = []

    def replace(module: nn.Module, name: str, function: Callable) -> None:
        setattr(module, name, function)
        replaced.append((module, name))

    try:
        if len(needed) == 1:
            strides = len(model.bbox_head.prior_generator.strides)
            replace(model, "extract_feat", lambda images: _run(sessions[0], images))
            replace(model.bbox_head, "forward", lambda outputs: _levels(outputs, strides))
        else:
            strides = len(model.rpn_head.prior_generator.strides)
            kept: list[Tensor] = []

            def extract_feat(images: Tensor) -> tuple[Tensor, ...]:
                kept[:] = _run(sessions[0], images)
                return tuple(kept[:strides])

            replace(model, "extract_feat", extract_feat)
            replace(model.rpn_head, "forward", lambda _: _levels(kept[strides:], strides))
            replace(model.roi_head.bbox_head, "forward", lambda x: tuple(_run(sessions[1], x)))
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)  # the class has its own


def _levels(tensors: list[Tensor], strides: int) -> tuple[list[Tensor], ...]:
    """Put tensors back into a list for each kind of output."""
    return tuple(tensors[i : i + strides] for i in range(0, len(tensors), strides))


def _compare(found: Comparison, theirs: DetDataSample, ours: DetDataSample) -> None:
    """Pair the detections of both, and note the largest differences."""
    theirs, ours = theirs.pred_instances, ours.pred_instances
    found.detections += len(theirs)
    pairs = match(theirs.bboxes, theirs.labels, ours.bboxes, ours.labels)
    found.unmatched += len(theirs) + len(ours) - 2 * len(pairs)
    if len(pairs):
        left, right = pairs.T
        box = (theirs.bboxes[left] - ours.bboxes[right]).abs().max().item()
        score = (theirs.scores[left] - ours.scores[right]).abs().max().item()
        found.box, found.score = max(found.box, box), max(found.score, score)


def match(boxes: Tensor, labels: Tensor, other_boxes: Tensor, other_labels: Tensor) -> Tensor:
    """Pair boxes of the same label so that their corners are as near as can be.

    Args:
        boxes, other_boxes (Tensor): (N, 4) and (M, 4), corners in pixels.
        labels, other_labels (Tensor): (N,) and (M,).

    Returns:
        Tensor: (P, 2), indices into both. Corners that are more than a pixel and a twentieth of the
        box apart make no pair.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 30, 30]])
        >>> match(boxes, torch.tensor([1, 2]), boxes.flip(0), torch.tensor([2, 1])).tolist()
        [[0, 1], [1, 0]]
    """
    far = 1e6
    distance = (boxes[:, None] - other_boxes[None]).abs().amax(2).nan_to_num(far, far)
    distance[labels[:, None] != other_labels[None]] = far
    rows, columns = linear_sum_assignment(distance.clamp(max=far).numpy())
    near = 1 + 0.05 * (boxes[:, 2:] - boxes[:, :2]).amax(1)[rows]
    pairs = torch.as_tensor(np.stack([rows, columns], 1))
    return pairs[distance[rows, columns] <= near]
