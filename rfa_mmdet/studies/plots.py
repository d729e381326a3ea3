"""Plot all methods: their curves, differences from the baseline, and gains over their costs."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # works without a display

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from rfa_mmdet.files import written_whole
from rfa_mmdet.texts import drawable, drawn_as_written

_TAB20 = plt.get_cmap("tab20")
_COLOURS = [_TAB20(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]  # strong colours first


@drawn_as_written()
def save_stage_curves(results: dict[str, Any], stage: str, out: Path) -> bool:
    """Plot losses and validation metrics of a stage's finished runs: mean and range over seeds.

    Returns:
        bool: Whether there was anything to plot.
    """
    runs = [r for r in results["runs"] if r["stage"] == stage and r["state"] == "finished"]
    if not any(run["losses"] or run["curve"] for run in runs):
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, key, style in (
        (left, "losses", dict(linewidth=1.3)),
        (right, "curve", dict(marker="o", markersize=3)),
    ):
        points = pd.DataFrame(
            [(run["method"], *point) for run in runs for point in run[key]],
            columns=["method", "step", "value"],
        )
        bands = points.dropna().groupby(["method", "step"])["value"].agg(["mean", "min", "max"])
        for method, colour in _colours(results).items():
            if method in bands.index:
                band = bands.loc[method]
                over = 3 if method == results["baseline"] else 2
                axes.plot(band["mean"], color=colour, zorder=over, label=_label(method), **style)
                area = dict(color=colour, alpha=0.12, linewidth=0)
                axes.fill_between(band.index, band["min"], band["max"], **area)
    left.set(xlabel="iteration", ylabel="loss", title="Training")
    right.set(xlabel="epoch", ylabel=drawable(results["metric"]), title="Validation")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, left if left.lines else right, out)
    return True


@drawn_as_written()
def save_differences(results: dict[str, Any], summary: pd.DataFrame, out: Path) -> bool:
    """Plot how far each method is from the baseline: every seed, the mean, and its 95 % interval.

    Args:
        results (dict): From :func:`~rfa_mmdet.studies.results.collect`.
        summary (pd.DataFrame): A stage's rows of the summary.
        out (Path): PNG to write.

    Returns:
        bool: Whether there was anything to plot.
    """
    known = summary.dropna(subset=["interval"]).iloc[::-1]
    if known.empty:
        return False
    runs = pd.DataFrame(results["runs"])
    tests = runs[runs["stage"] == known["stage"].iloc[0]].pivot(
        index="seed", columns="method", values="test"
    )
    gains = tests.astype(float).sub(tests[results["baseline"]].astype(float), axis="index")
    figure, axes = plt.subplots(figsize=(7.5, 1.6 + 0.36 * len(known)), layout="constrained")
    axes.axvline(0, color="black", linewidth=1)
    for y, row in enumerate(known.itertuples()):
        colour = {"better": "#146c2e", "worse": "#a4262c"}.get(row.verdict, "#5b6675")
        axes.errorbar(row.difference, y, xerr=row.interval, fmt="o", capsize=3, color=colour)
        own = gains[row.method].dropna()
        axes.plot(own, [y] * len(own), "|", color=colour, markersize=9, alpha=0.7)
    axes.set_yticks(range(len(known)), [drawable(method) for method in known["method"]])
    metric, baseline = drawable(results["metric"]), drawable(results["baseline"])
    axes.set_xlabel(
        f"{metric}: difference from {baseline}; to the right is better\n"
        "ticks: seeds; dot and bar: mean and 95 % interval, not corrected\n"
        "green, red: significant after Holm's correction; grey: not"
    )
    axes.margins(y=0.6 / len(known))
    _save(figure, None, out)
    return True


@drawn_as_written()
def save_gains(results: dict[str, Any], summary: pd.DataFrame, out: Path) -> bool:
    """Plot the metric over time and GFLOPs per image, from a stage's rows of the summary.

    Returns:
        bool: Whether there was anything to plot.
    """
    known = summary.dropna(subset=["mean", "image_seconds"])
    if len(known) < 2:
        return False
    costs = {"time per image, ms": known["image_seconds"] * 1e3}
    if known["flops"].notna().all():
        costs["GFLOPs per image"] = known["flops"].astype(float) / 1e9
    figure, all_axes = plt.subplots(
        1, len(costs), figsize=(5.5 * len(costs), 4), layout="constrained", squeeze=False
    )
    colours = _colours(results)
    for axes, (title, cost) in zip(all_axes[0], costs.items(), strict=True):
        for x, row in zip(cost, known.itertuples(), strict=True):
            style = dict(fmt="o", capsize=3, color=colours[row.method], label=_label(row.method))
            axes.errorbar(x, row.mean, row.deviation, **style)
            if row.is_baseline:
                axes.axhline(row.mean, color="black", linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(xlabel=title, ylabel=f"{drawable(results['metric'])}, mean ± deviation")
    _save(figure, all_axes[0, 0], out)
    return True


def _colours(results: dict[str, Any]) -> dict[str, Any]:
    """Return each method's colour, the same in all plots; the baseline is black."""
    others = [method for method in results["methods"] if method != results["baseline"]]
    return {results["baseline"]: "black", **dict(zip(others, itertools.cycle(_COLOURS)))}


def _label(method: str) -> str:
    return f" {drawable(method)}"  # without the blank, matplotlib hides labels that start with _


def _save(figure: Figure, legend_of: Axes | None, out: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if legend_of is not None:
        handles, labels = legend_of.get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside right center")
    texts = [text.get_text() for text in figure.findobj(Text)]
    with written_whole(out) as part, drawn_as_written(texts):
        figure.savefig(part, dpi=120)
    plt.close(figure)
