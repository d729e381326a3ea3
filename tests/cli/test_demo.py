"""The demo, with a training of one epoch."""

import sys

import cv2
import pytest
from mmengine.config import Config

from rfa_mmdet.cli.demo import CONFIG, EPOCHS
from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_demo(run_tool):
    command = ("tools/demo.py", "--epochs", 1)
    done = run_tool("env", "-u", "DATA_ROOT", sys.executable, *command)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "AP50" in done.stdout
    assert "next, try" in done.stdout
    for name in ("detections.png", "curves.png", "attention.png"):
        picture = cv2.imread(str(ROOT / "work_dirs" / "demo" / name))
        assert picture is not None
        assert picture.std() > 10


def test_epochs_are_those_of_the_config():
    cfg = Config.fromfile(ROOT / CONFIG)
    assert cfg.train_cfg.max_epochs == EPOCHS
    # What --epochs changes as well.
    assert cfg.param_scheduler[1].T_max == cfg.param_scheduler[1].end == EPOCHS
