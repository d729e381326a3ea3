"""Fill in what the pages of docs/ take from the sources: help texts, costs, versions, patches.

A page marks such a part by two comments, and everything between them is written by this script:

    <!-- begin: help tools/train.py -->
    <!-- end -->

`python docs/scripts/generate.py` rewrites all pages, in an environment that has the package;
tests/docs/test_generated.py says when one is stale.
"""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?ms)^(<!-- begin: (\w+) ?(.*?) -->\n).*?^(?=<!-- end -->$)")
WIDTH = "78"  # characters of a help text

# Method -> its paper, and what to know about it.
PAPERS = {
    "RFAConv": ("2304.03198", ""),
    "RFCBAMConv": ("2304.03198", ""),
    "RFCAConv": ("2304.03198", ""),
    "CAMConv": ("2304.03198", ", a baseline there"),
    "CBAMConv": ("2304.03198", ", a baseline there"),
    "CAConv": ("2304.03198", ", a baseline there"),
    "EMA": ("2305.13563", ""),
    "ConAM": ("2110.14369", " ([see below](#conam))"),
    "CBAM": ("1807.06521", ""),
    "CoordAtt": ("2103.02907", ""),
    "SE": ("1709.01507", ""),
    "ECA": ("1910.03151", ""),
}


def help_text(tool: str) -> Iterator[str]:
    """Yield what a tool prints for --help."""
    yield "```text"
    if tool.endswith(".sh"):
        command, options = ["bash", tool, "--help"], dict(capture_output=True, text=True)
        yield subprocess.run(command, cwd=ROOT, check=True, **options).stdout.rstrip()
    else:
        yield _help_of_python(tool).rstrip()
    yield "```"


@contextmanager
def _in_root() -> Iterator[None]:
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        yield
    finally:
        os.chdir(here)


def _help_of_python(tool: str) -> str:
    out = StringIO()
    is_file = tool.endswith(".py")
    with (
        _in_root(),
        mock.patch.object(sys, "argv", [tool, "--help"]),
        mock.patch.object(sys, "path", [str((ROOT / tool).parent), str(ROOT), *sys.path]),
        mock.patch.dict(os.environ, COLUMNS=WIDTH),
        redirect_stdout(out),
        suppress(SystemExit),
    ):
        run = runpy.run_path if is_file else runpy.run_module
        run(tool, run_name="__main__")
    return out.getvalue()


@cache
def config_rows(method: str) -> list[list[str]]:
    """Return config, data, parameters, GFLOPs and AP of the table in a method's README."""
    text = (ROOT / "configs" / method / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| \[([^]]+)\]\([^)]+\) \| (.*) \|$", text)
    return [[name, *cells.split(" | ")] for name, cells in rows]


def config_table(method: str) -> Iterator[str]:
    """Yield the table of a method's configs."""
    rows = config_rows(method)
    measured = any(row[-1] != "not measured" for row in rows)
    yield f"| config | data | parameters | GFLOPs |{' AP |' * measured}"
    yield f"|---|---|---:|---:|{'---|' * measured}"
    for name, *cells in rows:
        yield f"| `{name}` | {' | '.join(cells if measured else cells[:-1])} |"


def config_text(path: str) -> Iterator[str]:
    """Yield a config."""
    yield "```python"
    yield (ROOT / path).read_text(encoding="utf-8").rstrip()
    yield "```"


def method_table(kind: str) -> Iterator[str]:
    """Yield what the methods add to a RetinaNet R50-FPN: 'convolutions' or 'plug-ins'."""
    from rfa_mmdet.layers.conv import __all__ as convolutions

    text = (ROOT / "benchmarks" / "systems.md").read_text(encoding="utf-8")
    costs = {
        name: rest for name, *rest in re.findall(r"(?m)^\| `?(\w+)`? \| (.+) \| (.+) \|$", text)
    }
    parameters, gflops = costs["nothing"]
    yield f"| name | paper | parameters (of {parameters}) | GFLOPs (of {gflops}) |"
    yield "|---|---|---:|---:|"
    for name, (number, remark) in PAPERS.items():
        if (name in convolutions) == (kind == "convolutions"):
            paper = f"[{number}](https://arxiv.org/abs/{number}){remark}"
            yield f"| `{name}` | {paper} | {' | '.join(costs[name])} |"


STACKS = ("current", "prebuilt", "onedl")


def stack_table(_: str) -> Iterator[str]:
    """Yield the versions of each stack, those of the newest Python where they differ."""
    sys.path.insert(0, str(ROOT / "tools"))
    from setup_env import STACKS as PYTHONS
    from setup_env import read_pins

    columns = ("torch", "mmcv", "mmdet", "mmengine", "numpy")
    forks = {"mmcv": "onedl-mmcv", "mmdet": "onedl-mmdetection", "mmengine": "onedl-mmengine"}
    yield f"| stack | Python | {' | '.join(columns)} |"
    yield f"|---|---|{'---|' * len(columns)}"
    for stack in STACKS:
        # The first of two lines is that of the newer Pythons.
        found = re.findall(r"(?m)^([\w-]+)==([^;\s]+)", read_pins(stack))
        pins = dict(reversed(found))
        named = [forks[c] if c not in pins and c in forks else c for c in columns]
        cells = [f"{'onedl ' if name.startswith('onedl') else ''}{pins[name]}" for name in named]
        pythons = sorted(PYTHONS[stack], key=lambda version: int(version[2:]))
        yield f"| `{stack}` | {pythons[0]} to {pythons[-1]} | {' | '.join(cells)} |"


def patch_list(_: str) -> Iterator[str]:
    """Yield what is replaced in other packages at run time."""
    from rfa_mmdet.compat.table import PATCHES

    for patch in PATCHES:
        when = "on import" if patch.on_import else "on request"
        yield f"- **`{patch.name}`**, {when}. Replaces {patch.target}."
        yield f"  Why: {patch.reason}. For {patch.versions}."


def message_heading(arguments: str) -> Iterator[str]:
    """Yield a message of the sources as a heading: the file, and words that are in it alone."""
    sys.path.insert(0, str(DOCS / "scripts"))
    from messages import message

    text = message(*arguments.split(" ", 1))
    yield f"##### `` {text} ``" if "`" in text else f"##### `{text}`"


WRITERS = {
    "message": message_heading,
    "help": help_text,
    "configs": config_table,
    "config": config_text,
    "methods": method_table,
    "stacks": stack_table,
    "patches": patch_list,
}


def filled(text: str) -> str:
    """Return a page with its marked parts rewritten."""

    def write(block: re.Match) -> str:
        return block[1] + "\n".join(WRITERS[block[2]](block[3])) + "\n"

    return BLOCK.sub(write, text)


def pages() -> list[Path]:
    """Return the pages that have marked parts."""
    return [p for p in sorted(DOCS.rglob("*.md")) if BLOCK.search(p.read_text(encoding="utf-8"))]


def main() -> None:
    """Rewrite all pages."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
