"""Pictures of a run: curves, detections next to the ground truth, and attention."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.image import AxesImage
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.analysis.attention_maps import Heat, focus
from rfa_mmdet.inference.detector import draw
from rfa_mmdet.inference.visualizer import LegibleVisualizer
from rfa_mmdet.texts import drawable, drawn_as_written


def save_curves(scalars: Path, out: Path) -> None:
    """Plot the losses by iteration and the COCO APs by epoch.

    Args:
        scalars (Path): ``vis_data/scalars.json`` of a run, as MMEngine's LocalVisBackend writes it.
        out (Path): PNG to write.

    Raises:
        ValueError: The file holds no loss.
    """
    log = pd.read_json(scalars, lines=True)
    if "loss" not in log:
        raise ValueError(f"scalars={str(scalars)!r}: holds no 'loss'")
    train = log.dropna(subset=["loss"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in ("loss", *sorted(c for c in log if c.startswith("loss_"))):
        left.plot(train["step"], train[name], label=name, linewidth=2 if name == "loss" else 1.2)
    left.set(xlabel="iteration", ylabel="loss", title="Training loss", ylim=(0, None))
    left.legend(frameon=False)
    for column, label in (
        ("coco/bbox_mAP", "AP"),
        ("coco/bbox_mAP_50", "AP50"),
        ("coco/bbox_mAP_75", "AP75"),
    ):
        if column in log:
            values = log.dropna(subset=[column])
            right.plot(values["step"], values[column], marker="o", markersize=3, label=label)
    right.set(xlabel="epoch", ylabel="AP", title="Validation, COCO metrics", ylim=(0, 1))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def save_detections(
    images: Sequence[np.ndarray],
    samples: Sequence[DetDataSample],
    classes: Sequence[str],
    out: Path,
    score_threshold: float = 0.3,
) -> None:
    """Draw each image twice, a column each: the truth above, the detections below.

    Args:
        images (Sequence[np.ndarray]): (H, W, 3) uint8, RGB.
        samples (Sequence[DetDataSample]): With ``gt_instances`` and ``pred_instances`` in the
            images' pixels.
        classes (Sequence[str]): Class names.
        out (Path): PNG to write.
        score_threshold (float): Detections below are left out. Defaults to 0.3.
    """
    figure, axes = plt.subplots(
        2, len(images), figsize=(2.7 * len(images), 5.8), layout="constrained", squeeze=False
    )
    for column, (image, sample) in enumerate(zip(images, samples, strict=True)):
        rows = ((sample.gt_instances, None), (sample.pred_instances, score_threshold))
        for row, (instances, threshold) in enumerate(rows):
            # Enlarged to about the size of the axes, where names are legible.
            axes[row, column].imshow(draw_boxes(image, instances, classes, threshold, 2))
            axes[row, column].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("ground truth", fontsize=12)
    axes[1, 0].set_ylabel(f"detections, score > {score_threshold}", fontsize=12)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_boxes(
    image: np.ndarray,
    instances: InstanceData,
    classes: Sequence[str],
    score_threshold: float | None = None,
    scale: int = 1,
) -> np.ndarray:
    """Draw boxes with their classes over an image.

    Args:
        image (np.ndarray): (H, W, 3) uint8, RGB.
        instances (InstanceData): With ``bboxes`` and ``labels``, and ``scores`` of detections.
        classes (Sequence[str]): Class names.
        score_threshold (float | None): Detections below it are not drawn. Defaults to None, for
            ground truth.
        scale (int): Factor by which to enlarge the image, so that names are legible. Defaults to 1.

    Returns:
        np.ndarray: (H * scale, W * scale, 3) uint8, RGB.

    Example:
        >>> from torch import tensor
        >>> box = InstanceData(bboxes=tensor([[2.0, 2.0, 9.0, 9.0]]), labels=tensor([0]))
        >>> draw_boxes(np.zeros((12, 16, 3), np.uint8), box, ["cell"], scale=2).shape
        (24, 32, 3)
    """
    truth = score_threshold is None
    boxes = InstanceData(bboxes=instances.bboxes * scale, labels=instances.labels)
    sample = DetDataSample()
    if truth:
        sample.gt_instances = boxes
    else:
        boxes.scores = instances.scores
        sample.pred_instances = boxes
    return draw(
        LegibleVisualizer(),
        np.ascontiguousarray(image.repeat(scale, 0).repeat(scale, 1)),
        sample,
        dict(classes=classes),
        draw_gt=truth,
        draw_pred=not truth,
        pred_score_thr=score_threshold or 0.0,
    )


@drawn_as_written()
def save_attention(image: np.ndarray, maps: dict[str, Tensor], out: Path) -> None:
    """Show the attention of RFAConv layers over an image.

    The upper row shows where a layer's attention prefers some positions of the window (0: all have
    the same weight); the lower row shows the mean weight of each position over image and channels.

    Args:
        image (np.ndarray): (H, W, 3) uint8, RGB.
        maps (dict[str, Tensor]): Layer name to (1, C, K, h, w); K a square number.
        out (Path): PNG to write.
    """
    height, width = image.shape[:2]
    figure, axes = plt.subplots(
        2, len(maps) + 1, figsize=(2.9 * (len(maps) + 1), 5.3), layout="constrained"
    )
    axes[0, 0].imshow(image)
    axes[0, 0].set_title("image", fontsize=10)
    axes[1, 0].axis("off")
    axes[1, 0].text(
        0,
        0.5,
        "share of each position\nin the window,\nmean over the image\n\ngrey: all alike",
        va="center",
    )
    for column, (name, attention) in enumerate(maps.items(), start=1):
        strength = focus(attention)[None]  # (1, 1, h, w)
        over = F.interpolate(strength, (height, width), mode="bilinear")[0, 0]
        above, below = axes[:, column]
        heat = lay_over(above, image, over)
        above.set_title(f"{drawable(name)}\nfocus, 0 to {strength.max():.2f}", fontsize=10)
        figure.colorbar(heat, ax=above, fraction=0.046)
        side = round(attention.shape[2] ** 0.5)
        share = attention.mean((0, 1, 3, 4)).reshape(side, side).numpy()
        even = 1 / attention.shape[2]
        reach = max(abs(share - even).max(), 0.1 * even)
        below.imshow(share, cmap="coolwarm", vmin=even - reach, vmax=even + reach)
        for (row, col), value in np.ndenumerate(share):
            below.text(col, row, f"{value:.3f}", ha="center", va="center")
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
    figure.savefig(out, dpi=120)
    plt.close(figure)


@drawn_as_written()
def save_heats(
    image: np.ndarray, heats: Sequence[Heat], out: Path, seen: tuple[float, float] = (1, 1)
) -> None:
    """Lay the maps of layers over an image, each with its own scale.

    Args:
        image (np.ndarray): (H, W, 3) uint8, RGB.
        heats (Sequence[Heat]): Where the layers act.
        out (Path): PNG to write.
        seen (tuple[float, float]): Share of the maps' height and width that the image takes, from
            the top left; the rest is padding. Defaults to all.
    """
    height, width = image.shape[:2]
    columns = min(4, len(heats) + 1)
    rows = -(-(len(heats) + 1) // columns)
    side = 3.1
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(side * columns, rows * (side * 0.8 * min(1.6, height / width) + 0.6)),
        layout="constrained",
        squeeze=False,
    )
    axes.flat[0].imshow(image)
    axes.flat[0].set_title("image", fontsize=9)
    for one, heat in zip(list(axes.flat)[1:], heats, strict=False):
        over = over_image(heat.values, (height, width), seen)
        low, high = (0.0 if heat.meaning == "focus" else over.min().item()), over.max().item()
        # A constant map has no scale.
        reach = max(high - low, 1e-6)
        shown = lay_over(one, image, over, low, low + reach)
        meaning = f"{heat.kind}: {heat.meaning}, {low:.3g} to {high:.3g}"
        one.set_title(f"{drawable(heat.layer)}\n{meaning}", fontsize=9)
        figure.colorbar(shown, ax=one, fraction=0.046)
    for i, one in enumerate(axes.flat):
        one.set(xticks=[], yticks=[])
        one.set_visible(i <= len(heats))
    figure.savefig(out, dpi=120)
    plt.close(figure)


def lay_over(
    axes: plt.Axes, image: np.ndarray, over: Tensor, low: float = 0, high: float | None = None
) -> AxesImage:
    """Show values over an image, which is grey: colours below them would pass for values.

    Args:
        axes (Axes): Where to draw.
        image (np.ndarray): (H, W, 3) uint8, RGB.
        over (Tensor): (H, W).
        low (float): Value of the darkest colour. Defaults to 0.
        high (float | None): Value of the brightest colour. Defaults to None: the largest.

    Returns:
        AxesImage: The image, e.g. for a colour bar.

    Example:
        >>> import torch
        >>> image = np.zeros((6, 8, 3), np.uint8)
        >>> lay_over(plt.subplots()[1], image, torch.ones(6, 8)).get_clim()
        (0.0, 1.0)
    """
    grey = image @ np.array([0.299, 0.587, 0.114])
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    return axes.imshow(over, cmap="inferno", alpha=0.65, vmin=low, vmax=high)


def over_image(values: Tensor, size: tuple[int, int], seen: tuple[float, float]) -> Tensor:
    """Give every pixel of an image the value of a map's cell.

    Args:
        values (Tensor): (h, w), of the padded image.
        size (tuple[int, int]): Height and width of the image.
        seen (tuple[float, float]): See :func:`save_heats`.

    Returns:
        Tensor: (height, width) of float32.

    Example:
        >>> import torch
        >>> over_image(torch.ones(4, 4), (6, 8), (0.75, 1)).shape
        torch.Size([6, 8])
    """
    whole = tuple(round(side / share) for side, share in zip(size, seen, strict=True))
    over = F.interpolate(values[None, None].float(), whole, mode="bilinear")
    return over[0, 0, : size[0], : size[1]]


def save_side_by_side(pictures: dict[str, np.ndarray], out: Path) -> None:
    """Show pictures side by side.

    Args:
        pictures (dict[str, np.ndarray]): Title -> image, (H, W, 3) uint8, RGB.
        out (Path): PNG to write.
    """
    titles = [drawable(title) for title in pictures]
    height, width = next(iter(pictures.values())).shape[:2]
    with drawn_as_written(titles):
        figure, axes = plt.subplots(
            *(1, len(pictures)),
            figsize=(5 * len(pictures), 5 * height / width + 0.5),
            layout="constrained",
            squeeze=False,
        )
        for one, title, picture in zip(axes.flat, titles, pictures.values(), strict=True):
            one.imshow(picture)
            one.set_title(title, fontsize=11)
            one.set(xticks=[], yticks=[])
        figure.savefig(out, dpi=120)
    plt.close(figure)
