"""A real run of MMEngine whose checkpoints hold all that one may, and all that may be in one."""

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner

from rfa_mmdet.compat.safe_loading import apply


@pytest.fixture(scope="module", autouse=True)
def _installed():
    apply()


class ToyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)

    def forward(self, x, mode="tensor"):
        out = self.fc(torch.stack(x))
        return dict(loss=out.square().mean()) if mode == "loss" else [out]


class ToyMetric(BaseMetric):
    default_prefix = "toy"

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(acc=np.float32(0.5))


def make_runner(work_dir, epochs, resume=False):
    loader = dict(
        dataset=[dict(x=torch.ones(2) * i) for i in range(4)],
        batch_size=2,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
    )
    return Runner(
        model=ToyModel(),
        work_dir=str(work_dir),
        experiment_name=f"toy{epochs}{resume}",
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        val_evaluator=Evaluator([ToyMetric()]),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, end=2, by_epoch=False),
            dict(type="CosineAnnealingLR", T_max=4, convert_to_iter_based=True),
        ],
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1),
            checkpoint=dict(type="CheckpointHook", interval=1, save_best="toy/acc"),
        ),
        custom_hooks=[dict(type="EMAHook")],
        default_scope="mmengine",
        log_level="ERROR",
        resume=resume,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work_dir of a run of one epoch, 2 iterations."""
    work_dir = tmp_path_factory.mktemp("run")
    make_runner(work_dir, 1).train()
    return work_dir


def rich_content():
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    mixed = np.empty(4, dtype=object)
    mixed[:] = [None, "x", [1, np.ones(2)], np.arange(3)]
    return dict(
        state_dict=torch.nn.Linear(3, 4).state_dict(),
        loss_scaler=dict(scale=65536.0, growth_interval=2000, _growth_tracker=0),  # as AMP's
        history=history,
        same_history=history,
        no_history=HistoryBuffer(),
        mixed=mixed,
        size=torch.Size([1, 2]),
        nested=(np.zeros(2), [dict(a=np.ones(1, np.float32))]),
        scalars=[np.float32(1.5), np.float64(2.5), np.int64(-3), np.bool_(True), np.float16(0.5)],
        arrays=[
            np.arange(3, dtype=np.int32),
            np.arange(3, dtype=">i4"),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.array(3.5, np.float32),
            np.zeros((0, 3)),
            np.array([True, False]),
        ],
    )
