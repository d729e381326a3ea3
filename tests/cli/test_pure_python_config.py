"""The tools, as real processes, with a config whose types are classes."""

import sys

import pytest
from mmengine.config import Config

from tests.helpers.pure_python import pure_python


@pytest.fixture(scope="module")
def config(tiny_config, shapes, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_ROOT", str(shapes))
        cfg = Config.fromfile(tiny_config)
    path = tmp_path_factory.mktemp("configs") / "classes.py"
    path.write_text(pure_python(cfg))
    assert "from rfa_mmdet.layers.conv.rfa_conv import RFAConv" in path.read_text()
    return path


@pytest.mark.slow
def test_every_tool_accepts_a_pure_python_config(config, shapes, run_tool, tmp_path):
    def run(tool, *arguments):
        done = run_tool(sys.executable, f"tools/{tool}.py", *arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout

    options = ("--cfg-options", "train_cfg.max_epochs=1")
    run("train", config, "--work-dir", tmp_path, "--tensorboard", *options)
    checkpoint = tmp_path / "epoch_1.pth"
    run(
        "train",
        config,
        "--work-dir",
        tmp_path,
        "--resume",
        "--cfg-options",
        "train_cfg.max_epochs=2",
    )
    run("test", config, checkpoint, "--work-dir", tmp_path / "test")
    image = next(shapes.glob("JPEGImages/val*.jpg"))
    run("predict", config, checkpoint, image, "--out", tmp_path / "predicted")
    assert "plain base" in run("analysis/complexity", config)
    run("check_data", config, "--out", tmp_path / "data")
