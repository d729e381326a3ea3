"""The documentation's pages."""

import re
from pathlib import Path

from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?ms)^( *)```([\w{}. -]*)\n(.*?)^\1```$")


def without_code(page: Path) -> str:
    """Return a page's text without fenced code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def code(language: str) -> list[tuple[Path, str]]:
    """Return the fenced code of a language, in the order of the pages."""
    return [
        (page, re.sub(f"(?m)^{indent}", "", text))
        for page in PAGES
        for indent, found, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if found == language
    ]
