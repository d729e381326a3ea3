"""One config in every trainer: the same losses after a warm start and after resuming."""

import importlib.util
import sys
from pathlib import Path

import mmdet
import pandas as pd
import pytest
import torch

from tests.helpers.ports import free_port
from tests.helpers.retrofitted import save_plain_detector
from tests.helpers.run_logs import losses, weights

MMDET = Path(mmdet.__file__).parent / ".mim/tools/train.py"
# MMEngine's launcher needs CUDA, so create the group before; DDP must not get a device.
RUNNER = """
import sys
import torch
from mmengine.config import Config
from mmengine.runner import Runner
cfg = Config.fromfile(sys.argv[1])
cfg.work_dir, cfg.train_cfg.max_epochs = sys.argv[2], int(sys.argv[3])
cfg.resume = "resume" in sys.argv
cfg.load_from = None if cfg.resume else cfg.load_from
if "two" in sys.argv:
    torch.distributed.init_process_group("gloo")
    cfg.launcher, cfg.model_wrapper_cfg = "pytorch", dict(
        type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
Runner.from_cfg(cfg).train()
"""

# MMDetection's train.py as it is, in a group that exists before.
RANKS = """
import runpy
import sys
import torch
torch.distributed.init_process_group("gloo")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory):
    """Return the tiny detector, warm-started, with norms that train on batches."""
    root = tmp_path_factory.mktemp("any")
    save_plain_detector(tiny_config, root / "plain.pth")
    (root / "runner.py").write_text(RUNNER)
    (root / "ranks.py").write_text(RANKS)
    path = root / "any.py"
    path.write_text(
        f'_base_ = "{tiny_config}"\n'
        f'load_from = "{root}/plain.pth"\n'
        "model = dict(backbone=dict(norm_eval=False))\n"
        "train_cfg = dict(val_interval=99)\n"
    )
    return path


def command(trainer: str, config: Path, work: Path, epochs: int, *more: str) -> tuple:
    if trainer == "Runner":
        return (sys.executable, config.parent / "runner.py", config, work, epochs, *more)
    options = ("--work-dir", work, *(f"--{one}" for one in more))
    options += ("--cfg-options", f"train_cfg.max_epochs={epochs}")
    if trainer == "mim":
        program = (sys.executable, "-m", "mim", "train", "mmdet", config, "--gpus", 0)
        return (*program, "--launcher", "none", *options)
    return (sys.executable, MMDET if trainer == "mmdet" else "tools/train.py", config, *options)


@pytest.fixture(scope="module")
def whole(run_tool, config, tmp_path_factory):
    work = tmp_path_factory.mktemp("whole")
    done = run_tool(*command("ours", config, work, 7))
    assert done.returncode == 0, done.stdout
    return work


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["mmdet", "mim", "Runner"])
def test_all_trainers_start_continue_and_resume_identically(
    trainer, whole, config, run_tool, tmp_path
):
    if trainer == "mim" and importlib.util.find_spec("mim") is None:
        pytest.skip("openmim is not installed")
    for epochs, more in ((3, ()), (7, ("resume",))):
        # From OpenMMLab's own imports, which these trainers do not hide.
        done = run_tool(*command(trainer, config, tmp_path, epochs, *more), PYTHONWARNINGS="ignore")
        assert done.returncode == 0, done.stdout
    found, expected = losses(tmp_path), losses(whole)
    assert len(expected) == 21
    pd.testing.assert_series_equal(found, expected, check_exact=True)
    mine, theirs = weights(tmp_path / "epoch_7.pth"), weights(whole / "epoch_7.pth")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    # The warm-started statistics have moved from 0.
    norm = "backbone.layer2.0.conv1.norm"
    assert mine[f"{norm}.running_mean"].any()
    assert mine[f"{norm}.num_batches_tracked"] == 21


@pytest.mark.slow
def test_all_trainers_with_two_ranks_train_identically(config, run_tool, tmp_path):
    ours, runner, mmdets = (tmp_path / name for name in ("ours", "runner", "mmdet"))
    epochs = ("--cfg-options", "train_cfg.max_epochs=2")
    wrapper = [
        f"model_wrapper_cfg.{option}"
        for option in (
            "type=MMDistributedDataParallel",
            "device_ids=None",
            "broadcast_buffers=False",
        )
    ]
    mmdet_tool = (MMDET, config, "--launcher", "pytorch", "--work-dir", mmdets, *epochs, *wrapper)

    def run(*command) -> None:
        done = run_tool(*command, PORT=free_port(), PYTHONWARNINGS="ignore")
        assert done.returncode == 0, done.stdout

    def launch(*command) -> None:
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
        run(*torchrun, f"--master_port={free_port()}", *command)

    run("bash", "tools/dist_train.sh", config, 2, "--work-dir", ours, *epochs)
    launch(*command("Runner", config, runner, 2, "two")[1:])
    launch(config.parent / "ranks.py", *mmdet_tool)
    expected = weights(ours / "epoch_2.pth")
    for other in (runner, mmdets):
        pd.testing.assert_series_equal(losses(other), losses(ours), check_exact=True)
        found = weights(other / "epoch_2.pth")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
