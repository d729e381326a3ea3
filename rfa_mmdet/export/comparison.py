"""How far ONNX Runtime is from PyTorch: in raw outputs, boxes, scores and masks."""

from dataclasses import dataclass, field

import numpy as np
import torch
from mmdet.structures import DetDataSample
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rfa_mmdet.errors import UserError
from rfa_mmdet.export.graph import Graph

# Beyond these, the graph does not compute what the model does: pixels, and a share of one.
BOX_LIMIT, SCORE_LIMIT = 0.5, 0.01
# Detections that differ by rounding can be kept here and suppressed there.
UNMATCHED_LIMIT = 0.01
# Rounding turns pixels over whose probability is at the threshold, a few on the outline of a mask:
# one is much of a small mask, so the share is of all masks together. A mask of 100 x 100 whose
# outline is a quarter of a pixel off all the way round has this share.
MASK_LIMIT = 0.01


@dataclass
class Comparison:
    """How far ONNX Runtime is from PyTorch.

    Attributes:
        images (int): Compared through the post-processing.
        detections (int): PyTorch's on them.
        unmatched (int): Detections of either that the other does not have.
        box (float): Largest difference of a corner, in pixels of the image.
        score (float): Largest difference of a score.
        masks (int): Pairs of masks that were compared.
        mask_pixels (float): Pixels in either mask of a pair, of all pairs.
        other_pixels (float): Those of them that are not in both.
        raw (dict[str, float]): Largest difference of a graph's outputs over their largest value,
            by the shape of its input: the first image's, and another batch, height and width.
        skipped (dict[str, str]): What is wrong with images that could not be read, by path.
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
        """Share of the masks' pixels that are in one of a pair only."""
        return self.other_pixels / max(self.mask_pixels, 1)

    @property
    def agrees(self) -> bool:
        """Whether the graph computes what the model does."""
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
            f"{text}{self.unmatched} of {self.detections} detections are not in both, outputs "
            f"differ by up to {self._worst_output:.3g} of their largest value"
        )

    def add_raw(self, graph: Graph) -> None:
        """Compare a graph's outputs, with the traced shape and with another one.

        Raises:
            UserError: ONNX Runtime cannot run the graph on one of them, or its outputs have
                another shape than PyTorch's.
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
                self.raw[name] = _largest(self.raw.get(name, 0.0), difference)

    def add_image(self, theirs: DetDataSample, ours: DetDataSample) -> None:
        """Pair the detections of PyTorch and ONNX Runtime, and note how they differ."""
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
        # Probabilities from 0 to 255 where test_cfg.rcnn.mask_thr_binary is negative, else bool.
        either = torch.maximum(theirs, ours).sum().item()
        self.mask_pixels += either
        self.other_pixels += either - torch.minimum(theirs, ours).sum().item()


def _largest(*values: float) -> float:
    """Return the largest, or NaN if it is among them, which max() overlooks."""
    return float(np.max(values, initial=0))


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
