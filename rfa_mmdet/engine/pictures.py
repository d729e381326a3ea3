"""Pictures of a run: its curves, its detections beside the truth, its attention."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.engine.attention_maps import focus


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
    score_threshold: float = 0.4,
) -> None:
    """Draw each image twice, a column each: the truth above, the detections below.

    Args:
        images (Sequence[np.ndarray]): (H, W, 3) uint8, RGB.
        samples (Sequence[DetDataSample]): With ``gt_instances`` and ``pred_instances`` in the
            images' pixels.
        classes (Sequence[str]): Class names.
        out (Path): PNG to write.
        score_threshold (float): Detections below are left out. Defaults to 0.4.
    """
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(classes=tuple(classes), palette="random")
    figure, axes = plt.subplots(
        2, len(images), figsize=(2.6 * len(images), 5.6), layout="constrained", squeeze=False
    )
    for column, (image, sample) in enumerate(zip(images, samples, strict=True)):
        # Drawn at three times the size, so that names are legible on small images.
        image, sample = _enlarged(image, sample, 3)
        for row, truth in enumerate((True, False)):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning: The .* is out of bounds")
                visualizer.add_datasample(
                    "detections",
                    image,
                    sample,
                    draw_gt=truth,
                    draw_pred=not truth,
                    pred_score_thr=score_threshold,
                )
            axes[row, column].imshow(visualizer.get_image())
            axes[row, column].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("ground truth", fontsize=12)
    axes[1, 0].set_ylabel(f"detections, score > {score_threshold}", fontsize=12)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _enlarged(
    image: np.ndarray, sample: DetDataSample, factor: int
) -> tuple[np.ndarray, DetDataSample]:
    sample = deepcopy(sample)
    for instances in (sample.gt_instances, sample.pred_instances):
        instances.bboxes = instances.bboxes * factor
    return image.repeat(factor, 0).repeat(factor, 1), sample


def save_attention(image: np.ndarray, maps: dict[str, Tensor], out: Path) -> None:
    """Show the attention of RFAConv layers over an image.

    Above, where a layer's attention prefers some of the window's positions (0: it weighs all
    alike); below, how much it gives each position of the window, mean over image and channels.

    Args:
        image (np.ndarray): (H, W, 3) uint8, RGB.
        maps (dict[str, Tensor]): Layer name to (1, C, K, h, w); K a square number.
        out (Path): PNG to write.
    """
    height, width = image.shape[:2]
    figure, axes = plt.subplots(
        2, len(maps) + 1, figsize=(2.9 * (len(maps) + 1), 6), layout="constrained"
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
        above.imshow(image)
        heat = above.imshow(over, cmap="inferno", alpha=0.65, vmin=0)
        above.set_title(f"{name}\nfocus, 0 to {strength.max():.2f}", fontsize=10)
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
