"""tools/setup_env.py: its checks, skipped steps, and parsing of build output."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.environment import Environment, load_script, make_python, version
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

SCRIPT = ROOT / "tools" / "setup_env.py"
# From a real build of mmcv, without compiler flags and repeated notes.
BUILD_LOG = """\
  Compiling mmcv._ext only with CPU
  building 'mmcv._ext' extension
  [1/3] c++ -MMD -MF mmcv/ops/csrc/pytorch/active_rotated_filter.o.d -g0 -fPIC -std=c++17
  In file included from torch/include/c10/core/InferenceMode.h:4,
  torch/include/c10/core/AutogradState.h:89:33: warning: default member initializers [-Wc++20]
     89 |   bool view_replay_enabled_ : 1 = false;
  [2/3] c++ -MMD -MF mmcv/ops/csrc/pytorch/assign_score_withk.o.d -g0 -Werror=format-security
  [3/3] c++ -MMD -MF mmcv/ops/csrc/pytorch/ball_query.o.d -g0 -fPIC -std=c++17
  Created wheel for mmcv: filename=mmcv-2.1.0-cp311-cp311-linux_x86_64.whl
"""


@pytest.fixture(scope="module")
def tool():
    return load_script(SCRIPT)


NO_HEADERS = "import sysconfig\nsysconfig.get_path = lambda name: '/none'"
HERE = "{}.{}".format(*sys.version_info[:2])


def make_venv(tool, folder):
    """Create what looks like a finished environment."""
    make_python(folder)
    (folder / tool.STAMP).write_text(tool.Setup(folder).stamp())
    return folder


@pytest.fixture
def command(tmp_path):
    """Return a function that starts the script as users do, with an empty wheel cache."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": "true"}

    def start(*args, **extra_env):
        return subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, args)],
            env={**env, **extra_env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def refusal(process):
    """Return the one error a process ended with."""
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, out + error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_missing_python_raises(command, tmp_path):
    error = refusal(command("--venv", tmp_path / "venv", "--python", tmp_path / "none"))
    assert "needs Python 3.10, 3.11 or 3.12" in error
    assert f"{tmp_path / 'none'} does not run: No such file or directory" in error
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("numbers", [(3, 9, 18), (3, 13, 0)])
def test_unsupported_python_raises(command, tmp_path, numbers):
    python = make_python(tmp_path / "other", version(*numbers))
    error = refusal(command("--venv", tmp_path / "venv", "--python", python))
    assert f"{python} is Python 3.{numbers[1]}\n" in error
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("changes", "modules", "advice"),
    [("", ["ensurepip"], "apt install python3-venv"), (NO_HEADERS, [], "python3-dev")],
)
def test_incomplete_python_raises(command, tmp_path, changes, modules, advice):
    python = make_python(tmp_path / "other", changes, modules)
    assert advice in refusal(command("--venv", tmp_path / "venv", "--python", python))


def test_first_suitable_python_is_used(tool, tmp_path):
    old = make_python(tmp_path / "old", version(3, 9, 18))
    right = make_python(tmp_path / "right")
    assert tool.find_python([str(old), str(right)], "current", False) == (str(right), HERE)


def test_headers_and_compiler_are_not_needed_with_a_cached_wheel(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    python = make_python(tmp_path / "other", NO_HEADERS)
    setup = tool.Setup(tmp_path / "venv", str(python))
    with pytest.raises(tool.SetupError, match=r"no C\+\+ compiler"):
        setup.choose_python()
    (tool.cache_root() / f"{setup.key}-{setup.torch}+cpu-cp311-cpu").mkdir(parents=True)
    setup.choose_python()
    assert setup.version == HERE
    with pytest.raises(tool.SetupError, match=r"no C\+\+ compiler"):
        tool.Setup(tmp_path / "venv", str(python), stack="onedl").choose_python()


def test_missing_compiler_is_reported_first(command, tmp_path):
    error = refusal(command("--venv", tmp_path / "venv", CXX="/none/c++"))
    assert "/none/c++" in error
    assert "apt install g++" in error
    assert not (tmp_path / "venv").exists()


def test_unrelated_folder_is_left_alone(tool, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(tool.SetupError, match="not a virtual environment"), tool.locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_python_must_match_the_environment(command, tool, tmp_path):
    folder = make_venv(tool, tmp_path / "venv")
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "sitecustomize.py").write_text(version(3, 10, 1))
    python = make_python(tmp_path / "other", version(3, 12, 1))
    error = refusal(command("--venv", folder, "--python", python))
    assert f"{folder} has Python 3.10, not the version of {python}" in error
    assert f"Remove {folder} or choose another --venv" in error


def test_check_prints_the_doctors_findings(command, tmp_path):
    sick = Environment(tmp_path / "venv")
    process = command("--check", sick.python, PYTHONPATH="")
    assert process.communicate(timeout=PATIENCE)[0] == "OK: training can start on the CPU\n"
    sick.add("rfa_mmdet", files={"__init__": "raise SyntaxError('a slip')"})
    process = command("--check", sick.python, PYTHONPATH="")
    assert "training cannot start" in process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0  # the environment is fine: tests and lint can run in it
    sick.add("torch", files={"__init__": "raise ImportError('no such driver')"})
    error = refusal(command("--check", sick.python, PYTHONPATH=""))
    assert f"{sick.python} cannot train:" in error
    assert "error: torch does not work: ImportError: no such driver" in error
    assert "fix: make -C " in error


def test_check_excludes_other_options(command):
    process = command("--check", sys.executable, "--force")
    assert "cannot be combined with other options" in process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 2


def test_valid_stamp_skips_all_steps(command, tool, tmp_path):
    folder = make_venv(tool, tmp_path / "venv")
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("#!/bin/sh\necho called >> $0.calls\n")
    process = command("--venv", folder)
    assert process.communicate(timeout=PATIENCE) == (f"{folder} is up to date\n", "")
    assert process.returncode == 0
    assert not (folder / "bin" / "python.calls").exists()


@pytest.mark.parametrize("change", ["requirements", "python", "interpreter", "force"])
def test_outdated_stamp_is_detected(tool, tmp_path, change, monkeypatch):
    venv = make_venv(tool, tmp_path / "venv")
    if change == "requirements":
        more = tmp_path / "requirements"
        shutil.copytree(tool.REQUIREMENTS, more)
        (more / "common.txt").write_text("six==1.17.0\n")
        monkeypatch.setattr(tool, "REQUIREMENTS", more)
    setup = tool.Setup(venv, force=change == "force")
    if change == "python":
        (venv / "pyvenv.cfg").write_text("version = 3.12.1\n")
    elif change == "interpreter":
        (venv / "bin" / "python").unlink()
    assert not setup.is_done()


def test_second_set_up_waits_for_the_first(command, tool, tmp_path):
    venv = make_venv(tool, tmp_path / "venv")
    stamp = (venv / tool.STAMP).read_text()
    (venv / tool.STAMP).unlink()
    with tool.locked(venv):
        process = command("--venv", venv)
        assert "waiting for another set-up" in process.stdout.readline()
        (venv / tool.STAMP).write_text(stamp)
    out, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, error) == (0, "")
    assert "[1/5]" not in out


def test_progress_is_plain_lines_without_a_terminal(tool):
    out, times = io.StringIO(), iter([0, 10, 20, 30])
    tool.show_progress(BUILD_LOG.splitlines(), out, lambda: next(times))
    assert [line.strip() for line in out.getvalue().splitlines()] == [
        "1/3 files, 10 s, about 20 s left",
        "2/3 files, 20 s, about 10 s left",
        "3/3 files, 30 s, about 0 s left",
    ]


def test_progress_is_sparse_without_a_terminal(tool):
    lines, times = [f"[{i}/100] c++" for i in range(1, 101)], iter(range(101))
    out = io.StringIO()
    tool.show_progress(lines, out, lambda: next(times))
    assert len(out.getvalue().splitlines()) == 10


def test_progress_rewrites_one_line_on_a_terminal(tool):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    tool.show_progress(BUILD_LOG.splitlines(), out)
    assert out.getvalue().count("\r") == 3
    assert out.getvalue().count("\n") == 1
    assert "[" + "#" * 30 + "] 3/3" in out.getvalue()


def test_errors_are_extracted_from_a_log(tool):
    error = "nms.cpp:3:1: error: 'x' was not declared in this scope"
    assert tool.log_errors(BUILD_LOG + error + "\n  note: in expansion\n") == error
    assert tool.log_errors(BUILD_LOG, count=1).startswith("Created wheel")


def test_failed_build_reports_its_log_and_error(tool, tmp_path):
    log = tmp_path / "mmcv.log"
    script = "echo 'c++: fatal error: Killed'; echo done; exit 1"
    with pytest.raises(tool.SetupError, match="fatal error: Killed") as caught:
        tool.run_build(["sh", "-c", script], dict(os.environ), log)
    assert str(log) in str(caught.value)
    assert log.read_text().endswith("done\n")


def test_job_count_follows_max_jobs_or_the_machine(tool, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert tool.job_count() == 3
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(tool.SetupError, match="MAX_JOBS"):
        tool.job_count()
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= tool.job_count() <= len(os.sched_getaffinity(0))


@pytest.fixture
def mmcv_step(tool, tmp_path, monkeypatch):
    """Return a set-up at the mmcv step; tests set the torch that it finds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    setup = tool.Setup(tmp_path / "venv")
    setup.version, setup.mmcv_version = "3.11", "2.1.0"
    setup.facts = {"version": "2.13.0+cpu", "cuda": None, "cuda_home": None, "archs": []}
    monkeypatch.setattr(tool, "ask", lambda python, code: json.dumps(setup.facts))
    monkeypatch.setattr(setup, "mmcv_problem", lambda cuda: "it is not there")
    return setup


def test_broken_cached_wheel_is_rebuilt(tool, mmcv_step, monkeypatch):
    kept = tool.cache_root() / "2.1.0-2.13.0+cpu-cp311-cpu" / "mmcv-2.1.0-cp311.whl"
    kept.parent.mkdir(parents=True)
    kept.write_text("broken")

    def build(work, cuda):
        (work / "dist").mkdir(parents=True)
        (work / "dist" / kept.name).write_text("sound")
        return work / "dist" / kept.name

    monkeypatch.setattr(mmcv_step, "build_wheel", build)
    problems = {"broken": "undefined symbol", "sound": None}
    monkeypatch.setattr(mmcv_step, "install_wheel", lambda path, _: problems[path.read_text()])
    mmcv_step.install_mmcv()
    assert [path.read_text() for path in kept.parent.iterdir()] == ["sound"]
    assert list((mmcv_step.venv / "build").iterdir()) == []


def test_gpu_without_nvcc_gives_instructions(tool, mmcv_step, tmp_path):
    cuda_home = str(tmp_path / "no_cuda")
    mmcv_step.facts.update(version="2.13.0+cu130", cuda="13.0", cuda_home=cuda_home, archs=["9.0"])
    with pytest.raises(tool.SetupError, match=r"toolkit 13\.0") as caught:
        mmcv_step.install_mmcv()
    assert "CUDA_VISIBLE_DEVICES= make env" in str(caught.value)


def test_cuda_cannot_be_forced_on_a_cpu_torch(tool, mmcv_step, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(tool.SetupError, match="has no CUDA"):
        mmcv_step.install_mmcv()


def test_mmcv_without_cuda_operators_is_rejected_with_a_gpu(tool, tmp_path, monkeypatch):
    setup = tool.Setup(tmp_path / "venv")
    monkeypatch.setattr(tool, "ask", lambda *_: '["2.1.0", "not available"]')
    assert setup.mmcv_problem(cuda=False) is None
    assert "CUDA" in setup.mmcv_problem(cuda=True)
    setup.mmcv_version = "2.1.1"
    assert "2.1.0" in setup.mmcv_problem(cuda=False)
