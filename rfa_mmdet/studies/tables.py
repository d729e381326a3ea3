"""The summary as markdown and as CSV."""

import csv
import io
from collections.abc import Sequence

from rfa_mmdet.studies.summary import Row

NONE = "-"


def number(value: float | None, form: str, factor: float = 1) -> str:
    """Format a number that may be missing.

    Args:
        value (float | None): The number.
        form (str): Of format().
        factor (float): By which it is multiplied.

    Example:
        >>> number(0.0123, ".1f", 1e3), number(None, ".1f")
        ('12.3', '-')
    """
    return NONE if value is None else format(value * factor, form)


def with_deviation(mean: float | None, deviation: float | None) -> str:
    """Format a mean and its deviation.

    Args:
        mean, deviation (float | None): Missing where None.

    Example:
        >>> with_deviation(0.5, 0.01), with_deviation(0.5, None)
        ('0.5000 ± 0.0100', '0.5000')
    """
    text = number(mean, ".4f")
    return text if deviation is None else f"{text} ± {deviation:.4f}"


def cells(row: Row) -> dict[str, str]:
    """Return a row's cells by their titles, as people read them.

    Args:
        row (Row): Of the summary.
    """
    compared = row.compared
    return {
        "method": row.method + (" (baseline)" if row.is_baseline else ""),
        "seeds": f"{row.finished} of {row.wanted}",
        "test": with_deviation(row.mean, row.deviation),
        "difference": number(compared.difference, "+.4f"),
        "p": number(compared.p, ".3f"),
        "verdict": compared.verdict or NONE,
        "validation": with_deviation(row.val_mean, row.val_deviation),
        "parameters": number(row.parameters, ",d"),
        "GFLOPs": number(row.flops, ".3f", 1e-9),
        "ms an image": number(row.image_seconds, ".1f", 1e3),
        "ms an iteration": number(row.iteration_seconds, ".0f", 1e3),
        "MB in training": number(row.memory_mb, ",.0f"),
    }


def markdown(rows: Sequence[Row], metric: str) -> str:
    """Return the tables of all stages as markdown.

    Args:
        rows (Sequence[Row]): The summary.
        metric (str): What is compared.
    """
    parts = []
    for stage in dict.fromkeys(row.stage for row in rows):
        table = [cells(row) for row in rows if row.stage == stage]
        titles = list(table[0])
        aligned = ["---" if title in ("method", "verdict") else "---:" for title in titles]
        lines = [titles, aligned, *(one.values() for one in table)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"## {stage}: {metric}\n\n{text}\n")
    return "\n".join(parts)


def comma_separated(rows: Sequence[Row]) -> str:
    """Return the summary as CSV, unrounded, one header.

    Args:
        rows (Sequence[Row]): The summary.
    """
    text = io.StringIO()
    own = [name for name in Row.__dataclass_fields__ if name != "compared"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*own, "difference", "p", "verdict"])
    for row in rows:
        c = row.compared
        values = [*(getattr(row, name) for name in own), c.difference, c.p, c.verdict]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()
