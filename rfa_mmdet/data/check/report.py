"""Collect and format findings about data."""

import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from rfa_mmdet.errors import DataError
from rfa_mmdet.files import file_kind
from rfa_mmdet.texts import printable

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_LONGEST = 300  # characters of an item, such as a path


@dataclass
class Findings:
    """Problems found so far. Errors do not stop later checks, so all are reported at once.

    Attributes:
        errors (list[str]): Problems with which a run would fail, or silently learn nothing or the
            wrong thing.
        warnings (list[str]): Problems with which a run is possible.
        read (set[str]): Image files that a run reads.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    def raise_errors(self) -> None:
        """Raise a single :class:`DataError` with all errors, if there are any."""
        if len(self.errors) == 1:
            raise DataError(self.errors[0])
        if self.errors:
            lines = "".join(f"\n  - {error}" for error in self.errors)
            raise DataError(f"{len(self.errors)} problems with the data:{lines}")


def literal(value: Any) -> str:
    """Return the shortened ``repr`` of a value from a file.

    Example:
        >>> literal("traffic light"), len(literal("a" * 8000))
        ("'traffic light'", 60)
    """
    return _short.repr(value)


def some(items: Iterable, limit: int = 5) -> str:
    """Return the first few items as text, and the number of all if there are more.

    Example:
        >>> some(["a", "b", "c"], limit=2)
        'a, b, ... (3 in all)'
    """
    items = [_shortened(printable(str(item))) for item in items]
    more = f", ... ({len(items)} in all)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _shortened(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}...{text[-half:]}"


def missing_path(path: str) -> str:
    """Describe how far a missing path exists, and similar names.

    Example:
        >>> missing_path("/no/such/file.json")
        "/no/such/file.json does not exist; the first missing folder is '/no'"
    """
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        # The first part that is missing is where the user went wrong.
        while not os.path.isdir(os.path.dirname(folder)):
            folder = os.path.dirname(folder)
        near = _near(os.path.basename(folder), os.path.dirname(folder))
        return f"{path} does not exist; the first missing folder is {folder!r}{near}"
    if os.path.exists(path):
        return f"{path} is {file_kind(path)}, not a file"
    return f"{path} does not exist{_near(name, folder) or f'; no similar name in {folder!r}'}"


def _near(name: str, folder: str) -> str:
    near = get_close_matches(name, os.listdir(folder), n=3, cutoff=0.5)
    return f"; similar names in {folder!r}: {', '.join(near)}" if near else ""
