"""The summary's columns for display, and the summary as Markdown."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd

from rfa_mmdet.texts import printable


class Column(NamedTuple):
    """A column to show."""

    title: str
    key: str  # the column of the summary to sort by
    text: Callable[[dict[str, Any]], str]  # formats the cell of a row, see records()
    is_text: bool = False


def spread(mean: float | None, deviation: float | None) -> str:
    """Format a mean and its deviation, with fewer decimals for percentages.

    Example:
        >>> spread(0.5, 0.01), spread(0.5, None), spread(None, None)
        ('0.5000 ± 0.0100', '0.5000', '-')
        >>> spread(98.7572, 0.078)
        '98.76 ± 0.08'
    """
    decimals = _decimals(mean)
    text = "-" if mean is None else f"{mean:.{decimals}f}"
    return text if deviation is None else f"{text} ± {deviation:.{decimals}f}"


def gain(difference: float | None, interval: float | None, mean: float | None = None) -> str:
    """Format a difference of means, one of which is given, and half the width of its 95 % interval.

    Example:
        >>> gain(0.05, 0.012), gain(-0.05, None), gain(None, None)
        ('+0.050 ± 0.012', '-0.050', '-')
        >>> gain(0.741, 4.529, 98.7572)
        '+0.74 ± 4.53'
    """
    decimals = min(_decimals(mean), 3)
    text = "-" if difference is None else f"{difference:+.{decimals}f}"
    return text if interval is None else f"{text} ± {interval:.{decimals}f}"


def _decimals(mean: float | None) -> int:
    """Fractions such as AP are at most 1; percentages of a useful model are more."""
    return 4 if mean is None or abs(mean) <= 1 else 2


def _number(title: str, key: str, form: str, factor: float = 1) -> Column:
    def text(row: dict[str, Any]) -> str:
        return "-" if row[key] is None else format(row[key] * factor, form)

    return Column(title, key, text)


COLUMNS = (
    Column("method", "method", lambda r: r["method"] + " (baseline)" * r["is_baseline"], True),
    Column("seeds", "finished", lambda r: f"{r['finished']} of {r['wanted']}"),
    Column("test", "mean", lambda r: spread(r["mean"], r["deviation"])),
    Column(
        "difference (95 %)",
        "difference",
        lambda r: gain(r["difference"], r["interval"], r["mean"]),
    ),
    _number("p (Holm)", "p_holm", ".3f"),
    Column("verdict", "verdict", lambda r: r["verdict"] or "-", True),
    Column("validation", "val_mean", lambda r: spread(r["val_mean"], r["val_deviation"])),
    _number("parameters", "parameters", ",d"),
    _number("GFLOPs", "flops", ".3f", 1e-9),
    _number("ms/image", "image_seconds", ".1f", 1e3),
    _number("ms/iteration", "iteration_seconds", ".0f", 1e3),
    _number("training MB", "memory_mb", ",.0f"),
)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dicts, with None for missing values."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def what_was_needed(rows: pd.DataFrame) -> str:
    """Say which difference would have been significant, given a stage's rows of the summary.

    Returns:
        str: A sentence; empty if nothing was tested.
    """
    tested = rows.dropna(subset=["needed"]).sort_values("needed")
    if tested.empty:
        return ""
    low, high = tested.iloc[0], tested.iloc[-1]
    decimals = min(_decimals(low["mean"]), 3)
    least, most = (f"{row['needed']:.{decimals}f}" for row in (low, high))
    span = f"{least} ({low['method']})"
    if least != most:
        span += f" to {most} ({high['method']})"
    number = low["comparisons"]
    place = f" as the clearest of {number}" if number > 1 else ""
    return f"With these seeds, a difference had to reach {span} to be significant{place}."


def markdown(summary: pd.DataFrame, metric: str) -> str:
    """Return the summary as Markdown, one table per stage, with the metric in its heading."""
    titles = [column.title for column in COLUMNS]
    rules = ["---" if column.is_text else "---:" for column in COLUMNS]
    parts = []
    for stage, rows in summary.groupby("stage", sort=False):
        cells = [[column.text(row) for column in COLUMNS] for row in records(rows)]
        cells = [[_escaped(text) for text in line] for line in cells]
        lines = "\n".join(f"| {' | '.join(line)} |" for line in (titles, rules, *cells))
        parts.append(f"## {_escaped(f'{stage}: {metric}')}\n\n{lines}\n")
        if needed := what_was_needed(rows):
            parts.append(f"{_escaped(needed)}\n")
    return "\n".join(parts)


def _escaped(text: str) -> str:
    """Escape characters with a meaning in Markdown or HTML."""
    return re.sub(r"[\\`*\[\]<>|$&]|\b_|_\b", r"\\\g<0>", printable(text))
