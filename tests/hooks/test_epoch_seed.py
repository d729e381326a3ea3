"""Random numbers in the epochs of a real Runner, in the main process and in workers."""

import os
import random

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.utils.data import Dataset

import rfa_mmdet  # noqa: F401  registers the hook
from rfa_mmdet.errors import ConfigError
from tests.helpers.processes import START_METHOD


class Draws(Dataset):
    """Four samples of random numbers drawn at loading time."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([index, random.random(), np.random.rand(), torch.rand(1)]))


class Recorder(BaseModel):
    """Records its inputs and a number drawn in the forward pass, like dropout."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, inputs, mode):
        assert mode == "loss"
        self.seen.append(torch.cat([*inputs, torch.rand(1)]))
        return dict(loss=(self.weight * torch.rand(1)).mean())


def run(work_dir, epochs, seed=0, resume=False, workers=2, persistent=False, **options):
    """Train; return the numbers that the model saw, (epochs, numbers)."""
    diff_rank_seed = options.pop("diff_rank_seed", False)
    runner = Runner(
        Recorder(),
        str(work_dir),
        train_dataloader=dict(
            dataset=Draws(),
            batch_size=2,
            num_workers=workers,
            persistent_workers=persistent,
            sampler=dict(type="DefaultSampler", shuffle=True),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=options or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        custom_hooks=[dict(type="EpochSeedHook")],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        randomness=dict(seed=seed, diff_rank_seed=diff_rank_seed),
        resume=resume,
        experiment_name=f"{work_dir.name}-{epochs}-{resume}-{seed}-{workers}",
    )
    runner.train()
    seen = torch.stack(runner.model.seen)
    return seen.reshape(-1, 2 * seen.shape[1]), runner


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_resumed_run_draws_the_same_numbers(tmp_path, workers, persistent):
    kwargs = dict(workers=workers, persistent=persistent)
    whole, _ = run(tmp_path / "whole", 3, **kwargs)
    run(tmp_path / "broken", 1, **kwargs)
    resumed, _ = run(tmp_path / "broken", 3, resume=True, **kwargs)
    assert torch.equal(resumed, whole[1:])
    # Every column differs between epochs: index order, Python, NumPy, torch, forward.
    assert (whole[0] != whole[1]).sum() >= 7
    other, _ = run(tmp_path / "other", 3, seed=1, **kwargs)
    assert (other != whole).any(1).all()


def test_checkpoints_seed_is_used_if_none_is_given(tmp_path):
    whole, first = run(tmp_path / "whole", 3, seed=None)
    run(tmp_path / "broken", 1, seed=first.seed)
    resumed, second = run(tmp_path / "broken", 3, seed=None, resume=True)
    assert second.seed == first.seed
    assert torch.equal(resumed, whole[1:])


def in_rank(rank, folder, diff_rank_seed):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen, runner = run(folder / "run", 2, workers=0, diff_rank_seed=diff_rank_seed)
    torch.save((seen, runner.train_dataloader.sampler.seed), folder / f"{rank}.pth")
    os._exit(0)  # gloo's threads may hang or crash at the end of a process


@pytest.mark.parametrize("diff_rank_seed", [False, True])
def test_ranks_share_the_order_but_no_other_random_number(tmp_path, diff_rank_seed):
    arguments = (tmp_path, diff_rank_seed)
    mp.start_processes(in_rank, arguments, nprocs=2, start_method=START_METHOD)
    seen, seeds = zip(*(torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)), strict=True)
    # In an epoch, a rank gets two images with their index and three numbers, and draws one number.
    both = torch.stack([one.view(2, 9) for one in seen])
    indices = both[..., [0, 4]].transpose(0, 1).flatten(1)
    assert [sorted(epoch.tolist()) for epoch in indices] == [[0, 1, 2, 3]] * 2
    drawn = both[..., [1, 2, 3, 5, 6, 7, 8]]
    assert len(drawn.unique()) == drawn.numel() == 28
    assert seeds == (0, 0)  # repeated after resuming, also with diff_rank_seed


def test_training_by_iterations_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="EpochSeedHook does not work with IterBasedTrainLoop"):
        run(tmp_path / "run", 1, by_epoch=False, max_iters=3)
