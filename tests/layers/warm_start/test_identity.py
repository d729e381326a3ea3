"""Norms that only shift, on running statistics and on those of a batch."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rfa_mmdet.layers.warm_start.identity import (
    calibrate_norm,
    identity_norm,
    is_uncalibrated,
    norm_obstacle,
)


@given(
    eps=st.sampled_from([1e-5, 1e-3, 0.5]),
    floor=st.sampled_from([0.0, -0.5, -8.0]),
    channels=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_norms_that_only_shift(eps, floor, channels, seed):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(channels, eps=eps).double()
    norm.running_mean.normal_()
    assert not is_uncalibrated(norm, floor)
    norm.load_state_dict(identity_norm(norm, floor))
    x = 3 * torch.randn(4, channels, 3, 5).double()
    torch.testing.assert_close(norm.eval()(x), x - floor, rtol=1e-12, atol=1e-12)
    assert is_uncalibrated(norm, floor)
    assert not is_uncalibrated(norm, floor - 1)
    # On a batch's own statistics it is something else, until it is calibrated to them.
    norm.train()
    twin = copy.deepcopy(norm)
    assert not torch.allclose(twin(x), x - floor, rtol=1e-2, atol=1e-2)
    calibrate_norm(norm, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), floor)
    assert not is_uncalibrated(norm, floor)
    torch.testing.assert_close(norm.eval()(x), x - floor, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(norm.train()(x), x - floor, rtol=1e-12, atol=1e-10)


def test_norm_obstacle_of_each_norm():
    assert norm_obstacle(nn.Identity()) == ""
    assert norm_obstacle(nn.SyncBatchNorm(4)) == ""
    assert "InstanceNorm2d" in norm_obstacle(nn.InstanceNorm2d(4))
    assert "no statistics" in norm_obstacle(nn.BatchNorm2d(4, track_running_stats=False))
    for norm in (nn.Identity(), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)):
        assert not is_uncalibrated(norm, 0.0)
