"""Ctrl-C ends a tool and its workers with one word and the usual exit status."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.reduction import DupFd
from pathlib import Path

import pytest

from rfa_mmdet.cli.command_line import user_errors
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE, wait_until


def is_alive(group):
    """Return whether a process group has processes."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def interrupted(environment, tmp_path):
    """Start a tool, and interrupt it once ``started`` is true for its output."""

    def run(started, tool, *arguments, **variables):
        log = tmp_path / "log.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-u", "-W", "ignore", f"tools/{tool}.py", *map(str, arguments)],
                cwd=ROOT,
                env={**environment, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                # As a terminal does it: the whole process group gets the signal. Background
                # commands of a shell, which these tests may be, ignore it.
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        try:
            wait_until(lambda: started(log.read_text()), process, log.read_text)
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(timeout=PATIENCE)
            printed = log.read_text()
            assert code == 130, printed
            assert printed.endswith("interrupted\n")
            assert "Traceback" not in printed
            # No worker is left, which would still be in the group.
            wait_until(lambda: not is_alive(process.pid), printed=log.read_text)
        finally:
            if is_alive(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return run


@pytest.mark.slow
def test_training_with_workers(interrupted, tiny_config, tmp_path):
    # More epochs than there is time for.
    options = ("--cfg-options", "train_dataloader.num_workers=2", "train_cfg.max_epochs=100000")
    work_dir = tmp_path / "run"
    command = ("train", tiny_config, "--work-dir", work_dir, *options)
    interrupted(lambda printed: "[2][1/3]" in printed, *command)
    last = (work_dir / "last_checkpoint").read_text()
    assert last.endswith(".pth")
    assert os.path.getsize(last) > 0


# Never finishes reading an image, like a disk that does not respond.
HOLD = """
import time
import mmcv

def hold(content):
    print("held", flush=True)
    time.sleep(10_000)

mmcv.imfrombytes = hold
"""


def test_check_data(interrupted, environment, shapes, tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    base = ROOT / "configs" / "demo" / "atss_r18-rfaconv_fpn_8e_shapes.py"
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(base)!r}\ncustom_imports = dict(imports=['rfa_mmdet', 'hold'])"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
    command = ("check_data", config, "--out", tmp_path / "out")
    interrupted(lambda printed: "held" in printed, *command, DATA_ROOT=str(shapes), PYTHONPATH=path)
    assert not (tmp_path / "out").exists()


def test_doctor(environment):
    process = subprocess.Popen(
        [sys.executable, "-u", "tools/doctor.py"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    tasks = Path(f"/proc/{process.pid}/task")
    if not (tasks / str(process.pid) / "children").exists():
        process.kill()
        pytest.skip("this system does not tell the children of a process")
    wait_until(lambda: any(task.read_text() for task in tasks.glob("*/children")), process)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert printed == "interrupted\n"


def hand_over(connection):
    """Send a tensor like a dataloader worker: a thread waits for its reader."""
    connection.send(DupFd(connection.fileno()))
    connection.recv()


def test_worker_is_silent_if_its_reader_dies(capfd):
    before = sys.excepthook
    ours, theirs = multiprocessing.Pipe()
    with user_errors():
        worker = multiprocessing.get_context("fork").Process(target=hand_over, args=(theirs,))
        worker.start()
    handle = ours.recv()
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(handle._id[0])
    # The thread continues, so it is done with the first reader once it has served another.
    os.close(handle.detach())
    ours.send("end")
    worker.join()
    assert worker.exitcode == 0
    assert sys.excepthook is before
    assert capfd.readouterr().err == ""


def test_other_uncaught_errors_are_shown(run_tool, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from rfa_mmdet.cli.command_line import user_errors\n"
        "with user_errors():\n    raise ConnectionResetError('of the main process')\n"
    )
    done = run_tool(sys.executable, script)
    assert done.returncode == 1
    assert "Traceback" in done.stdout
    assert done.stdout.endswith("ConnectionResetError: of the main process\n")


def test_half_initialized_objects_are_silent(run_tool, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from rfa_mmdet.cli.command_line import user_errors\n"
        "class Half:\n    def __del__(self):\n        self.missing\n"
        "with user_errors():\n    half = Half()\n    raise KeyboardInterrupt\n"
    )
    done = run_tool(sys.executable, script)
    assert done.returncode == 130
    assert done.stdout == "interrupted\n"


def misread():
    try:
        raise KeyboardInterrupt
    except BaseException as error:
        raise SyntaxError("cannot be formatted") from error


def test_interruption_wrapped_by_a_library(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored afterwards
    with pytest.raises(SystemExit) as stop, user_errors():
        misread()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_internal_errors_propagate():
    with pytest.raises(RuntimeError, match="ours"), user_errors():
        raise RuntimeError("ours")
