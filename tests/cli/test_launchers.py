"""Slurm and MPI launchers on CPUs, with real Slurm and OpenMPI."""

import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from mmengine.config import Config

from rfa_mmdet.cli.command_line import run_parser
from rfa_mmdet.cli.distributed import launched_rank, prepare_group
from rfa_mmdet.errors import ConfigError

ONE_EPOCH = ("--cfg-options", "train_cfg.max_epochs=1")
# 12 images, batches of 4, two processes.
BY_TWO = "[1][2/2]"


@pytest.fixture(scope="module")
def slurm(cluster, run_tool):
    """Run a tool in the cluster, in two processes."""

    def run(tool, *arguments, **variables):
        variables = {**cluster.environment, "GPUS": "2", **variables}
        return run_tool("bash", f"tools/slurm_{tool}.sh", "part", "a job", *arguments, **variables)

    return run


@pytest.mark.parametrize("option", ["--local-rank=1", "--local_rank=1"])
def test_option_of_old_launchers_is_accepted(option):
    """``torch.distributed.launch``, which ``mim train`` starts, passes it to each process."""
    args = run_parser("A tool.", "tool.py config.py").parse_args(["config.py", option])
    assert args.config == "config.py"


@pytest.mark.slow
def test_slurm_scripts(slurm, tiny_config, tmp_path):
    folder = tmp_path / "a folder of $HOME's"
    folder.mkdir()
    config = shutil.copy(tiny_config, folder / "a config.py")
    # In parallel: they share the first node, and must not use the same port.
    jobs = {
        "two nodes": dict(GPUS_PER_NODE="1"),
        "one node": dict(SRUN_ARGS="--gres=none --nodelist=rfa1 --time=10"),
    }

    def train(name):
        return slurm("train", config, "--work-dir", folder / name, *ONE_EPOCH, **jobs[name])

    with ThreadPoolExecutor() as pool:
        for name, done in zip(jobs, pool.map(train, jobs), strict=True):
            assert done.returncode == 0, done.stdout
            assert BY_TWO in done.stdout
            assert (folder / name / "epoch_1.pth").is_file()
    checkpoint = folder / "two nodes" / "epoch_1.pth"
    tested = slurm("test", config, checkpoint, "--work-dir", folder / "test")
    assert tested.returncode == 0, tested.stdout
    # 4 images, two processes.
    assert "[2/2]" in tested.stdout
    assert "coco/bbox_mAP" in tested.stdout


@pytest.mark.slow
def test_slurm_reports_an_error(slurm, tiny_config, tmp_path):
    wrong = ("--cfg-options", "model.bbox_head.num_classes=9")
    done = slurm("train", tiny_config, "--work-dir", tmp_path, *wrong)
    assert done.returncode != 0  # 1, or 143 from the rank that Slurm then ended
    assert "error: model.bbox_head.num_classes=9" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_batch_script_is_not_a_rank(cluster, monkeypatch, tmp_path):
    # With these variables, a run without srun would wait for a second rank.
    said = tmp_path / "said.txt"
    job = ("--partition=part", "--ntasks=2", f"--output={said}", "--wrap=env")
    cluster.run("sbatch", "--wait", *job)
    for line in said.read_text().splitlines():
        if line.startswith("SLURM_"):
            monkeypatch.setenv(*line.split("=", 1))
    with pytest.raises(
        ConfigError, match="SLURM_STEP_ID not set: this process was not started by slurm"
    ):
        launched_rank("slurm")


@pytest.mark.slow
def test_mpi_launcher(run_tool, tiny_config, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed: apt-get install openmpi-bin")
    done = run_tool(
        *("mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", 2),
        *(sys.executable, "tools/train.py", tiny_config, "--launcher", "mpi"),
        *("--work-dir", tmp_path, *ONE_EPOCH),
    )
    assert done.returncode == 0, done.stdout
    assert BY_TWO in done.stdout
    assert (tmp_path / "epoch_1.pth").is_file()


@pytest.fixture
def two_machines(monkeypatch):
    """Set mpirun's variables for the first of two processes on two machines."""
    for name, value in dict(RANK=0, SIZE=2, LOCAL_RANK=0, LOCAL_SIZE=1).items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))


def test_mpi_on_two_machines_needs_an_address(two_machines, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="mpirun with -x MASTER_ADDR="):
        prepare_group(Config(dict(launcher="mpi")))


@pytest.mark.parametrize("port", ["of another job", "70000", "here"])
def test_unavailable_port(two_machines, monkeypatch, port):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1]) if port == "of another job" else port
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: .* free port of 127.0.0.1"):
            prepare_group(Config(dict(launcher="mpi")))


@pytest.mark.parametrize("script", ["dist_train", "dist_test", "slurm_train", "slurm_test"])
def test_scripts_without_arguments_print_their_usage(run_tool, script):
    done = run_tool("bash", f"tools/{script}.sh")
    assert done.returncode == 2
    assert f"bash tools/{script}.sh" in done.stdout


@pytest.mark.parametrize("variable", ["GPUS", "GPUS_PER_NODE", "CPUS_PER_TASK"])
@pytest.mark.parametrize("script", ["slurm_train", "slurm_test"])
def test_invalid_number(run_tool, script, variable):
    done = run_tool("bash", f"tools/{script}.sh", *"pjcx", **{variable: "two"})
    assert done.returncode == 2
    assert done.stdout == f"error: {variable}='two': must be an integer of at least 1\n"
