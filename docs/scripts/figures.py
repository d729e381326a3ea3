"""Draw the figures of docs/concepts, each for light and for dark pages.

    python docs/scripts/figures.py [FOLDER]

The numbers in them are those of benchmarks/results.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
BENCHMARK = ROOT / "benchmarks" / "results" / "cpu.json"
# Text, lines, soft fill, and two colours that everyone can distinguish.
THEMES = {
    "light": dict(ink="#24292f", line="#8c959f", soft="#eef1f5", one="#3b5bdb", two="#d9480f"),
    "dark": dict(ink="#e6e8ee", line="#8b93a7", soft="#2b3040", one="#8ea2ff", two="#ffa066"),
}


def blank(width: float, height: float, x: float, y: float) -> tuple[Figure, Axes]:
    """Return a figure with one axes without ticks, in data units, y downward."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, x), ylim=(y, 0), aspect="equal")
    axes.axis("off")
    return figure, axes


def grid(axes: Axes, x: float, y: float, values: np.ndarray, side: float, colour: str, line: str):
    """Draw a matrix as cells, the larger a value the stronger its colour."""
    for (row, column), value in np.ndenumerate(values):
        corner = (x + column * side, y + row * side)
        axes.add_patch(Rectangle(corner, side, side, fc=colour, alpha=value, lw=0))
        axes.add_patch(Rectangle(corner, side, side, fill=False, ec=line, lw=0.7))


def arrow(axes: Axes, start: tuple, end: tuple, colour: str) -> None:
    """Draw an arrow."""
    style = dict(arrowstyle="-|>", mutation_scale=9, shrinkA=0, shrinkB=0, lw=1.1, color=colour)
    axes.add_patch(FancyArrowPatch(start, end, **style))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return weights that sum to 1."""
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def windows(theme: dict) -> Figure:
    """Draw two windows that share cells, with one weight per cell, and one per window and cell."""
    ink, line, one, two = (theme[key] for key in ("ink", "line", "one", "two"))
    figure, axes = blank(8, 3.6, 16, 7.2)
    rng = np.random.default_rng(4)
    columns = (
        (0.5, "spatial attention", "one weight for each cell,\nthe same in every window"),
        (8.5, "receptive-field attention", "one weight for each cell of each window"),
    )
    shared = rng.uniform(0.08, 0.9, (3, 4))
    apart = [softmax(rng.normal(0, 0.8, (3, 3))) for _ in range(2)]
    for left, title, below in columns:
        axes.text(left + 3.5, 0.55, title, color=ink, ha="center", fontsize=12, weight="bold")
        for number, (offset, colour) in enumerate(((0, one), (1, two))):
            x = left + 4 * number
            if left < 8:
                values = shared[:, offset : offset + 3]
            else:
                values = 0.95 * apart[number] / apart[number].max()
            grid(axes, x, 1.7, values, 1, colour, line)
            axes.text(x + 1.5, 1.4, f"window {number + 1}", color=colour, ha="center", fontsize=10)
            # The cells that both windows have.
            corner = (x + (1 if number == 0 else 0), 1.7)
            axes.add_patch(Rectangle(corner, 2, 3, fill=False, ec=ink, lw=2))
        axes.text(left + 3.5, 5.5, below, color=ink, ha="center", va="center", fontsize=10)
    axes.text(8, 6.75, "outlined: the six cells that both windows see", color=ink, ha="center",
              fontsize=9, alpha=0.8)  # fmt: skip
    return figure


def data_flow(theme: dict) -> Figure:
    """Draw what RFAConv computes, with shapes."""
    ink, line, soft, one, two = (theme[key] for key in ("ink", "line", "soft", "one", "two"))
    figure, axes = blank(8, 3.5, 32, 14)

    def box(x: float, y: float, width: float, text: str, colour: str, height: float = 2.2) -> None:
        style = dict(boxstyle="round,pad=0.02,rounding_size=0.4", fc=soft, ec=colour, lw=1.4)
        axes.add_patch(FancyBboxPatch((x, y), width, height, **style))
        middle = (x + width / 2, y + height / 2)
        axes.text(*middle, text, color=ink, ha="center", va="center", fontsize=9)

    def shape(x: float, y: float, text: str) -> None:
        axes.text(x, y, text, color=ink, ha="center", fontsize=8, alpha=0.85, family="monospace")

    axes.text(5, 1.1, "attention", color=one, fontsize=11, weight="bold")
    box(5, 1.7, 4.6, "mean of\neach window", one)
    box(11.2, 1.7, 4.6, "1x1, one group\na channel", one)
    box(17.4, 1.7, 4.6, "softmax over\nthe window", one)
    axes.text(5, 12.6, "features", color=two, fontsize=11, weight="bold")
    box(5, 9.2, 4.6, "depthwise kxk,\nC to C·K", two)
    box(11.2, 9.2, 4.6, "batch norm", two)
    box(17.4, 9.2, 4.6, "ReLU", two)
    box(0.3, 5.6, 2.6, "x", line)
    box(22.6, 5.6, 2.4, "$\\times$", line)
    box(26.6, 5.6, 4.9, "kxk convolution,\nstride k", line)
    for y in (2.8, 10.3):
        arrow(axes, (3, 6.3 if y < 5 else 7.1), (4.9, y), line)
        arrow(axes, (9.7, y), (11.1, y), line)
        arrow(axes, (15.9, y), (17.3, y), line)
        arrow(axes, (22.1, y), (23.8, 5.5 if y < 5 else 7.9), line)
    arrow(axes, (25.1, 6.7), (26.5, 6.7), line)
    shape(1.7, 8.9, "C $\\times$ H $\\times$ W")
    shape(27, 4.9, "C $\\times$ K $\\times$ h $\\times$ w")
    shape(29, 8.9, "O $\\times$ h $\\times$ w")
    return figure


def kept_bytes(theme: dict) -> Figure:
    """Draw what the layers keep for the backward pass, measured."""
    ink, line = theme["ink"], theme["line"]
    figure = Figure(figsize=(8, 2.7), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, value) in enumerate(kept_ratios().items()):
        y = i + i // 2 * 0.6
        axes.barh(y, value, color=theme["two" if "formula" in label else "one"])
        axes.text(-0.4, y, label, ha="right", va="center", color=ink)
        axes.text(value + 0.3, y, f"{value:.2f}x", va="center", color=ink)
    axes.axvline(1, color=line, lw=1, ls="--")
    axes.text(1.2, -0.95, "plain convolution", color=ink, fontsize=9)
    axes.set(ylim=(6.8, -1.4), xlim=(-9, 33))
    axes.axis("off")
    return figure


def kept_ratios() -> dict[str, float]:
    """Return the bytes kept for the backward pass over a plain convolution's, by layer."""
    rows = json.loads(BENCHMARK.read_text(encoding="utf-8"))["results"]
    ratios = {}
    for op, own in (("RFAConv", "RFAConv[cpu]"), ("RFCBAMConv",) * 2, ("RFCAConv",) * 2):
        kept = [row["saved_bytes"] for row in rows if row["op"] == op]
        for label, name in (("kernels", own), ("formula", "formula")):
            ratios[f"{op}, {label}"] = geometric_mean(k[name] / k["plain"] for k in kept)
    return ratios


def kept_text() -> str:
    """Return the numbers of :func:`kept_bytes`, which its files hold as their description."""
    return "; ".join(f"{label}: {value:.2f}" for label, value in kept_ratios().items())


def warm_start(theme: dict) -> Figure:
    """Draw the nine depthwise kernels, the attention and the final weight of a warm start."""
    ink, line, one, two = (theme[key] for key in ("ink", "line", "one", "two"))
    figure, axes = blank(8, 2.9, 32, 11.6)
    for i in range(9):
        values = np.zeros((3, 3))
        values.flat[i] = 0.9
        x, y = 0.6 + (i % 3) * 3.2, 1.8 + (i // 3) * 2.9
        grid(axes, x, y, values, 0.8, one, line)
    grid(axes, 14, 3.5, np.full((3, 3), 0.35), 1.5, two, line)
    for row, column in np.ndindex(3, 3):
        middle = (14.75 + 1.5 * column, 4.25 + 1.5 * row)
        axes.text(*middle, "1/9", ha="center", va="center", color=ink, fontsize=9)
    rng = np.random.default_rng(1)
    grid(axes, 24.6, 3.5, rng.uniform(0.1, 0.9, (3, 3)), 1.5, one, line)
    for x, title in ((5.1, "features: the window itself"), (16.25, "attention"),
                     (26.85, "final weight")):  # fmt: skip
        axes.text(x, 1, title, ha="center", color=ink, fontsize=11, weight="bold")
    axes.text(26.85, 9.4, "9 $\\times$ the pretrained one", ha="center", color=ink, fontsize=10)
    axes.text(16.25, 9.4, "logits 0", ha="center", color=ink, fontsize=10)
    for x in (11.9, 21.8):
        axes.text(x, 5.75, "$\\times$", ha="center", va="center", color=ink, fontsize=18)
    return figure


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "windows": windows,
    "data_flow": data_flow,
    "kept_bytes": kept_bytes,
    "warm_start": warm_start,
}


def main(folder: Path) -> None:
    """Draw all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    # Letters as outlines, the same everywhere; no date and no random names in the file.
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rfa_mmdet"})
    for name, draw in FIGURES.items():
        for theme, colours in THEMES.items():
            path = folder / f"{name}-{theme}.svg"
            texts = {"Date": None, "Description": kept_text() if draw is kept_bytes else None}
            draw(colours).savefig(path, transparent=True, metadata=texts)
            print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
