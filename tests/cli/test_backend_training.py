"""Training with kernels gives the same loss curve as with the formula."""

import json
import sys

import pytest

from rfa_mmdet.ops.receptive_field.backends import missing

# Number of calls of each operator in the first training step.
COUNT = """
import json
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.profiler import ProfilerActivity, profile


@HOOKS.register_module()
class CountOperatorsHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 0:
            self.profile = profile(activities=[ProfilerActivity.CPU])
            self.profile.start()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 0:
            self.profile.stop()
            found = [e for e in self.profile.key_averages() if e.key.startswith("rfa_mmdet")]
            with open(runner.work_dir + "/calls.json", "w") as file:
                json.dump({event.key: event.count for event in found}, file)
"""
CONFIG = """
_base_ = "{tiny}"
custom_imports = dict(imports=["rfa_mmdet", "count_operators"])
custom_hooks = [dict(type="CountOperatorsHook")]
model = dict(backbone=dict(rfa=dict(type="{conv}", backend="{backend}")))
train_cfg = dict(val_interval=9)
# Adam would make as much of a gradient that is only rounding as of any other.
optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
"""
LAYERS, ITERATIONS = 6, 9  # of tiny_config


@pytest.mark.skipif(missing("cpu") is not None, reason="the CPU kernels are not built")
@pytest.mark.parametrize(
    "conv",
    [
        "RFAConv",
        pytest.param("RFCBAMConv", marks=pytest.mark.slow),
        pytest.param("RFCAConv", marks=pytest.mark.slow),
    ],
)
def test_kernels_and_formula_give_the_same_loss_curve(run_tool, tiny_config, tmp_path, conv):
    (tmp_path / "count_operators.py").write_text(COUNT)

    def train(backend):
        config, work_dir = tmp_path / f"{backend}.py", tmp_path / backend
        config.write_text(CONFIG.format(tiny=tiny_config, conv=conv, backend=backend))
        done = run_tool(
            *(sys.executable, "tools/train.py", config, "--work-dir", work_dir),
            PYTHONPATH=str(tmp_path),
        )
        assert done.returncode == 0
        (scalars,) = work_dir.glob("*/vis_data/scalars.json")
        lines = [json.loads(line) for line in scalars.read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        return losses, json.loads((work_dir / "calls.json").read_text())

    kernels, calls = train("auto")
    backward = sum(count for name, count in calls.items() if "backward" in name)
    assert backward >= LAYERS
    assert sum(calls.values()) - backward >= LAYERS
    formula, calls = train("reference")
    assert calls == {}
    assert len(kernels) == len(set(kernels)) == ITERATIONS  # it learns
    # Only rounding differs.
    assert kernels == pytest.approx(formula, rel=64 * 2**-23)
