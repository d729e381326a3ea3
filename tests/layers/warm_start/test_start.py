"""The record of values loaded from a checkpoint, and rejected warm starts."""

import copy
import pickle
import re

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from rfa_mmdet.layers.warm_start.start import Start, WarmStartError
from tests.helpers.registered import ATTENDED, CONVS, RECEPTIVE, build_randomly, plain_state


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("bias", "own_bias"), [(True, True), (False, True), (False, False)])
def test_start_records_loaded_names(name, bias, own_bias):
    layer = build_randomly(dict(type=name), 4, 6, 3, bias=own_bias)
    assert layer.start == Start() == (frozenset(), (), "", "")
    layer.load_state_dict(plain_state(bias=bias), strict=True)
    filled = {"conv.weight"} | ({"conv.bias"} if bias else set())
    if name in RECEPTIVE:
        filled |= {"norm.running_mean", "norm.running_var"}
    assert layer.start.filled == filled
    assert layer.start.plain == (("weight", "bias") if bias else ("weight",))
    assert layer.start.refused == ""
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.start == layer.start


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("published", [False, True])
def test_own_and_published_names_load_everything(name, published):
    source, layer = (
        build_randomly(dict(type=name), 4, 6, 3),
        build_randomly(dict(type=name), 4, 6, 3),
    )
    state = source.state_dict()
    own = frozenset(state)
    if published:
        theirs = {ours: key for key, ours in PUBLISHED[name].items()}
        state = {theirs[key]: value for key, value in state.items()}
        assert state.keys() != own
    layer.load_state_dict(state, strict=True)
    assert layer.start == Start(filled=own)


def test_partial_loads_add_up():
    layer = build_randomly(dict(type="RFAConv"), 4, 6, 3)
    state = build_randomly(dict(type="RFAConv"), 4, 6, 3).state_dict()
    first = {k: v for k, v in state.items() if k.startswith("conv")}
    layer.load_state_dict(first, strict=False)
    assert layer.start == Start(frozenset(first))
    layer.load_state_dict({k: v for k, v in state.items() if k not in first}, strict=False)
    assert layer.start == Start(frozenset(state))
    layer.load_state_dict({"other.weight": torch.zeros(1)}, strict=False)
    assert layer.start == Start(frozenset(state))


def test_warm_start_keeps_other_values():
    layer = build_randomly(dict(type="CAMConv"), 4, 6, 3)
    layer.load_state_dict(build_randomly(dict(type="CAMConv"), 4, 6, 3).state_dict())
    before = layer.attention.mlp[0].weight.clone()
    layer.load_state_dict(plain_state())
    assert torch.equal(layer.attention.mlp[0].weight, before)
    # mlp.2 has its initial value now, not that of the first file.
    assert layer.start.filled == {"attention.mlp.0.weight", "conv.weight", "conv.bias"}


def test_keys_of_another_shape_do_not_count_as_loaded():
    layer = build_randomly(dict(type="CAMConv"), 4, 6, 3)
    state = build_randomly(dict(type="CAMConv", reduction=2), 4, 6, 3).state_dict()
    load_state_dict(layer, state)  # with a warning for each of the two
    assert layer.start.filled == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize("name", RECEPTIVE)
@pytest.mark.parametrize(
    ("cfg", "bias", "why"),
    [
        (
            dict(norm_cfg=dict(type="GN", num_groups=2)),
            True,
            "its norm, GroupNorm, removes the scale of its input, so the layer cannot equal a "
            "convolution; use BN or norm_cfg=None",
        ),
        (
            dict(norm_cfg=dict(type="BN", affine=False)),
            True,
            "its BN needs affine=True and track_running_stats=True to be the identity",
        ),
        (
            dict(norm_cfg=dict(type="BN", track_running_stats=False)),
            True,
            "its BN needs affine=True and track_running_stats=True to be the identity",
        ),
        (
            dict(act_cfg=dict(type="SiLU")),
            True,
            "its activation, SiLU, is not the identity above 0; use ReLU",
        ),
        (
            dict(bias=False),
            True,
            "the plain convolution has a bias, but this layer has none; use bias=True",
        ),
    ],
    ids=["GN", "no affine", "no statistics", "SiLU", "bias"],
)
def test_layers_that_cannot_warm_start_are_unchanged(name, cfg, bias, why):
    layer = build_randomly(dict(type=name), 4, 6, 3, **cfg)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = plain_state(bias=bias)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        layer.load_state_dict(state, strict=True)
    found = layer.load_state_dict(state, strict=False)
    assert set(found.unexpected_keys) == set(state)
    assert set(found.missing_keys) == {k for k in before if not k.endswith("batches_tracked")}
    assert layer.start == Start(refused=why)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", ATTENDED)
def test_attended_convs_only_reject_a_bias(name):
    layer = build_randomly(dict(type=name), 4, 6, 3, bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        layer.load_state_dict(plain_state(), strict=True)
    assert layer.start.refused.startswith("the plain convolution has a bias")
    layer.load_state_dict(plain_state(bias=False), strict=True)
    assert layer.start == Start(frozenset({"conv.weight"}), ("weight",))


def test_rejected_warm_start_keeps_earlier_loads():
    layer = build_randomly(dict(type="RFAConv"), 4, 6, 3, act_cfg=dict(type="SiLU"))
    layer.load_state_dict(layer.state_dict())
    filled = layer.start.filled
    assert filled == set(layer.state_dict())
    layer.load_state_dict(plain_state(), strict=False)
    assert layer.start.filled == filled
    assert layer.start.refused


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("key", ["weight", "conv.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_shape_mismatch_names_both_shapes(name, key, strict):
    net = nn.ModuleDict(dict(block=nn.Sequential(build_randomly(dict(type=name), 4, 6, 3))))
    message = (
        f"block.0.{key}: the checkpoint's convolution has shape (6, 8, 3, 3), but the {name} "
        "that replaces it needs (6, 4, 3, 3)"
    )
    with pytest.raises(WarmStartError, match=f"^{re.escape(message)}$"):
        net.load_state_dict({f"block.0.{key}": torch.zeros(6, 8, 3, 3)}, strict=strict)
    assert issubclass(WarmStartError, ValueError)
