"""tools/setup_env.py: differences between the stacks."""

import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tests.helpers.environment import Environment, load_script, make_python, version
from tests.helpers.paths import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


@pytest.fixture(scope="module")
def tool():
    return load_script(ROOT / "tools" / "setup_env.py")


def test_prebuilt_needs_python_3_10_or_3_11(tool, tmp_path, monkeypatch):
    python = make_python(tmp_path / "other", version(3, 12, 1))
    assert tool.find_python([str(python)], "current", False) == (str(python), "3.12")
    with pytest.raises(tool.SetupError, match=r"needs Python 3\.10 or 3\.11"):
        tool.find_python([str(python)], "prebuilt", False)
    # From pyenv, which are not on PATH by default.
    found = tmp_path / "pyenv" / "versions" / "3.10.1" / "bin" / "python3.10"
    found.parent.mkdir(parents=True)
    found.symlink_to(sys.executable)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", "/none")
    assert tool.python_candidates("prebuilt") == [str(found), sys.executable]
    assert tool.python_candidates("current") == [sys.executable, str(found)]


def test_unknown_stack_raises(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--stack", "newest"])
    assert "--stack {current,prebuilt,onedl,tasks,mmyolo}" in capsys.readouterr().err
    done = subprocess.run(["make", "env", "STACK=newest"], cwd=ROOT, capture_output=True, text=True)
    assert 'STACK must be current, prebuilt, onedl, tasks or mmyolo, not "newest"' in done.stderr


@pytest.mark.parametrize("stack", ["current", "prebuilt", "onedl", "tasks", "mmyolo"])
def test_stack_pins_one_version_per_python(tool, stack):
    """pip sees one version per package, and the same packages for every Python."""
    names = []
    for python in tool.STACKS[stack]:
        found = []
        for line in tool.read_pins(stack).splitlines():
            if not line.startswith("#") and line:
                pin = Requirement(line)
                assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
                if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                    found.append(pin.name)
        assert len(found) == len(set(found))
        names.append(set(found))
    assert all(found == names[0] for found in names)
    setup = tool.Setup(ROOT, stack=stack)
    assert {*tool.BUILD_TOOLS, "torch", setup.mmcv} < names[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # Those with a stack of their own, and the others.
    apart = {"tasks": ("mmpretrain", "mmseg", "timm"), "mmyolo": ("mmyolo",)}
    for name in apart.get(stack, ()):
        assert {Requirement(line).name for line in extras[name]} <= names[0]
    for name in sum(apart.values(), ()):
        del extras[name]
    if stack != "current":
        return
    wanted = {Requirement(line).name for lines in extras.values() for line in lines}
    assert wanted - {"rfa_mmdet"} <= names[0]


def test_mmyolo_accepts_the_mmcv_of_its_stack(tool, tmp_path):
    file = tmp_path / "lib/python3.12/site-packages/mmyolo/__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text("mmcv_minimum_version = '2.0.0rc4'\nmmcv_maximum_version = '2.1.0'\n")
    for _ in range(2):  # the step may run again
        tool.accept_mmcv(tmp_path)
        lines = file.read_text().splitlines()
        assert lines == ["mmcv_minimum_version = '2.0.0rc4'", "mmcv_maximum_version = '2.2.0'"]


MIM = """
import pathlib, sys
assert {"install", "mmcv==2.1.0", "--no-deps", "--only-binary"} < set(sys.argv), sys.argv
site = pathlib.Path(__file__).parents[1]
(site / "index").rename(site / "mmcv")
"""


def test_openmmlabs_own_mmcv_is_used_if_mim_finds_one(tool, tmp_path, capsys):
    there = Environment(tmp_path / "venv", "mmcv")
    (there.site / "mmcv").rename(there.site / "index")
    (there.site / "mim").mkdir()
    (there.site / "mim" / "__main__.py").write_text(MIM)
    setup = tool.Setup(tmp_path / "venv", stack="prebuilt")
    assert setup.fetch_mmcv(cuda=False)
    assert capsys.readouterr().out == ""
    shutil.rmtree(there.site / "mmcv")  # and now there is none
    assert not setup.fetch_mmcv(cuda=False)
    assert capsys.readouterr().out.count("\n") == 1


def test_wheels_of_a_fork_are_cached_separately(tool, tmp_path):
    keys = {stack: tool.Setup(tmp_path, stack=stack).key for stack in tool.STACKS}
    assert keys["current"] == keys["prebuilt"] == keys["tasks"] == "2.1.0"  # torch follows
    assert keys["onedl"].startswith("onedl-mmcv-")
