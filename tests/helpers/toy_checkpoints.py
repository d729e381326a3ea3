"""A real MMEngine run whose checkpoints contain every kind of state."""

import itertools

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner

from rfa_mmdet.compat.safe_loading import apply

_NUMBERS = itertools.count()


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

    def __init__(self, accuracy):
        super().__init__()
        self.accuracy = accuracy

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(acc=np.float32(self.accuracy), loss=0.5, names=["a"])


class ToyData(list):
    def __init__(self, items, metainfo=None):
        super().__init__(items)
        self.metainfo = metainfo or {}


def make_runner(work_dir, epochs, resume=False, metainfo=None, accuracy=0.5, **kwargs):
    data = ToyData((dict(x=torch.ones(2) * i) for i in range(4)), metainfo)
    loader = dict(
        dataset=data,
        batch_size=2,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
    )
    checkpoint = dict(
        dict(type="CheckpointHook", interval=1, save_best="toy/acc", rule="greater"),
        **kwargs.pop("checkpoint", {}),
    )
    default = dict(
        model=ToyModel(),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, end=2, by_epoch=False),
            dict(type="CosineAnnealingLR", T_max=4, convert_to_iter_based=True),
        ],
        custom_hooks=[dict(type="EMAHook")],
    )
    return Runner(
        work_dir=str(work_dir),
        experiment_name=f"toy{next(_NUMBERS)}",  # MMEngine keeps what it makes under a name
        train_dataloader=loader,
        val_dataloader=loader,
        val_cfg=dict(),
        val_evaluator=Evaluator([ToyMetric(accuracy)]),
        default_hooks=dict(logger=dict(type="LoggerHook", interval=1), checkpoint=checkpoint),
        default_scope="mmengine",
        log_level="ERROR",
        resume=resume,
        **{**default, **kwargs},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the work_dir of a run of one epoch with 2 iterations."""
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
