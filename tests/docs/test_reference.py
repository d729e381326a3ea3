"""The reference has every public name, tool, config and method."""

import ast
import re

from rfa_mmdet import layers
from rfa_mmdet.cli import find_tools
from tests.helpers.paths import ROOT

REFERENCE = ROOT / "docs" / "reference"


def public_modules() -> set[str]:
    """Return the modules without a leading underscore that define something public."""
    found = set()
    for file in (ROOT / "rfa_mmdet").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if any(not n.startswith("_") for n in names) and not any(p[0] == "_" for p in parts[1:]):
            found.add(".".join(parts))
    return found


def test_every_public_module_is_in_the_reference():
    text = "".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    whole = set(
        re.findall(
            r"(?m)^::: (\S+)\n    options:(?:\n      .+)*\n      show_submodules: true$", text
        )
    )
    single = set(re.findall(r"(?m)^::: (\S+)$", text))
    missing = {
        module
        for module in public_modules()
        if module not in single and not any(module.startswith(f"{room}.") for room in whole)
    }
    # What is at the top is in the index; the modules of the tools are on the tools' page.
    assert missing == {"rfa_mmdet"}
    assert "rfa_mmdet.register" in single


def test_no_module_of_the_reference_is_gone():
    for page in REFERENCE.glob("*.md"):
        for name in re.findall(r"(?m)^::: (\S+)$", page.read_text(encoding="utf-8")):
            if name == "rfa_mmdet.register":
                continue
            path = ROOT.joinpath(*name.split("."))
            assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name


def test_every_tool_has_its_section_and_help_text():
    text = (REFERENCE / "tools.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"(?m)^### (\S+)$", text))
    helps = set(re.findall(r"<!-- begin: help (\S+) -->\n```text\n.+\n", text))
    scripts = {path.stem for path in ROOT.glob("tools/**/*.sh")}
    benchmarks = {name for name in sections if name.startswith("benchmarks.")}
    assert sections == {*find_tools(), *scripts, *benchmarks, "setup_env"}
    assert len(helps) == len(sections)


def test_every_config_is_in_the_reference():
    text = (REFERENCE / "configs.md").read_text(encoding="utf-8")
    for path in ROOT.glob("configs/[!_]*/*.py"):
        if path.parent.name != "ablation":
            assert f"| `{path.stem}` |" in text or f"`{path.relative_to(ROOT)}`" in text


def test_every_method_is_in_the_reference():
    text = (REFERENCE / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"(?m)^\| `(\w+)` \| \[", text)) == {*layers.__all__}
