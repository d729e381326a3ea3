"""Compare ONNX Runtime with PyTorch: raw outputs, boxes, scores and masks."""

from dataclasses import dataclass, field

import numpy as np
import torch
from mmdet.structures import DetDataSample
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rfa_mmdet.errors import UserError
from rfa_mmdet.export.graph import Graph
from rfa_mmdet.texts import first_line

# Limits beyond which the graph is wrong: pixels, and relative.
BOX_LIMIT, SCORE_LIMIT = 0.5, 0.01
# NMS may keep a detection in one and suppress it in the other because of rounding.
UNMATCHED_LIMIT = 0.01
# Rounding flips a few pixels at the threshold on the outline of a mask. One pixel is a lot for a
# small mask, so the share is over all masks. It is reached by a mask of 100 x 100 pixels whose
# outline is off by a quarter of a pixel everywhere.
MASK_LIMIT = 0.01


@dataclass
class Comparison:
    """How far ONNX Runtime deviates from PyTorch.

    Attributes:
        images (int): Number of compared images.
        detections (int): Number of PyTorch's detections on them.
        unmatched (int): Number of detections that only one of the two has.
        box (float): Largest difference of a box coordinate, in pixels of the image.
        score (float): Largest difference of a score.
        masks (int): Number of compared pairs of masks.
        mask_pixels (float): Pixels in either mask of a pair, over all pairs.
        other_pixels (float): Pixels in only one mask of a pair, over all pairs.
        raw (dict[str, float]): Input shape -> largest difference of a graph's outputs, relative to
            their largest value. Shapes are the first image's and one that differs in batch size,
            height and width.
        skipped (dict[str, str]): Path of each unreadable image -> what is wrong with it.
    """

    images: int = 0
    detections: int = 0
    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0
    masks: int = 0
    mask_pixels: float = 0
    other_pixels: float = 0
    raw: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def mask(self) -> float:
        """Share of the masks' pixels that are in only one mask of a pair."""
        return self.other_pixels / max(self.mask_pixels, 1)

    @property
    def agrees(self) -> bool:
        """Whether the graph computes the same as the model."""
        return (
            self.box <= BOX_LIMIT
            and self.score <= SCORE_LIMIT
            and self.mask <= MASK_LIMIT
            and self.unmatched <= UNMATCHED_LIMIT * self.detections
            and self._worst_output <= SCORE_LIMIT
        )

    @property
    def _worst_output(self) -> float:
        return _largest(*self.raw.values())

    def __str__(self) -> str:
        text = f"boxes differ by up to {self.box:.3g} pixels, scores by {self.score:.3g}, "
        if self.masks:
            text += f"masks in {self.mask:.3g} of their pixels, "
        return (
            f"{text}{self.unmatched} of {self.detections} detections are not in both, and raw "
            f"outputs differ by up to {self._worst_output:.3g} of their largest value"
        )

    def add_raw(self, graph: Graph) -> None:
        """Compare a graph's outputs for the traced input shape and a different one.

        Raises:
            UserError: ONNX Runtime cannot run the graph, or its outputs have different shapes.
        """
        part = graph.part
        other = torch.randn(part.other_shape, generator=torch.Generator().manual_seed(1))
        for inputs in (part.example, other):
            name = f"{part.input_name} {' x '.join(map(str, inputs.shape))}"
            name += f" of {part.suffix}" if part.suffix else ""
            expected = part(inputs)
            try:
                outputs = graph.run(inputs)
            except Exception as error:  # onnxruntime's errors have no common class
                reason = first_line(error)
                raise UserError(f"ONNX Runtime cannot run the graph on {name}: {reason}") from error
            for ours, theirs in zip(outputs, expected, strict=True):
                if ours.shape != theirs.shape:
                    raise UserError(
                        f"ONNX Runtime returns shape {tuple(ours.shape)} on {name}, but PyTorch "
                        f"{tuple(theirs.shape)}: the graph contains a fixed size"
                    )
                scale = theirs.abs().max().clamp_min(1e-6)
                difference = ((ours - theirs).abs().max() / scale).item()
                self.raw[name] = _largest(self.raw.get(name, 0.0), difference)

    def add_image(self, theirs: DetDataSample, ours: DetDataSample) -> None:
        """Match the detections of PyTorch and ONNX Runtime, and record their differences."""
        theirs, ours = theirs.pred_instances, ours.pred_instances
        self.images += 1
        self.detections += len(theirs)
        pairs = match(theirs.bboxes, theirs.labels, ours.bboxes, ours.labels)
        self.unmatched += len(theirs) + len(ours) - 2 * len(pairs)
        if len(pairs):
            left, right = pairs.T
            box = (theirs.bboxes[left] - ours.bboxes[right]).abs().max().item()
            score = (theirs.scores[left] - ours.scores[right]).abs().max().item()
            self.box, self.score = _largest(self.box, box), _largest(self.score, score)
        if "masks" in theirs:
            for one, other in pairs.tolist():
                self._add_masks(theirs.masks[one], ours.masks[other])

    def _add_masks(self, theirs: Tensor, ours: Tensor) -> None:
        self.masks += 1
        # bool, or probabilities from 0 to 255 if test_cfg.rcnn.mask_thr_binary is negative.
        either = torch.maximum(theirs, ours).sum().item()
        self.mask_pixels += either
        self.other_pixels += either - torch.minimum(theirs, ours).sum().item()


def _largest(*values: float) -> float:
    """Return the maximum, or NaN if any value is NaN, unlike max()."""
    return float(np.max(values, initial=0))


def match(boxes: Tensor, labels: Tensor, other_boxes: Tensor, other_labels: Tensor) -> Tensor:
    """Match boxes with the same label by the distance of their corners.

    Args:
        boxes, other_boxes (Tensor): Corners in pixels, (N, 4) and (M, 4).
        labels, other_labels (Tensor): (N,) and (M,).

    Returns:
        Tensor: Indices into both, (P, 2). Boxes whose corners differ by more than a pixel plus a
        twentieth of the box are not matched.

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
