"""Training with the kernels of a convolution gives the loss curve of its formula."""

import json
import sys

import pytest

from rfa_mmdet.ops.receptive_field.backends import missing
from tests.helpers.paths import ROOT

WITHOUT = """
from rfa_mmdet.layers.conv import accelerated, lazy

accelerated.choose_backend = lambda *_: "reference"
lazy.can_be_lazy = lambda *_: False
"""


@pytest.mark.skipif(missing("cpu") is not None, reason="the CPU kernels are not built")
@pytest.mark.parametrize("conv", ["RFAConv", "RFCBAMConv", "RFCAConv"])
def test_kernels_and_formula_give_one_loss_curve(run_tool, tiny_config, tmp_path, conv):
    (tmp_path / "without_kernels.py").write_text(WITHOUT)
    curves = []
    for imports in (["rfa_mmdet"], ["rfa_mmdet", "without_kernels"]):
        config = tmp_path / f"{imports[-1]}_config.py"
        config.write_text(
            f'_base_ = "{tiny_config}"\ncustom_imports = dict(imports={imports})\n'
            f'model = dict(backbone=dict(rfa=dict(type="{conv}")))\n'
        )
        work_dir = tmp_path / f"work_{imports[-1]}"
        done = run_tool(
            *(sys.executable, "tools/train.py", config, "--work-dir", work_dir),
            PYTHONPATH=f"{tmp_path}:{ROOT}",
        )
        assert done.returncode == 0, done.stdout[-3000:]
        (scalars,) = work_dir.glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in scalars.read_text().splitlines()]
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert len(curves[0]) == 9
    assert len(set(curves[0])) == 9  # it learns
    assert curves[0] != curves[1]  # another order of sums
    # Rounding alone: nine AdamW steps, each of which can double a difference.
    assert curves[1] == pytest.approx(curves[0], rel=512 * 2**-23)
