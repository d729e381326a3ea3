"""Make names of files and classes safe for terminals, tables and pictures.

A name can contain anything: line breaks, invalid UTF-8, spreadsheet formulas, TeX.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Characters that start a spreadsheet formula, full-width ones included.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001


def printable(text: object) -> str:
    r"""Return a text as one line, with control characters escaped.

    Example:
        >>> print(printable("a\nb \x1b[31m \udcff é $x$"))
        a\nb \x1b[31m \udcff é $x$
    """
    return "".join(_escaped(c) if _breaks(c) else c for c in str(text))


def shown(text: object, longest: int = 80) -> str:
    r"""Return a text from a file for use in a message: printable, and not too long.

    Args:
        text (object): Anything that :func:`str` takes.
        longest (int): Maximum number of characters; longer texts are truncated. Defaults to 80.

    Example:
        >>> print(shown("a\x1b[31mb" + 100 * "c", 20))
        a\x1b[31mbccccccc...
    """
    text = printable(str(text)[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def cell(value: Any) -> Any:
    """Return a value for a CSV file, quoted if a spreadsheet would run it as a formula.

    Example:
        >>> cell("=1+1"), cell("-0.1"), cell(-0.1), cell("card-2")
        ("'=1+1", '-0.1', -0.1, 'card-2')
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA) or _is_number(value):
        return value
    return f"'{value}"


def drawable(text: object, longest: int = 60) -> str:
    r"""Return a text for a picture: one line, with characters that no font has escaped.

    Args:
        text (object): Anything that :func:`str` takes.
        longest (int): Maximum number of characters; longer texts are truncated. Defaults to 60.

    Example:
        >>> drawable("a $x$\n"), drawable("abcdef", 4)
        ('a $x$\\n', 'abc…')
    """
    shown = "".join(c if _family(c) else _escaped(c) for c in printable(text))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


@contextmanager
def drawn_as_written(texts: Iterable[str] = ()) -> Iterator[None]:
    """Let matplotlib draw texts literally, without TeX.

    Args:
        texts (Iterable[str]): Texts to be drawn, from :func:`drawable`; their fonts are enabled.

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
    """Return a font family that has this character: matplotlib's default, or an installed one."""
    from matplotlib import font_manager

    usual = font_manager.FontProperties()
    if ord(character) in _characters(font_manager.findfont(usual)):
        return usual.get_name()
    return next(
        (
            font.name
            for font in font_manager.fontManager.ttflist
            # Last Resort has a placeholder box for every character.
            if not font.name.startswith("Last Resort") and ord(character) in _characters(font.fname)
        ),
        None,
    )


@cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    try:
        font = get_font(file)
    except (RuntimeError, OSError):  # e.g. fonts of coloured bitmaps
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


def first_line(error: Exception) -> str:
    r"""Return the first line of an error's message.

    Example:
        >>> first_line(ValueError()), first_line(ValueError("one\ntwo"))
        ('ValueError', 'one')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
