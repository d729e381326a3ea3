"""Names and colours of a detector's classes, robust against invalid metadata."""

from collections.abc import Mapping
from typing import Any

from mmdet.visualization import get_palette

Colour = tuple[int, ...]  # red, green and blue


def class_names(metainfo: Mapping[str, Any], number: int = 0) -> tuple[str, ...]:
    """Return the names of a dataset's classes.

    Args:
        metainfo (Mapping[str, Any]): Metadata of a dataset or a checkpoint. A string is a single
            class.
        number (int): Minimum number of names; unknown classes are named after their label. Defaults
            to 0.

    Example:
        >>> class_names(dict(classes="cat"), 2), class_names({}, 1), class_names(dict(classes=[7]))
        (('cat', 'class 1'), ('class 0',), ('7',))
    """
    given = metainfo.get("classes") or ()
    names = (given,) if isinstance(given, str) else tuple(map(str, given))
    return (*names, *(f"class {label}" for label in range(len(names), number)))


def class_colours(metainfo: Mapping[str, Any], number: int) -> list[Colour]:
    """Return a colour for each class: the palette's, then random ones.

    Args:
        metainfo (Mapping[str, Any]): Metadata; its ``palette`` may be too short, missing or a name
            of MMDetection's palettes.
        number (int): Number of classes.

    Example:
        >>> colours = class_colours(dict(palette=[(1, 2, 3)]), 3)
        >>> colours[0], len(set(colours))
        ((1, 2, 3), 3)
    """
    given: Any = metainfo.get("palette")
    if isinstance(given, str) or _is_colour(given):
        try:
            given = get_palette(given if isinstance(given, str) else tuple(given), number)
        except (AssertionError, ValueError, KeyError):  # unknown name, or palette too short
            given = None
    known = [tuple(map(int, c)) for c in (() if given is None else given) if _is_colour(c)]
    random = [tuple(map(int, c)) for c in get_palette("random", number)]
    return [*known[:number], *random[len(known) :]]


def _is_colour(value: Any) -> bool:
    try:
        return len(value) == 3 and all(0 <= part <= 255 for part in value)
    except (TypeError, ValueError):
        return False
