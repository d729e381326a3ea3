"""Ctrl-C ends a tool, its workers too, with one word and the exit code of shells."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.reduction import DupFd
from pathlib import Path

import pytest

from rfa_mmdet.cli.command_line import user_errors
from tests.helpers.paths import ROOT


@pytest.fixture
def interrupted(environment, tmp_path):
    """Start a tool, interrupt it once it has printed ``mark``, and return what it printed."""

    def run(mark, tool, *arguments, **variables):
        log = tmp_path / "log.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-u", "-W", "ignore", f"tools/{tool}.py", *map(str, arguments)],
                cwd=ROOT,
                env={**environment, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                # As a terminal does it, with a group of processes that all get the signal. A
                # shell's background commands, such as these tests may be one of, ignore it.
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        try:
            until = time.monotonic() + 120
            while mark not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(timeout=60)
            printed = log.read_text()
            assert code == 130, printed
            assert printed.endswith("interrupted\n")
            assert "Traceback" not in printed
            # No worker is left, which would still be in the group.
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
        finally:
            process.kill()
            process.wait()
        return printed

    return run


def test_training_with_workers(interrupted, tiny_config, tmp_path):
    options = ("--cfg-options", "train_dataloader.num_workers=2", "train_cfg.max_epochs=50")
    work_dir = tmp_path / "run"
    printed = interrupted(*("[2][1/3]", "train", tiny_config, "--work-dir", work_dir, *options))
    assert "[50][1/3]" not in printed
    last = (work_dir / "last_checkpoint").read_text()
    assert last.endswith(".pth")
    assert os.path.getsize(last) > 0


def test_check_data(interrupted, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "data")
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    image = content["images"][0]
    content["images"] += [{**image, "id": i} for i in range(1000, 60_000)]  # seconds of work
    path.write_text(json.dumps(content))
    config = "configs/demo/retinanet_r18-rfaconv_fpn_6e_shapes.py"
    mark = "Using env variable `DATA_ROOT`"
    interrupted(mark, "check_data", config, "--out", tmp_path / "out", DATA_ROOT=str(root))
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
    while not any(task.read_text() for task in tasks.glob("*/children")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == "interrupted\n"


def hand_over(connection):
    """As a loader's worker hands over the memory of a tensor: a thread waits for its reader."""
    connection.send(DupFd(connection.fileno()))
    connection.recv()


def test_a_worker_is_silent_where_its_reader_goes_away(capfd):
    before = sys.excepthook
    ours, theirs = multiprocessing.Pipe()
    with user_errors():
        worker = multiprocessing.get_context("fork").Process(target=hand_over, args=(theirs,))
        worker.start()
    handle = ours.recv()
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(handle._id[0])
    # The thread goes on, so that it is done with the first reader once it has served another.
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


def misread():
    try:
        raise KeyboardInterrupt
    except BaseException as error:
        raise SyntaxError("cannot be formatted") from error


def test_an_interruption_that_a_library_took_for_its_own_error(capsys):
    with pytest.raises(SystemExit) as stop, user_errors():
        misread()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_errors_that_are_not_the_users_pass():
    with pytest.raises(RuntimeError, match="ours"), user_errors():
        raise RuntimeError("ours")
