"""Curves of all methods, and what each gains for what it costs."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.summary import Row

_COLOURS = plt.get_cmap("tab20").colors
COLOURS = (*_COLOURS[::2], *_COLOURS[1::2])  # the strong ones first


def colours(results: dict[str, Any]) -> dict[str, Any]:
    """Return a colour for each method, the same in every plot; the baseline is black.

    Args:
        results (dict): Of the comparison.
    """
    others = [m for m in results["methods"] if m != results["baseline"]]
    return {
        results["baseline"]: "black",
        **{m: COLOURS[i % len(COLOURS)] for i, m in enumerate(others)},
    }


def save_stage_curves(results: dict[str, Any], stage: str, out: Path) -> bool:
    """Plot losses and validations of finished runs: means over the seeds, and their range.

    Args:
        results (dict): Of the comparison.
        stage (str): Name.
        out (Path): PNG to write.

    Returns:
        bool: Whether there was anything to plot.
    """
    runs = [r for r in results["runs"] if r["stage"] == stage and r["state"] == "finished"]
    if not any(run["losses"] or run["curve"] for run in runs):
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for method, colour in colours(results).items():
        mine = [run for run in runs if run["method"] == method]
        style = dict(color=colour, zorder=3 if method == results["baseline"] else 2)
        _plot(left, [run["losses"] for run in mine], label=method, linewidth=1.3, **style)
        _plot(right, [run["curve"] for run in mine], marker="o", markersize=3, **style)
    left.set(xlabel="iteration", ylabel="loss", title="Training")
    right.set(xlabel="epoch", ylabel=results["metric"], title="Validation")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(left, right)
    figure.legend(frameon=False, loc="outside right center")
    _save(figure, out)
    return True


def _plot(axes: Axes, curves: list[list], **style: Any) -> None:
    values: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            if value is not None:
                values.setdefault(step, []).append(value)
    if not values:
        return
    steps = sorted(values)
    axes.plot(steps, [statistics.fmean(values[s]) for s in steps], **style)
    low, high = ([of(values[s]) for s in steps] for of in (min, max))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def save_gains(results: dict[str, Any], rows: Sequence[Row], out: Path) -> bool:
    """Plot the metric of a stage's methods over their time an image and their GFLOPs.

    Args:
        results (dict): Of the comparison.
        rows (Sequence[Row]): Of one stage.
        out (Path): PNG to write.

    Returns:
        bool: Whether there was anything to plot.
    """
    known = [row for row in rows if row.mean is not None and row.image_seconds is not None]
    if len(known) < 2:
        return False
    counted = all(row.flops is not None for row in known)
    costs = {"time an image, ms": [row.image_seconds * 1e3 for row in known]}
    if counted:
        costs["GFLOPs an image"] = [row.flops / 1e9 for row in known]
    figure, axes = plt.subplots(
        1, len(costs), figsize=(5.5 * len(costs), 4), layout="constrained", squeeze=False
    )
    for one, (title, cost) in zip(axes[0], costs.items(), strict=True):
        for row, x in zip(known, cost, strict=True):
            colour = colours(results)[row.method]
            label = row.method if one is axes[0, 0] else None
            one.errorbar(x, row.mean, row.deviation, fmt="o", color=colour, capsize=3, label=label)
            if row.is_baseline:
                one.axhline(row.mean, color="black", linewidth=0.8, linestyle=":")
        one.xaxis.set_major_locator(MaxNLocator(5))
        one.set(xlabel=title, ylabel=f"{results['metric']}, mean ± deviation")
    _tidy(*axes[0])
    figure.legend(frameon=False, loc="outside right center")
    _save(figure, out)
    return True


def _tidy(*axes: Axes) -> None:
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)


def _save(figure: plt.Figure, out: Path) -> None:
    with written_whole(out) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
