"""Names with any characters: as one line, in spreadsheets, and in pictures."""

import csv
import io

import matplotlib
import pytest
from matplotlib.figure import Figure

from rfa_mmdet.texts import cell, drawable, drawn_as_written, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("a\x1b[31mb\r", r"a\x1b[31mb\r"),
        ("a\u2028b\x00", r"a\u2028b\x00"),
        ("\udcff.jpg", r"\udcff.jpg"),
        ("$x$ [red] \\ = | <b> é 猫 🐱", "$x$ [red] \\ = | <b> é 猫 🐱"),
    ],
)
def test_text_in_one_line(text, shown):
    assert printable(text) == shown
    assert printable(text).encode()


@pytest.mark.parametrize(
    "text", ["=1+1", "+1+1", "-1+cmd", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1"]
)
def test_cells_are_never_formulas(text):
    file = io.StringIO()
    csv.writer(file).writerow([cell(text)])
    assert next(csv.reader(io.StringIO(file.getvalue(), newline=""))) == [f"'{text}"]


@pytest.mark.parametrize("value", [-0.1, "-0.1", "+5", "-1e-3", 7, None, "a=1", "a-b", "1-2", ""])
def test_numbers_and_other_texts_are_unchanged(value):
    assert cell(value) is value


def width(text: str, **options) -> float:
    figure = Figure()
    shown = figure.text(0, 0, text, **options)
    figure.canvas.draw()
    return shown.get_window_extent().width


@pytest.mark.parametrize("name", ["$aaaa$", "$\\alpha$", "$a$b_$", "$_$", "\\$x\\$", "a_b^c"])
def test_pictures_show_no_tex(name):
    with drawn_as_written([name]):
        # Every character takes up space, unlike in TeX.
        assert width(name) == pytest.approx(width(name, parse_math=False))
        assert width(name) > width(name.translate({ord(c): None for c in "$\\^"}))
    assert matplotlib.rcParams["text.parse_math"]


@pytest.mark.filterwarnings("error")  # matplotlib's warning about missing glyphs
def test_pictures_only_have_characters_of_a_font():
    for name in ("é ß 猫 🐱 한", "\ufdd0", "\U0010fffd", "a\nb\x07", "\udcff"):
        shown = drawable(name)
        with drawn_as_written([shown]):
            assert width(shown) > 0
    assert drawable("\ufdd0") == r"\ufdd0"
    assert drawable("x" * 100) == "x" * 59 + "…"
