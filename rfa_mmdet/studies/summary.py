"""Means, deviations, and whether a difference is more than chance."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

LEVEL = 0.05
MIN_PAIRS = 3
ROUNDING = 0.001  # MMDetection's metrics have three decimals


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline, over the seeds that both have.

    Attributes:
        difference (float | None): Mean of the differences. None: no seed in common.
        p (float | None): Of a paired t-test. None: fewer than three pairs.
        verdict (str): 'better', 'worse', 'within the spread', 'cannot be tested', or '' where
            there is nothing to compare.
    """

    difference: float | None = None
    p: float | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    """A method in a stage; None: not known.

    Attributes:
        stage, method (str): Names.
        is_baseline (bool): Whether the others are compared with it.
        finished, wanted (int): Runs.
        mean, deviation (float | None): Of the tests' metric; deviation with n - 1.
        compared (Comparison): With the baseline.
        val_mean, val_deviation (float | None): Of the last validation's.
        parameters, flops (int | None): Of the model.
        image_seconds, iteration_seconds (float | None): Of inference and of training.
        memory_mb (float | None): Peak of training.
    """

    stage: str
    method: str
    is_baseline: bool
    finished: int
    wanted: int
    mean: float | None
    deviation: float | None
    compared: Comparison
    val_mean: float | None
    val_deviation: float | None
    parameters: int | None
    flops: int | None
    image_seconds: float | None
    iteration_seconds: float | None
    memory_mb: float | None


def compare(ours: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Compare two methods over the same seeds.

    Args:
        ours, baseline (Sequence[float]): A value a seed, in the same order.

    Returns:
        Comparison: By a two-sided paired t-test at 5 %, of three pairs or more, with at least the
            variance that the metrics' rounding gives.

    Example:
        >>> compare([0.52, 0.54, 0.53], [0.50, 0.51, 0.52]).verdict
        'within the spread'
        >>> compare([0.52, 0.54], [0.50, 0.51]).verdict
        'cannot be tested'
    """
    differences = [a - b for a, b in zip(ours, baseline, strict=True)]
    if not differences:
        return Comparison()
    mean = statistics.fmean(differences)
    if len(differences) < MIN_PAIRS:
        return Comparison(mean, None, "cannot be tested")
    # Two rounded values differ by chance at least so much: three differences of 0.001 are no proof.
    variance = max(statistics.variance(differences), ROUNDING**2 / 6)
    n = len(differences)
    p = float(2 * t.sf(abs(mean) / math.sqrt(variance / n), n - 1))
    exceeds = "better" if mean > 0 else "worse"
    return Comparison(mean, p, exceeds if p < LEVEL else "within the spread")


def summarise(results: dict[str, Any]) -> list[Row]:
    """Return a row for each method of each stage.

    Args:
        results (dict): As :func:`~rfa_mmdet.studies.results.collect` returns them.

    Returns:
        list[Row]: In the spec's order.
    """
    rows = []
    for stage in results["stages"]:
        runs = [run for run in results["runs"] if run["stage"] == stage["name"]]
        done = {
            (run["method"], run["seed"]): run
            for run in runs
            if run["state"] == "finished" and run["test"] is not None
        }
        for method in stage["methods"]:
            mine = {seed: run for (m, seed), run in done.items() if m == method}
            base = {seed: run for (m, seed), run in done.items() if m == results["baseline"]}
            both = [] if method == results["baseline"] else sorted(mine.keys() & base.keys())
            compared = compare([mine[s]["test"] for s in both], [base[s]["test"] for s in both])
            cost = results["costs"].get("methods", {}).get(method, {})
            rows.append(
                Row(
                    stage["name"],
                    method,
                    method == results["baseline"],
                    len(mine),
                    len(stage["seeds"]),
                    *_spread([run["test"] for run in mine.values()]),
                    compared,
                    *_spread([run["val"] for run in mine.values()]),
                    cost.get("parameters"),
                    cost.get("flops"),
                    cost.get("image_seconds"),
                    cost.get("iteration_seconds"),
                    _most([run["memory_mb"] for run in mine.values()]),
                )
            )
    return rows


def _spread(values: list[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _most(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
