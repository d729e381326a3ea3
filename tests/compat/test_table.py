"""The table of patches: selection by environment variable, and no replacements elsewhere."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import mmdet
import pytest

from rfa_mmdet.compat import PATCHES, apply
from rfa_mmdet.errors import UserError
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

PACKAGE = ROOT / "rfa_mmdet"
# Prints which patches are active, in a separate process. MMSegmentation's has a test of its own.
IN_FORCE = """
import rfa_mmdet
import torch
from mmengine.analysis import complexity_analysis
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.infer import BaseInferencer
from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner.checkpoint import CheckpointLoader
print(*(name for name, there in dict(
    safe_loading=all(
        hasattr(f, "__wrapped__")
        for f in (
            *(CheckpointLoader.load_checkpoint, torch.load, Runner.resume, FlexibleRunner.resume),
            *(CheckpointHook.before_train, BaseInferencer._init_model),
        )
    ),
    whole_files=type(get_file_backend("a.pth")) is not LocalBackend,
    torchvision_weights="rfa_mmdet" in CheckpointLoader._schemes["torchvision://"].__module__,
    flop_counts="aten::softmax" in complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS,
).items() if there))
"""


def run(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("", ["safe_loading", "whole_files", "torchvision_weights"]),
        ("-whole_files", ["safe_loading", "torchvision_weights"]),
        ("flop_counts, -safe_loading", ["whole_files", "torchvision_weights", "flop_counts"]),
        ("-safe_loading,-whole_files,-torchvision_weights,-flop_counts", []),
    ],
)
def test_environment_variable_switches_single_patches(choice, expected):
    done = run("-c", IN_FORCE, RFA_MMDET_COMPAT=choice)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_unknown_patch_name_fails_the_import():
    done = run("-c", "import rfa_mmdet", RFA_MMDET_COMPAT="-whole_file")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "rfa_mmdet.errors.UserError: RFA_MMDET_COMPAT='-whole_file': 'whole_file': no such patch; "
        "choose from safe_loading, whole_files, torchvision_weights, mmseg_plugins, flop_counts"
    )
    with pytest.raises(UserError, match="'nothing': no such patch"):
        apply("nothing")


def test_every_module_of_compat_is_in_the_table():
    modules = {path.stem for path in (PACKAGE / "compat").glob("*.py")} - {"__init__", "table"}
    assert {patch.name for patch in PATCHES} == modules
    for patch in PATCHES:
        assert patch.apply is import_module(f"rfa_mmdet.compat.{patch.name}").apply
        assert all((patch.target, patch.reason, patch.versions))


def test_get_flops_of_mmdetection_counts_our_layers_on_request(tiny_config, shapes):
    tool = Path(mmdet.__file__).parent / ".mim/tools/analysis_tools/get_flops.py"
    outputs = {}
    for choice in ("", "flop_counts"):
        command = (tool, tiny_config, "--num-images", "1")
        done = run(*command, DATA_ROOT=str(shapes), PYTHONPATH=str(ROOT), RFA_MMDET_COMPAT=choice)
        assert done.returncode == 0, done.stderr
        outputs[choice] = done.stdout + done.stderr
    for op in ("softmax", "avg_pool2d"):
        assert f"Unsupported operator aten::{op} " in outputs[""]
        assert f"aten::{op}" not in outputs["flop_counts"]


def test_our_own_tool_counts_without_that_patch():
    code = """
from mmengine.analysis import complexity_analysis
from rfa_mmdet.analysis.complexity import PUBLISHED, classifier_complexity
print(classifier_complexity(18, "RFAConv").agrees(PUBLISHED[18, "RFAConv"]))
print("aten::softmax" in complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS)
"""
    done = run("-c", code)
    assert done.stdout.split()[-2:] == ["True", "False"], done.stderr


# --- nothing is replaced outside -----------------------------------------------------------------

# (file, assigned name) -> why this is allowed.
ALLOWED = {
    ("cli/command_line.py", "sys.excepthook"): "restored when the tool ends",
    ("cli/command_line.py", "sys.unraisablehook"): "after Ctrl-C, when the process ends",
    ("__main__.py", "sys.argv"): "the tool's own arguments, in a process that runs nothing else",
    ("ops/receptive_field/triton/unroll.py", "linecache.cache"): "source for names of our own",
}
MUTATING = {"append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}


def dotted(node: ast.AST) -> str | None:
    """Return 'a.b' for a.b, a.b[0] and a.b(); None for what does not start with a name."""
    parts = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        else:
            return None
    return ".".join([node.id, *reversed(parts)])


def foreign_changes(source: str) -> set[str]:
    """Return what a file assigns, deletes or registers in modules and classes of other packages.

    Changes of os.environ and of this package's own modules are allowed.
    """
    tree = ast.parse(source)
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = (a for a in node.names if not a.name.startswith("rfa_mmdet"))
            foreign |= {a.asname or a.name.split(".")[0] for a in names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            ours = node.module.split(".")[0] == "rfa_mmdet"
            foreign |= set() if ours else {a.asname or a.name for a in node.names}

    def is_foreign(name: str | None) -> bool:
        root, _, rest = (name or "").partition(".")
        return root in foreign and bool(rest) and not name.startswith("os.environ")

    found = set()
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        for target in targets:
            each = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
            found |= {name for one in each if is_foreign(name := dotted(one))}
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func) or ""
        first = dotted(node.args[0]) if node.args else None
        if called in ("setattr", "delattr") and first and first.split(".")[0] in foreign:
            found.add(first)
        private = any(part.startswith("_") for part in called.split(".")[1:])
        if private and called.rpartition(".")[2] in MUTATING and is_foreign(called):
            found.add(called.rpartition(".")[0])
        forced = any(k.arg == "force" and getattr(k.value, "value", 1) for k in node.keywords)
        if called.rpartition(".")[2].startswith("register") and forced:
            found.add(called)
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.load = None", {"torch.load"}),
        ("from a import B as C\nC.f = C.g = 1", {"C.f", "C.g"}),
        ("import a.b\na.b.c[0] += 1", {"a.b.c"}),
        ("import a\nold, a.f = a.f, None", {"a.f"}),
        ("import a\ndel a.f", {"a.f"}),
        ("import a\nsetattr(a, 'f', 1)", {"a"}),
        ("import a\na._TABLE.setdefault('x', 1)", {"a._TABLE"}),
        (
            "from a import register_backend\nregister_backend('b', 1, force=True)",
            {"register_backend"},
        ),
        ("from a import M\n@M.register_module(force=True)\nclass X: ...", {"M.register_module"}),
        ("from a import M\n@M.register_module(force=False)\nclass X: ...", set()),
        ("import os\nos.environ['A'] = '1'", set()),
        ("from rfa_mmdet import ops\nops.f = 1", set()),
        ("import a\nx = a.f()\nx.y = 1\na = 1", set()),
    ],
)
def test_changes_of_other_packages_are_found(source, expected):
    assert foreign_changes(source) == expected


def test_compat_itself_is_found():
    found = [foreign_changes(path.read_text()) for path in (PACKAGE / "compat").glob("*.py")]
    assert len([names for names in found if names]) == len(PATCHES)


def test_nothing_else_changes_other_packages():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith("compat/"):
            found |= {(name, what) for what in foreign_changes(path.read_text())}
    assert found == set(ALLOWED)
