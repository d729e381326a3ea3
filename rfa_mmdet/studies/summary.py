"""Summarise each method of each stage: means, deviations, costs and a paired test."""

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

LEVEL = 0.05
MIN_PAIRS = 3
ROUNDING = 0.001  # MMDetection's metrics have three decimals
COSTS = {
    "parameters": "Int64",
    "flops": "Int64",
    "image_seconds": float,
    "iteration_seconds": float,
}


def summarise(results: dict[str, Any]) -> pd.DataFrame:
    """Summarise the finished runs.

    Args:
        results (dict): Returned by :func:`~rfa_mmdet.studies.results.collect`.

    Returns:
        pd.DataFrame: A row for each method of each stage, in the spec's order, with NA for unknown
        values: ``stage``, ``method``, ``is_baseline``; ``finished`` and ``wanted``, numbers of
        runs, and ``failed``; ``mean`` and ``deviation`` (n - 1) of the test metric, ``val_mean``
        and ``val_deviation`` of the tested checkpoints' validation; ``memory_mb``, the median over
        runs; ``difference`` from the baseline, mean over ``pairs`` of runs with the same seed, and
        ``interval``, half the width of its 95 % confidence interval; ``p``, see :func:`paired_p`,
        and ``p_holm``, corrected for all ``comparisons`` of the stage, finished or not;
        ``needed``, the smallest difference that, with this spread, is significant in the first step
        of that correction; ``verdict``, based on ``p_holm``: 'better', 'worse', 'not significant',
        'cannot be tested' or ''; and the costs ``parameters``, ``flops``, ``image_seconds`` and
        ``iteration_seconds``.
    """
    runs = pd.DataFrame(results["runs"]).astype({"test": float, "val": float, "memory_mb": float})
    done = runs[(runs["state"] == "finished") & runs["test"].notna()]
    is_baseline = done["method"] == results["baseline"]
    baseline = done[is_baseline].set_index(["stage", "seed"])["test"].rename("baseline")
    gain = done["test"] - done.join(baseline, on=["stage", "seed"])["baseline"]
    methods = done.assign(gain=gain.mask(is_baseline)).groupby(["stage", "method"])
    summary = methods.agg(
        finished=("seed", "size"),
        mean=("test", "mean"),
        deviation=("test", "std"),
        val_mean=("val", "mean"),
        val_deviation=("val", "std"),
        memory_mb=("memory_mb", "median"),
        difference=("gain", "mean"),
        pairs=("gain", "count"),
        interval=("gain", interval),
        p=("gain", paired_p),
    )
    costs = pd.DataFrame.from_dict(results["costs"].get("methods", {}), "index", columns=[*COSTS])
    table = pd.DataFrame(
        [
            (s["name"], method, len(s["seeds"]))
            for s in results["stages"]
            for method in s["methods"]
        ],
        columns=["stage", "method", "wanted"],
    )
    table.insert(2, "is_baseline", table["method"] == results["baseline"])
    table = table.join(summary, on=["stage", "method"]).join(costs.astype(COSTS), on="method")
    failed = runs[runs["state"] == "failed"].groupby(["stage", "method"]).size().rename("failed")
    table = table.join(failed, on=["stage", "method"])
    counts = ("finished", "pairs", "failed")
    table = table.fillna(dict.fromkeys(counts, 0)).astype(dict.fromkeys(counts, int))
    compared = table[~table["is_baseline"]].groupby("stage")
    table["comparisons"] = table["stage"].map(compared.size()).fillna(0).astype(int)
    table["p_holm"] = compared["p"].transform(holm)
    table["needed"] = table.apply(_needed, axis="columns")
    # Without the runs that failed, a method may look better than it is, or the baseline worse.
    broken = set(table.loc[table["is_baseline"] & (table["failed"] > 0), "stage"])
    table["verdict"] = [
        _verdict(row, row["failed"] > 0 or row["stage"] in broken) for _, row in table.iterrows()
    ]
    return table


def interval(differences: pd.Series) -> float:
    """Return half the width of the mean's 95 % confidence interval.

    Args:
        differences (pd.Series): As for :func:`paired_p`.

    Returns:
        float: NaN for fewer than three pairs.

    Example:
        >>> round(interval(pd.Series([0.02, 0.03, 0.01])), 3)
        0.025
    """
    n = differences.count()
    return float(_standard_error(differences) * t.isf(LEVEL / 2, n - 1))


def paired_p(differences: pd.Series) -> float:
    """Return the p-value of a two-sided paired t-test.

    Args:
        differences (pd.Series): Differences between two methods, one per seed; NA if missing.

    Returns:
        float: The p-value; NaN for fewer than three pairs. The variance is at least that of the
        metrics' rounding: three differences of 0.001 prove nothing.

    Example:
        >>> round(paired_p(pd.Series([0.02, 0.03, 0.01])), 3)
        0.074
    """
    error = _standard_error(differences)
    return float(2 * t.sf(abs(differences.mean()) / error, differences.count() - 1))


def holm(p: pd.Series) -> pd.Series:
    """Correct p values for the number of comparisons (Holm, 1979).

    Args:
        p (pd.Series): One per planned comparison; NA if it cannot be made yet. It counts, or an
            unfinished study would find more than the finished one.

    Returns:
        pd.Series: The smallest level of all tests together at which each still is significant.

    Example:
        >>> list(holm(pd.Series([0.04, 0.01, 0.03])))
        [0.06, 0.03, 0.06]
        >>> list(holm(pd.Series([0.01, None])))
        [0.02, nan]
    """
    ordered = p.fillna(1).sort_values()
    left = np.arange(len(ordered), 0, -1)  # comparisons that are not yet decided
    return (ordered * left).cummax().clip(upper=1).reindex(p.index).where(p.notna())


def _standard_error(differences: pd.Series) -> float:
    n = differences.count()
    if n < MIN_PAIRS:
        return math.nan
    return math.sqrt(max(differences.var(), ROUNDING**2 / 6) / n)


def _needed(row: pd.Series) -> float:
    if row["pairs"] < MIN_PAIRS:
        return math.nan
    first, alone = (t.isf(LEVEL / 2 / tests, row["pairs"] - 1) for tests in (row["comparisons"], 1))
    return float(max(row["interval"] * first / alone, ROUNDING))


def _verdict(row: pd.Series, failed: bool) -> str:
    if row["pairs"] < MIN_PAIRS or failed:
        return "cannot be tested" if row["pairs"] else ""
    # Many seeds make even one step of the metric significant, which no user notices.
    if row["p_holm"] >= LEVEL or round(abs(row["difference"]), 6) <= ROUNDING:
        return "not significant"
    return "better" if row["difference"] > 0 else "worse"
