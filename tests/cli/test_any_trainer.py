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
RUNNER = """
import os
import sys
from mmengine.config import Config
from mmengine.runner import Runner
cfg = Config.fromfile(sys.argv[1])
cfg.work_dir, cfg.train_cfg.max_epochs = sys.argv[2], int(sys.argv[3])
cfg.resume = "resume" in sys.argv
cfg.load_from = None if cfg.resume else cfg.load_from
cfg.launcher = "pytorch" if "WORLD_SIZE" in os.environ else "none"
Runner.from_cfg(cfg).train()
"""

# MMEngine's launcher needs CUDA, so the config creates the group, and DDP must not get a device.
# Our tool does both by itself.
GROUP = """
from torch import distributed
distributed.init_process_group("gloo")
"""
CONFIG = """
_base_ = "{tiny}"
custom_imports = dict(imports={imports})
load_from = "{folder}/plain.pth"
model = dict(backbone=dict(norm_eval=False, plugins=[dict(
    cfg=dict(type="EMA", factor=8, start="identity"), position="after_conv2")]))
model_wrapper_cfg = dict(
    type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
train_cfg = dict(val_interval=99)
train_dataloader = dict(batch_size={batch})
"""


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """Return a folder with configs of the tiny detector for one rank and for two.

    It is warm-started, its norms train on batches, and it has plug-ins. An epoch has three
    iterations.
    """
    folder = tmp_path_factory.mktemp("any")
    save_plain_detector(tiny_config, folder / "plain.pth")
    (folder / "runner.py").write_text(RUNNER)
    (folder / "gloo_group.py").write_text(GROUP)
    for name, batch, *more in (("one", 4), ("two", 2), ("two_gloo", 2, "gloo_group")):
        imports = ["rfa_mmdet", *more]
        text = CONFIG.format(tiny=tiny_config, imports=imports, folder=folder, batch=batch)
        (folder / f"{name}.py").write_text(text)
    return folder


def command(trainer: str, ranks: int, folder: Path, work: Path, epochs: int, *more: str) -> list:
    name = "one" if ranks == 1 else "two" if trainer == "ours" else "two_gloo"
    config, launcher = folder / f"{name}.py", "none" if ranks == 1 else "pytorch"
    options = ["--work-dir", work, *(f"--{one}" for one in more)]
    options += ["--cfg-options", f"train_cfg.max_epochs={epochs}"]
    if trainer == "mim":  # it has a launcher of its own
        program = [sys.executable, "-m", "mim", "train", "mmdet", config, "--launcher", launcher]
        return [*program, "--gpus", ranks, "--port", free_port(), *options]
    program = [sys.executable]
    if ranks == 2:
        program += ["-m", "torch.distributed.run", "--nproc_per_node=2"]
        program += [f"--master_port={free_port()}"]
    if trainer == "Runner":
        return [*program, folder / "runner.py", config, work, epochs, *more]
    script = MMDET if trainer == "mmdet" else "tools/train.py"
    return [*program, script, config, "--launcher", launcher, *options]


@pytest.fixture(scope="module")
def train(run_tool, folder):
    """Train for some epochs in a process, or in one of each rank."""

    def run(trainer: str, ranks: int, *arguments) -> None:
        # Warnings are from OpenMMLab's own imports, which other trainers do not hide.
        more = dict(PYTHONWARNINGS="ignore", PYTHONPATH=str(folder))
        done = run_tool(*command(trainer, ranks, folder, *arguments), **more)
        assert done.returncode == 0, done.stdout

    return run


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def whole(request, train, tmp_path_factory):
    """Return the number of ranks and the work dir of an uninterrupted run of our tool."""
    work = tmp_path_factory.mktemp("whole")
    train("ours", request.param, work, 7)
    return request.param, work


def assert_same(work: Path, expected: Path, epochs: int) -> None:
    """Compare the losses of the last epochs, and the weights."""
    first = 22 - 3 * epochs
    pd.testing.assert_series_equal(losses(work), losses(expected).loc[first:], check_exact=True)
    mine, theirs = weights(work / "epoch_7.pth"), weights(expected / "epoch_7.pth")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_our_tool_resumes_a_warm_start_identically(whole, train, tmp_path):
    ranks, expected = whole
    train("ours", ranks, tmp_path, 7, f"resume={expected}/epoch_3.pth")
    assert_same(tmp_path, expected, epochs=4)


# mim starts mmdet's tool.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "resumes"), [("mmdet", True), ("mim", False), ("Runner", True)]
)
def test_all_trainers_start_continue_and_resume_identically(
    trainer, resumes, whole, train, tmp_path
):
    if trainer == "mim" and importlib.util.find_spec("mim") is None:
        pytest.skip("openmim is not installed")
    ranks, expected = whole
    if resumes:
        train(trainer, ranks, tmp_path, 3)
        train(trainer, ranks, tmp_path, 7, "resume")
    else:
        train(trainer, ranks, tmp_path, 7)
    assert len(losses(expected)) == 21
    assert_same(tmp_path, expected, epochs=7)
    # The warm-started statistics have moved from 0, and the plug-ins are trained.
    mine, norm = weights(tmp_path / "epoch_7.pth"), "backbone.layer2.0.conv1.norm"
    assert any(".ema." in name for name in mine)
    assert mine[f"{norm}.running_mean"].any()
    assert mine[f"{norm}.num_batches_tracked"] == 21
