"""Layout of the tests: short files, and shared code only in tests/helpers."""

import ast
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))
LONGEST = 400  # lines

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def shared(source: str) -> set[str]:
    """Return the test modules that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    local = ("tests", "conftest", ".")
    return {name for name in found if name.startswith(local) or "test_" in name}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os\nfrom pathlib import Path", set()),
        ("from tests.helpers.zoo import stir", {"tests.helpers.zoo"}),
        ("def f():\n    from tests.layers.test_ema import case", {"tests.layers.test_ema"}),
        ("import tests.conftest as shared", {"tests.conftest"}),
        ("from conftest import fixture", {"conftest"}),
        ("from .test_ema import case", {".test_ema"}),
        ("from . import test_ema", {"."}),
        ("from test_ema import case", {"test_ema"}),
    ],
)
def test_imports_are_found(source, expected):
    assert shared(source) == expected


@each_file
def test_only_helpers_are_imported(file: Path):
    others = {n for n in shared(file.read_text()) if not f"{n}.".startswith("tests.helpers.")}
    assert not others, f"imports from {sorted(others)}: move what is shared to tests/helpers"


@each_file
def test_files_are_short(file: Path):
    lines = len(file.read_text().splitlines())
    assert lines <= LONGEST, f"{lines} lines: split it by what it tests"
