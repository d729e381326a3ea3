"""README_zh-CN.md says what README.md says: its headings, commands, links, names and numbers."""

import re

import pytest

from tests.helpers.paths import ROOT

CODE = re.compile(r"(?ms)^```.*?^```$")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def sections(name: str) -> list[str]:
    """Return the parts of a file, each with its heading."""
    text = (ROOT / name).read_text(encoding="utf-8")
    outside = re.sub(CODE, lambda block: block[0].replace("#", "\0"), text)
    return [part.replace("\0", "#") for part in re.split(r"(?m)^(?=#)", outside) if part]


ENGLISH, CHINESE = sections("README.md"), sections("README_zh-CN.md")
each_section = pytest.mark.parametrize(
    ("english", "chinese"),
    [*zip(ENGLISH, CHINESE, strict=False)],
    ids=lambda section: section.split("\n")[0],
)


def level(section: str) -> int:
    return len(re.match("#+", section)[0])


def links(section: str) -> list[str]:
    # Each links to the other, and has its own headings.
    return sorted(link for link in LINK.findall(section) if not link.startswith(("#", "README")))


def code_in_lines(section: str) -> list[str]:
    return sorted(re.findall(r"`([^`\n]+)`", CODE.sub("", section)))


def numbers(section: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", CODE.sub("", section)))


def table(section: str) -> list[int]:
    """Return the number of cells of each row."""
    return [line.count("|") for line in section.splitlines() if line.startswith("|")]


def test_headings():
    assert len(ENGLISH) > 8
    assert [level(section) for section in CHINESE] == [level(section) for section in ENGLISH]


@each_section
@pytest.mark.parametrize("part", [CODE.findall, links, code_in_lines, numbers, table])
def test_sections_agree(english, chinese, part):
    assert part(chinese) == part(english)


def test_links_into_the_page_lead_to_headings():
    for name, parts in (("README.md", ENGLISH), ("README_zh-CN.md", CHINESE)):
        titles = [re.sub("^#+ ", "", part.split("\n")[0]).lower() for part in parts]
        anchors = {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}
        found = [link for link in LINK.findall("".join(parts)) if link.startswith("#")]
        assert found, name
        assert {link[1:] for link in found} <= anchors


def test_the_chinese_page_is_chinese():
    """Every paragraph is translated, tables and code aside."""
    text = CODE.sub("", "".join(CHINESE))
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip() and not paragraph.startswith(("|", "<!--", "# rfa_mmdet")):
            assert re.search(r"[\u4e00-\u9fff]", paragraph), paragraph
