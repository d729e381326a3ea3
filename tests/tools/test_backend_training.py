"""Training with the accelerated RFAConv gives the loss curve of the reference."""

import json
import sys

import pytest

from rfa_mmdet.ops.dispatch import missing


@pytest.mark.skipif(missing("cpu") is not None, reason="the CPU kernels are not built")
def test_both_backends_give_one_loss_curve(run_tool, tiny_config, tmp_path):
    curves = []
    for backend in ("reference", "cpu"):
        work_dir = tmp_path / backend
        done = run_tool(
            sys.executable,
            "tools/train.py",
            tiny_config,
            "--work-dir",
            work_dir,
            "--cfg-options",
            f"model.backbone.rfa.backend={backend}",
        )
        assert done.returncode == 0, done.stdout[-3000:]
        (scalars,) = work_dir.glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in scalars.read_text().splitlines()]
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert len(curves[0]) == 9
    assert len(set(curves[0])) == 9  # it learns
    # Rounding alone: nine AdamW steps, each of which can double a difference.
    assert curves[1] == pytest.approx(curves[0], rel=512 * 2**-23)
