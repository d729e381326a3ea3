"""Names of files and classes made safe for terminals, tables and pictures.

A name can hold anything: line breaks, bytes that are no UTF-8, formulas of a spreadsheet, TeX.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# What starts a formula in a spreadsheet; the wide ones do in Japanese ones.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001


def printable(text: object) -> str:
    r"""Return a text in one line that every terminal takes: escapes for control characters.

    Example:
        >>> print(printable("a\nb \x1b[31m \udcff é $x$"))
        a\nb \x1b[31m \udcff é $x$
    """
    return "".join(_escaped(c) if _breaks(c) else c for c in str(text))


def shown(text: object, longest: int = 80) -> str:
    r"""Return what a file says as it may stand in a message: printable, and not too long.

    Args:
        text (object): Of :func:`str`.
        longest (int): Characters; of longer ones the end is left out. Defaults to 80.

    Example:
        >>> print(shown("a\x1b[31mb" + 100 * "c", 20))
        a\x1b[31mbccccccc...
    """
    text = printable(str(text)[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def cell(value: Any) -> Any:
    """Return the cell of a CSV file that a spreadsheet shows and does not run.

    Example:
        >>> cell("=1+1"), cell("-0.1"), cell(-0.1), cell("card-2")
        ("'=1+1", '-0.1', -0.1, 'card-2')
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA) or _is_number(value):
        return value
    return f"'{value}"


def drawable(text: object, longest: int = 60) -> str:
    r"""Return a text for a picture: in one line, without characters that no font here has.

    Args:
        text (object): Of :func:`str`.
        longest (int): Characters; of longer ones the end is left out. Defaults to 60.

    Example:
        >>> drawable("a $x$\n"), drawable("abcdef", 4)
        ('a $x$\\n', 'abc…')
    """
    shown = "".join(c if _family(c) else _escaped(c) for c in printable(text))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


@contextmanager
def drawn_as_written(texts: Iterable[str] = ()) -> Iterator[None]:
    """Have matplotlib draw the texts that are made inside as they are, without TeX.

    Args:
        texts (Iterable[str]): Those of :func:`drawable`, in whose characters' fonts to draw.

    Example:
        >>> import matplotlib
        >>> with drawn_as_written(["a"]):
        ...     matplotlib.rcParams["text.parse_math"]
        False
    """
    import matplotlib

    usual = matplotlib.rcParams["font.sans-serif"]
    more = {_family(c): None for text in texts for c in text}
    families = [*usual[:1], *(name for name in more if name and name not in usual[:1]), *usual[1:]]
    with matplotlib.rc_context({"text.parse_math": False, "font.sans-serif": families}):
        yield


def _breaks(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@cache
def _family(character: str) -> str | None:
    """Return a font family that has a character: matplotlib's default, else an installed one."""
    from matplotlib import font_manager

    usual = font_manager.FontProperties()
    if ord(character) in _characters(font_manager.findfont(usual)):
        return usual.get_name()
    return next(
        (
            font.name
            for font in font_manager.fontManager.ttflist
            # It has a box for every character.
            if not font.name.startswith("Last Resort") and ord(character) in _characters(font.fname)
        ),
        None,
    )


@cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    try:
        font = get_font(file)
    except (RuntimeError, OSError):  # such as fonts of coloured bitmaps
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
