"""Norms that only shift, on running statistics and on batch statistics."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rfa_mmdet.layers.warm_start.first_steps import (
    awaits_statistics,
    only_shifts,
    take_statistics,
)
from rfa_mmdet.layers.warm_start.identity import identity_norm, norm_obstacle


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
    assert not only_shifts(norm, floor)
    assert not awaits_statistics(norm)
    norm.load_state_dict(identity_norm(norm, floor))
    x = 3 * torch.randn(4, channels, 3, 5).double()
    torch.testing.assert_close(norm.eval()(x), x - floor, rtol=1e-12, atol=1e-12)
    assert only_shifts(norm, floor)
    assert not only_shifts(norm, floor - 1)
    assert awaits_statistics(norm)
    # On batch statistics it differs until it has taken them.
    norm.train()
    twin = copy.deepcopy(norm)
    assert not torch.allclose(twin(x), x - floor, rtol=1e-2, atol=1e-2)
    take_statistics(norm, x.split(3))
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, x.var((0, 2, 3), correction=0))
    assert only_shifts(norm, floor)
    assert not awaits_statistics(norm)
    torch.testing.assert_close(norm.eval()(x), x - floor, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(norm.train()(x), x - floor, rtol=1e-12, atol=1e-10)


def test_norm_obstacle_of_each_norm():
    assert norm_obstacle(nn.Identity()) == ""
    assert norm_obstacle(nn.SyncBatchNorm(4)) == ""
    for norm in (nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)):
        reason = f"its norm, {type(norm).__name__}, removes the scale of its input"
        assert norm_obstacle(norm).startswith(reason)
    assert "track_running_stats=True" in norm_obstacle(nn.BatchNorm2d(4, track_running_stats=False))
    for norm in (nn.Identity(), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, affine=False)):
        assert not awaits_statistics(norm)
        assert not only_shifts(norm, 0.0)


def test_norm_keeps_its_outputs_when_taking_statistics():
    """Check a norm after norm_eval, with weight and bias trained on the statistics 0 and 1."""
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(3).double(), 2 + 3 * torch.randn(4, 3, 5, 5).double()
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    before = norm.eval()(x)
    take_statistics(norm, [x])
    for training in (False, True):
        torch.testing.assert_close(norm.train(training)(x), before)
    # It happens once.
    assert not awaits_statistics(norm)


def test_batch_with_a_single_value_is_skipped():
    norm = nn.BatchNorm2d(3)
    norm.load_state_dict(identity_norm(norm, 0.0))
    before = copy.deepcopy(norm.state_dict())
    for x in (torch.rand(0, 3, 4, 4), torch.rand(1, 3, 1, 1)):
        take_statistics(norm, [x])
        assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
        assert awaits_statistics(norm)


def test_group_norm_removes_the_scale():
    norm, x = nn.GroupNorm(2, 4, eps=0.0).double(), torch.randn(2, 4, 5, 5).double()
    torch.testing.assert_close(norm(2 * x), norm(x))
