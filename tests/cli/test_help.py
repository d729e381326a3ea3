"""Every tool has --help with an example whose files exist, and a README entry."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rfa_mmdet.cli import find_tools
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Modules that tools only import do not read a command line.
TOOLS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("tools/**/*")
    if path.suffix == ".sh" or (path.suffix == ".py" and "__main__" in path.read_text())
)


def test_tools_are_found():
    scripts = {"dist_train", "dist_test", "slurm_train", "slurm_test"}
    assert {Path(tool).stem for tool in TOOLS} == {*find_tools(), *scripts, "setup_env"}


@pytest.mark.parametrize("tool", TOOLS)
def test_help(tool, capsys, monkeypatch):
    if tool.endswith(".sh"):
        done = subprocess.run(
            ["bash", tool, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        text = done.stdout
    else:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [tool, "--help"])
        monkeypatch.syspath_prepend(str((ROOT / tool).parent))  # as of a script
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(tool, run_name="__main__")
        assert stop.value.code == 0
        text = capsys.readouterr().out
    example = text[text.lower().rindex("example") :]
    assert tool in example or "make demo" in example
    for config in re.findall(r"configs/\S+\.py", example):
        assert (ROOT / config).is_file()
    for option in re.findall(r"(?<=\s)--[a-z-]+", example):
        assert option in text[: text.rindex(example)]
    assert f"`{tool}" in README


@pytest.mark.parametrize("arguments", [[], ["config.py"], ["config.py", "weights.pth"]])
@pytest.mark.parametrize("script", [tool for tool in TOOLS if tool.endswith(".sh")])
def test_too_few_arguments_of_a_script_print_its_usage(script, arguments):
    if script == "tools/dist_train.sh" and len(arguments) == 2:
        pytest.skip("these are enough, if not right")
    done = subprocess.run(["bash", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"bash {script} " in done.stderr


@pytest.mark.parametrize(
    "arguments", [["train", "config.py", "--resume"], ["test", "config.py", "weights.pth", "0"]]
)
def test_invalid_number_of_processes(arguments):
    tool, *rest = arguments
    done = subprocess.run(
        ["bash", f"tools/dist_{tool}.sh", *rest], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (f"error: PROCESSES='{rest[-1]}': must be a number, auto, gpu or cpu\n")
