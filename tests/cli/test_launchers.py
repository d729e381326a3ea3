"""Slurm's and MPI's launchers on a CPU: their programs are stood in for, the processes are real."""

import os
import stat
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.ports import free_port
from tests.helpers.processes import PATIENCE

# Starts its command as two tasks of one node, with what Slurm tells each.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$SRUN_LOG"
while [ "$1" != "$PYTHON" ]; do shift; done
export SLURM_NTASKS=2 SLURM_NODELIST=node1
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node1" ] && echo 127.0.0.1
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
def test_slurm_scripts(tiny_config, run_tool, tmp_path):
    executable(tmp_path / "srun", SRUN)
    executable(tmp_path / "scontrol", SCONTROL)
    variables = dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SRUN_LOG=str(tmp_path / "log"),
        GPUS="2",
        SRUN_ARGS="--quiet --time 1",
    )
    trained = run_tool(
        *("bash", "tools/slurm_train.sh", "part", "job", tiny_config),
        *("--work-dir", tmp_path / "work", "--cfg-options", "train_cfg.max_epochs=1"),
        **variables,
        MASTER_PORT=free_port(),
    )
    assert trained.returncode == 0, trained.stdout
    checkpoint = tmp_path / "work" / "epoch_1.pth"
    # 12 images, batches of 4, two processes.
    assert "[1][2/2]" in trained.stdout
    tested = run_tool(
        *("bash", "tools/slurm_test.sh", "part", "job", tiny_config, checkpoint),
        *("--work-dir", tmp_path / "test"),
        **variables,
        MASTER_PORT=free_port(),
    )
    assert tested.returncode == 0, tested.stdout
    assert "coco/bbox_mAP" in tested.stdout
    call = (tmp_path / "log").read_text()
    for part in ("--partition part", "--job-name job", "--ntasks 2", "--gres gpu:2", "--time 1"):
        assert part in call


@pytest.mark.slow
def test_mpi_launcher(tiny_config, environment, tmp_path):
    command = (
        *(sys.executable, "tools/train.py", str(tiny_config), "--launcher", "mpi"),
        *("--work-dir", str(tmp_path), "--cfg-options", "train_cfg.max_epochs=1"),
    )
    port = free_port()
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **environment,
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
                "OMPI_COMM_WORLD_SIZE": "2",
                "MASTER_PORT": port,
            },
        )
        for rank in (0, 1)
    ]
    for process in processes:
        output = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, output
    assert (tmp_path / "epoch_1.pth").is_file()


@pytest.mark.parametrize("script", ["dist_train", "dist_test", "slurm_train", "slurm_test"])
def test_scripts_without_arguments_say_how_they_are_called(run_tool, script):
    done = run_tool("bash", f"tools/{script}.sh")
    assert done.returncode == 2
    assert f"bash tools/{script}.sh" in done.stdout
