"""Import rules, checked in the syntax tree of every file and in a bare process."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from rfa_mmdet.version import __version__
from tests.helpers.processes import PATIENCE
from tests.helpers.torch_features import LACKS_TRITON

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rfa_mmdet"
FILES = sorted(PACKAGE.rglob("*.py"))
OPENMMLAB = ("mmengine", "mmcv", "mmdet")
NEVER = ("mmpretrain", "mmdeploy", "mmyolo", "tools", "tests", "benchmarks")

# Modules that every file may import; they only import each other.
GROUND = {"cpus", "errors", "files", "texts", "version"}

# Package -> lower packages that it may import, and OpenMMLab's packages. From the design's table;
# comments explain differences.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "ops": (set(), set()),
    "layers": ({"ops"}, {"mmengine", "mmcv.cnn"}),
    "models": ({"layers"}, {"mmengine", "mmcv", "mmdet"}),
    "hooks": ({"layers"}, {"mmengine"}),
    # ops, here and in export: for differences between torch versions.
    "checkpoints": ({"ops", "layers", "models", "hooks"}, {"mmengine", "mmdet"}),
    # Above checkpoints, not below: it puts the safe loader that lives there into MMEngine.
    "compat": ({"layers", "checkpoints"}, {"mmengine", "mmdet"}),
    "data": (set(), {"mmengine", "mmcv", "mmdet"}),
    "config": ({"data", "layers"}, {"mmengine", "mmcv", "mmdet"}),
    "inference": ({"config", "checkpoints", "data"}, {"mmengine", "mmcv", "mmdet"}),
    # compat: the operator counts are next to the patch that adds them to MMDetection's tool.
    "analysis": ({"layers", "inference", "compat"}, {"mmengine", "mmcv", "mmdet"}),
    "export": ({"ops", "inference", "analysis"}, {"mmengine", "mmcv", "mmdet"}),
    "studies": ({"config", "inference", "data", "analysis"}, {"mmengine", "mmcv", "mmdet"}),
}
RULES["cli"] = (set(RULES), {"mmengine", "mmcv", "mmdet"})
# Files outside the packages.
TOP = {
    "cpus": set(),
    "errors": set(),
    "files": set(),
    "texts": set(),
    "version": set(),
    "__init__": set(RULES) - {"cli"},
    "__main__": {"cli"},
}


def imported(source: str, package: str) -> set[str]:
    """Return the dotted names of everything that a file in ``package`` imports, at any depth.

    ``from a import b`` gives 'a' and 'a.b', because b may be a module. Literal calls of
    import_module and __import__ count.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *filter(None, [node.module])]) if node.level else node.module
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("import_module", "__import__"):
                names.add(node.args[0].value)
    return names


def package_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).parent.parts)


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import mmdet.models as m", "rfa_mmdet.ops", {"mmdet.models"}),
        ("from mmdet import models", "rfa_mmdet.ops", {"mmdet", "mmdet.models"}),
        ("from .. import layers", "rfa_mmdet.ops", {"rfa_mmdet", "rfa_mmdet.layers"}),
        (
            "from ..layers import conv",
            "rfa_mmdet.ops",
            {"rfa_mmdet.layers", "rfa_mmdet.layers.conv"},
        ),
        ("from . import ema", "rfa_mmdet.ops", {"rfa_mmdet.ops", "rfa_mmdet.ops.ema"}),
        ("def f():\n    import mmcv", "rfa_mmdet.ops", {"mmcv"}),
        ("importlib.import_module('mmcv.cnn')", "rfa_mmdet.ops", {"mmcv.cnn"}),
        ("x = 'import mmcv'", "rfa_mmdet.ops", set()),
    ],
)
def test_imports_are_found(source, package, expected):
    assert imported(source, package) == expected


def test_rules_cover_every_package_without_cycles():
    rooms = {f.relative_to(PACKAGE).parts[0] for f in FILES if f.parent != PACKAGE}
    assert rooms == set(RULES)
    order = [*TopologicalSorter({room: below for room, (below, _) in RULES.items()}).static_order()]
    assert order[-1] == "cli"
    assert {f.stem for f in FILES if f.parent == PACKAGE} <= set(TOP)


def of_ours(names: set[str]) -> set[str]:
    """Return the packages or top-level files that contain dotted names of this package."""
    parts = (name.split(".") for name in names)
    return {p[1] for p in parts if p[0] == "rfa_mmdet" and len(p) > 1} & {*RULES, *TOP}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_file_imports_downward_only(file):
    room = file.relative_to(PACKAGE).parts[0]
    names = imported(file.read_text(), package_of(file))
    if file.parent == PACKAGE:
        allowed, openmmlab = TOP[file.stem], set()
    else:
        allowed, openmmlab = RULES[room]
    above = of_ours(names) - allowed - {room} - GROUND
    assert not above, f"{file.relative_to(ROOT)} imports {sorted(above)}"
    foreign = {
        name
        for name in names
        if name.split(".")[0] in {*OPENMMLAB, *NEVER}
        and not any(f"{name}.".startswith(f"{package}.") for package in openmmlab)
    }
    assert not foreign, f"{file.relative_to(ROOT)} imports {sorted(foreign)}"


def asked_of_torch(source: str) -> list[str]:
    """Return names that hasattr and getattr look up in torch or its modules."""
    return [
        node.args[1].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) in ("hasattr", "getattr")
        and ast.unparse(node.args[0]).split(".")[0] == "torch"
        and isinstance(node.args[1], ast.Constant)
    ]


def test_torch_versions_are_checked_in_one_file():
    assert asked_of_torch("hasattr(torch.library, 'a'), getattr(torch, name), hasattr(x, 'b')") == [
        "a"
    ]
    asking = {str(f.relative_to(PACKAGE)) for f in FILES if asked_of_torch(f.read_text())}
    assert asking == {"ops/common/torch_versions.py"}


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("from rfa_mmdet.cli import train", {"cli"}),
        ("from .. import layers, __version__", {"layers"}),
        ("import rfa_mmdet.ops.ema as e", {"ops"}),
        ("import rfa_mmdet", set()),
        ("from mmdet import models", set()),
    ],
)
def test_packages_of_imports_are_found(source, rooms):
    assert of_ours(imported(source, "rfa_mmdet.data")) == rooms


def test_ops_only_import_torch_numpy_and_the_standard_library():
    allowed = {*sys.stdlib_module_names, "torch", "triton", "numpy", "rfa_mmdet"}
    for file in FILES:
        if file.is_relative_to(PACKAGE / "ops"):
            tops = {n.split(".")[0] for n in imported(file.read_text(), package_of(file))}
            assert tops <= allowed, f"{file.relative_to(ROOT)} imports {sorted(tops - allowed)}"


# Hides OpenMMLab's packages, which are installed here.
BLOCK = f"""
import importlib.abc, importlib.machinery, sys

class Blocker(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {OPENMMLAB!r}:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path = [Blocker if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


def run(code: str, blocked: bool = True) -> str:
    code = (BLOCK if blocked else "") + code
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_ops_work_with_only_torch_installed():
    code = """
for name in ("mmengine", "mmcv", "mmdet"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit(f"{name} is not blocked")

import torch
import rfa_mmdet.ops.conam, rfa_mmdet.ops.ema
from rfa_mmdet.ops.receptive_field import rfa_conv

y = rfa_conv(torch.rand(2, 4, 8, 8), torch.rand(36, 1, 1, 1), torch.rand(36, 1, 3, 3),
             torch.rand(6, 4, 3, 3), norm=lambda f: f, act=torch.relu, padding=(1, 1))
print(tuple(y.shape))

import rfa_mmdet
messages = []
for name in ("compat", "hooks", "layers", "models"):
    try:
        getattr(rfa_mmdet, name)
    except ImportError as error:
        messages.append(str(error))
for message in messages:
    print(message)
try:
    rfa_mmdet.no_such_name
except AttributeError as error:
    print(error)
print(rfa_mmdet.__version__)
"""
    shape, *messages, no_such_name, version = run(code).split("\n")
    assert shape == "(2, 6, 8, 8)"
    for name, message in zip(("compat", "hooks", "layers", "models"), messages, strict=True):
        assert message == (
            f"rfa_mmdet.{name} needs mmengine, mmcv with compiled operators, and mmdet. "
            'mmengine is not installed: run `pip install "rfa_mmdet[openmmlab]"`'
        )
    assert "no_such_name" in no_such_name
    assert version == __version__


@pytest.mark.parametrize(
    "statement",
    ["import rfa_mmdet.layers", "from rfa_mmdet import layers", "from rfa_mmdet.layers import EMA"],
)
def test_importing_layers_names_missing_packages(statement):
    code = f"""
try:
    {statement}
except ImportError as error:
    print(type(error).__name__, error)
"""
    found = run(code)
    kind, _, message = found.partition(" ")
    assert kind in ("ImportError", "ModuleNotFoundError")
    assert any(name in message for name in OPENMMLAB)


def test_the_compiler_is_not_imported():
    # It would slow down the start of every tool.
    code = "import sys, rfa_mmdet; print('torch._dynamo' in sys.modules)"
    assert run(code, blocked=False) == "False"


def test_nothing_imports_pip():
    """Before Python 3.12, setuptools, which Inductor imports, cannot be imported after pip."""
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    rooms = {f: {name.split(".")[0] for name in imported(f.read_text("utf-8"), "")} for f in files}
    assert len(files) > 200
    assert not [file for file, names in rooms.items() if "pip" in names]


def test_ops_load_nothing_of_openmmlab_in_a_bare_process():
    # The first ones are torch operators, not Python modules.
    left_out = ["._cpu_", *([".triton."] if LACKS_TRITON else [])]
    code = (
        f"left_out = {left_out}"
        + """
import sys, types
package = types.ModuleType("rfa_mmdet")
package.__path__ = ["rfa_mmdet"]
sys.modules["rfa_mmdet"] = package  # without its __init__, which imports the rest
import importlib, pkgutil
for module in pkgutil.walk_packages(["rfa_mmdet/ops"], "rfa_mmdet.ops."):
    if any(part in module.name for part in left_out):
        continue
    importlib.import_module(module.name)
    print(module.name)
print(sorted(m for m in sys.modules if m.split(".")[0] in ("mmengine", "mmcv", "mmdet")))
print(sorted(m for m in sys.modules if m.startswith("rfa_mmdet.") and ".ops" not in m))
"""
    )
    *modules, openmmlab, others = run(code, blocked=False).split("\n")
    assert {"rfa_mmdet.ops.ema", "rfa_mmdet.ops.receptive_field.reference"} <= set(modules)
    assert openmmlab == "[]"
    assert others == "[]"
