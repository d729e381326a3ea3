"""What docs/scripts writes into the pages and draws is up to date."""

import pytest

from docs.scripts import figures, generate
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("page", generate.pages(), ids=lambda page: page.stem)
def test_page(page):
    text = page.read_text(encoding="utf-8")
    assert generate.filled(text) == text, "stale: run docs/scripts/generate.py"


def test_a_stale_page_is_found():
    stale = "<!-- begin: stacks -->\n| torch 1.0 |\n<!-- end -->\n"
    assert "| torch 1.0 |" not in generate.filled(stale)


def test_figures_are_drawn(tmp_path):
    figures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{name}-{theme}.svg" for name in figures.FIGURES for theme in figures.THEMES}
    for name in drawn:
        assert (ROOT / "docs" / "images" / name).exists()


@pytest.mark.parametrize("theme", figures.THEMES)
def test_numbers_in_a_figure(theme):
    figure = (ROOT / "docs" / "images" / f"kept_bytes-{theme}.svg").read_text(encoding="utf-8")
    assert f"<dc:description>{figures.kept_text()}</dc:description>" in figure
