"""A detector retrofitted from a plain checkpoint keeps its accuracy, and trains."""

import re
import sys

import pytest

from rfa_mmdet.data.shapes import make_shapes

CONFIG = "configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py"
PLAIN = ("model.backbone.rfa=None", "model.backbone.stage_with_rfa=None")


def accuracies(output: str) -> list[float]:
    return [float(ap) for ap in re.findall(r"coco/bbox_mAP: ([\d.]+)", output)]


@pytest.mark.slow
def test_retrofitted_detector_keeps_its_accuracy_and_improves(run_tool, tmp_path):
    data, plain, fine_tuned = (tmp_path / name for name in ("shapes", "plain", "fine_tuned"))
    make_shapes(data)

    def run(tool: str, *arguments) -> str:
        command = (sys.executable, f"tools/{tool}.py", CONFIG)
        done = run_tool(*command, *arguments, DATA_ROOT=str(data))
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    options = ("--cfg-options", "train_cfg.max_epochs=2")
    run("train", "--work-dir", plain, *options, *PLAIN)
    checkpoint, warm = plain / "epoch_2.pth", tmp_path / "warm.pth"
    run("retrofit_checkpoint", checkpoint, warm)
    found = [
        accuracies(run("test", path, "--work-dir", tmp_path / "test", *more))[-1]
        for path, more in (
            (checkpoint, ("--cfg-options", *PLAIN)),
            (checkpoint, ()),
            (warm, ()),
        )
    ]
    assert found[0] > 0.05, "the plain detector has learnt nothing to compare"
    # Printed with three decimals; rounding, which sorts equal scores, may change the last.
    assert found[1:] == pytest.approx([found[0]] * 2, abs=0.002)
    options = (f"load_from={checkpoint}", "train_cfg.max_epochs=1")
    rate = "optim_wrapper.optimizer.lr=0.0002"
    log = run("train", "--work-dir", fine_tuned, "--cfg-options", *options, rate)
    assert accuracies(log)[-1] >= found[0]
