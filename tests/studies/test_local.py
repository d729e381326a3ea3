"""GPUs and cores of parallel runs."""

import pytest
import torch

from rfa_mmdet.studies.local import worker_environments


@pytest.mark.parametrize(("jobs", "wanted"), [(1, ["3"]), (2, ["3", "5"]), (3, ["3", "5", "3"])])
def test_runs_share_the_visible_gpus(jobs, wanted, monkeypatch):
    # Only the number of GPUs is taken from PyTorch, and these tests have no GPU.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert worker_environments(jobs) == [{"CUDA_VISIBLE_DEVICES": name} for name in wanted]
