"""Links, anchors and pictures of README.md and docs/ lead somewhere."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.pages import PAGES, ROOT, without_code

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"(?m)^#+ (.+?)(?: \{ #([\w-]+) \})?$")


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and this site make them."""
    found = set()
    for title, given in HEADING.findall(without_code(page)):
        text = re.sub(r"\[([^]]+)\]\([^)]+\)|[`*]", r"\1", title)
        found.add(given or re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-"))
    return found


def links(page: Path) -> list[str]:
    """Return a page's links that stay in the repository."""
    return [to for to in LINK.findall(without_code(page)) if not re.match(r"[a-z]+:", to)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        themes = ("only-light", "only-dark")  # Material's, for pictures
        if anchor and anchor not in themes and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}: no such heading"


def test_links_are_found():
    assert sum(len(links(page)) for page in PAGES) > 100


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r"[\w/-]+\.md", nav))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    notebooks = {path.with_suffix(".md").name for path in (ROOT / "docs").glob("*.ipynb")}
    assert named == pages | notebooks
