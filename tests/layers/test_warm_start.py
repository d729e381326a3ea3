"""A layer started from a plain convolution computes what that one did, or says why it cannot.

The truth is torch's own Conv2d, in double precision.
"""

import copy
import itertools
import pickle
import re
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmcv.cnn import build_conv_layer
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.layers.conv.receptive_field import ReceptiveFieldConv
from rfa_mmdet.layers.warm_start.identity import (
    calibrate_norm,
    identity_norm,
    is_uncalibrated,
    norm_obstacle,
)
from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from rfa_mmdet.layers.warm_start.start import Start, WarmStartError

CONVS = ("RFAConv", "RFCBAMConv", "RFCAConv", "CAMConv", "CBAMConv", "CAConv")
RECEPTIVE = CONVS[:3]
LEAKY = dict(type="LeakyReLU", negative_slope=0.1)
# Every layer, and every variant of it that a plain convolution can become.
VARIANTS = {
    **{name: dict(type=name) for name in CONVS},
    **{f"{n}, no norm": dict(type=n, norm_cfg=None) for n in RECEPTIVE},
    **{f"{n}, no act": dict(type=n, act_cfg=None) for n in RECEPTIVE},
    **{f"{n}, bare": dict(type=n, norm_cfg=None, act_cfg=None) for n in RECEPTIVE},
    **{f"{n}, leaky": dict(type=n, act_cfg=LEAKY) for n in RECEPTIVE},
    "RFAConv, unfold": dict(type="RFAConv", feature="unfold"),
    "RFAConv, bare unfold": dict(type="RFAConv", feature="unfold", norm_cfg=None, act_cfg=None),
}


def cuts_off(cfg: dict) -> bool:
    """Whether something below the floor is lost."""
    return cfg["type"] in RECEPTIVE and cfg.get("act_cfg", "ReLU") is not None


def takes_floor(cfg: dict) -> bool:
    return cfg["type"] in RECEPTIVE and cfg.get("norm_cfg", "BN") is not None


def build(cfg: dict, *args, **kwargs) -> nn.Module:
    """The layer, with every value at random: a start has to set what it relies on."""
    layer = build_conv_layer({**cfg, **kwargs}, *args)
    with torch.no_grad():
        for value in layer.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return layer


class Case(NamedTuple):
    plain: nn.Conv2d
    layer: nn.Module
    floor: float
    x: Tensor  # from the floor on


@st.composite
def cases(draw, cfg: dict) -> Case:
    pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
    # A 1x1 RFAConv is a plain convolution, with nothing to start.
    kernel = draw(pairs.filter(lambda k: k != (1, 1) or cfg["type"] != "RFAConv"))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    groups = draw(st.integers(1, 3))
    channels, out_channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    floor = draw(st.sampled_from([0.0, -0.25, -3.0])) if takes_floor(cfg) else 0.0
    bias = draw(st.booleans())
    own_bias = bias or floor < 0 or draw(st.booleans())
    smallest = [
        max(d * (k - 1) + 1, p + 1) for d, k, p in zip(dilation, kernel, padding, strict=True)
    ]
    size = [side + draw(st.integers(0, 4)) for side in smallest]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    window = (kernel, stride, padding, dilation, groups)
    plain = nn.Conv2d(channels, out_channels, *window, bias, mode).double()
    more = dict(input_floor=floor) if cfg["type"] in RECEPTIVE else {}
    layer = build(cfg, channels, out_channels, *window, own_bias, mode, **more).double()
    return Case(plain, layer, floor, floor + 3 * torch.rand(2, channels, *size).double())


def difference(a: Tensor, b: Tensor) -> float:
    # Not to less than a hundredth of the inputs: where the padding alone is seen, all is 0.
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-2)).item()


# --------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.data())
def test_it_computes_what_the_plain_convolution_did(variant, data):
    plain, layer, floor, x = data.draw(cases(VARIANTS[variant]))
    source = plain.state_dict()
    kept = {k: v.clone() for k, v in source.items()}
    layer.load_state_dict(source, strict=True)
    layer.eval()
    assert source.keys() == kept.keys()
    assert all(torch.equal(source[k], v) for k, v in kept.items())
    assert layer.start.plain == tuple(kept)
    # The floor itself is let through.
    x.flatten()[0] = floor
    x.requires_grad_()
    expected, found = plain(x), layer(x)
    assert difference(expected, found) <= 1e-10
    # The gradient, too, where the activation has one: above the floor, on which it has a corner.
    above = (x.detach() + 0.1).requires_grad_()
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(f(above), above, upstream)[0] for f in (plain, layer)]
    assert difference(*gradients) <= 1e-10


@pytest.mark.parametrize(
    ("variant", "floor"),
    [(v, f) for v, cfg in VARIANTS.items() for f in (0.0, -1.0) if not f or takes_floor(cfg)],
)
def test_below_the_floor_it_does_only_where_nothing_is_cut_off(variant, floor):
    cfg = VARIANTS[variant]
    more = dict(input_floor=floor) if cfg["type"] in RECEPTIVE else {}
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1).double()
    layer = build(cfg, 4, 6, 3, padding=1, **more).double().eval()
    layer.load_state_dict(plain.state_dict())
    below = floor - torch.rand(2, 4, 5, 5).double()
    found = difference(plain(below), layer(below))
    assert found > 1e-2 if cuts_off(cfg) else found <= 1e-10
    assert difference(plain(floor - below), layer(floor - below)) <= 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_under_norm_eval_it_trains_on_from_there(variant):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1).double()
    layer = build(VARIANTS[variant], 4, 6, 3, padding=1).double()
    layer.load_state_dict(plain.state_dict())
    layer.train()
    if isinstance(getattr(layer, "norm", None), nn.BatchNorm2d):
        layer.norm.eval()
    x = torch.rand(2, 4, 6, 6).double()
    out = layer(x)
    assert difference(plain(x), out) <= 1e-10
    out.backward(torch.randn_like(out))
    assert all(p.grad is not None for p in layer.parameters())
    attention = {
        name: bool(p.grad.any())
        for name, p in layer.named_parameters()
        if not name.startswith(("conv.", "norm.", "feature."))
    }
    # No saddle: each gate has a parameter that moves. What only feeds a last layer that is still
    # zero follows one step later.
    gates = {
        "RFAConv": ["attention.weight"],
        "RFCBAMConv": ["se.fc.2.weight", "spatial.weight"],
        "RFCAConv": ["coordinate.conv_h.weight", "coordinate.conv_w.weight"],
        "CAMConv": ["attention.mlp.2.weight"],
        "CBAMConv": ["attention.channel.mlp.2.weight", "attention.spatial.weight"],
        "CAConv": ["attention.conv_h.weight", "attention.conv_w.weight"],
    }[VARIANTS[variant]["type"]]
    assert all(attention[name] for name in gates)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "more",
    [{}, dict(norm_cfg=None), dict(act_cfg=dict(type="SiLU")), dict(norm_cfg=dict(type="GN"))],
    ids=str,
)
def test_a_1x1_rfaconv_takes_any_plain_one(bias, more):
    if more.get("norm_cfg"):
        more = dict(norm_cfg=dict(type="GN", num_groups=2))
    plain = nn.Conv2d(4, 6, 1, bias=bias).double()
    layer = build(dict(type="RFAConv"), 4, 6, 1, bias=bias, **more).double()
    layer.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5).double()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVS)
def test_within_a_model_and_by_mmengines_loader(name):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False))
    for load in (
        lambda net, state: net.load_state_dict(state, strict=True),
        lambda net, state: load_state_dict(net, state, strict=True),
    ):
        layer = build(dict(type=name), 4, 6, 3, padding=0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), layer).eval()
        load(net, plain.state_dict())
        assert layer.start.plain == ("weight",)
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVS)
def test_a_subclass_starts_too(name):
    derived = type("Mine", (MODELS.get(name),), {})
    plain = nn.Conv2d(4, 6, 3, padding=1)
    layer = derived(4, 6, 3).eval()
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert layer.start.plain == ("weight", "bias")
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- precision

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("own", "given"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_precision_is_the_layers_and_nothing_of_it_is_lost(name, own, given):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1).to(given)
    layer = build(dict(type=name), 4, 6, 3, padding=1).to(own).eval()
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert {v.dtype for k, v in layer.state_dict().items() if "num_batches" not in k} == {own}
    # Run in double precision, what is left is the rounding of the weights to the layer's own
    # precision: a file of half precision is exact in a higher one, and so has to be the layer.
    x = torch.rand(2, 4, 5, 5).double()
    assert difference(plain.double()(x), layer.double()(x)) <= 8 * torch.finfo(own).eps


# --------------------------------------------------------------------------- the record of it


def plain_state(*, bias: bool = True, channels: int = 4) -> dict[str, Tensor]:
    return nn.Conv2d(channels, 6, 3, bias=bias).state_dict()


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("bias", "own_bias"), [(True, True), (False, True), (False, False)])
def test_start_names_what_was_filled(name, bias, own_bias):
    layer = build(dict(type=name), 4, 6, 3, bias=own_bias)
    assert layer.start == Start() == (frozenset(), (), "")
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
def test_own_and_published_names_fill_all(name, published):
    source, layer = build(dict(type=name), 4, 6, 3), build(dict(type=name), 4, 6, 3)
    state = source.state_dict()
    own = frozenset(state)
    if published:
        theirs = {ours: key for key, ours in PUBLISHED[name].items()}
        state = {theirs[key]: value for key, value in state.items()}
        assert state.keys() != own
    layer.load_state_dict(state, strict=True)
    assert layer.start == Start(filled=own)


def test_own_names_in_parts_add_up():
    layer = build(dict(type="RFAConv"), 4, 6, 3)
    state = build(dict(type="RFAConv"), 4, 6, 3).state_dict()
    first = {k: v for k, v in state.items() if k.startswith("conv")}
    layer.load_state_dict(first, strict=False)
    assert layer.start == Start(frozenset(first))
    layer.load_state_dict({k: v for k, v in state.items() if k not in first}, strict=False)
    assert layer.start == Start(frozenset(state))
    layer.load_state_dict({"other.weight": torch.zeros(1)}, strict=False)
    assert layer.start == Start(frozenset(state))


def test_a_plain_start_keeps_what_it_does_not_set():
    layer = build(dict(type="CAMConv"), 4, 6, 3)
    layer.load_state_dict(build(dict(type="CAMConv"), 4, 6, 3).state_dict())
    before = layer.attention.mlp[0].weight.clone()
    layer.load_state_dict(plain_state())
    assert torch.equal(layer.attention.mlp[0].weight, before)
    # mlp.2 is at its beginning now, not at what the first file gave it.
    assert layer.start.filled == {"attention.mlp.0.weight", "conv.weight", "conv.bias"}


def test_keys_of_another_shape_do_not_count_as_filled():
    layer = build(dict(type="CAMConv"), 4, 6, 3)
    state = build(dict(type="CAMConv", reduction=2), 4, 6, 3).state_dict()
    load_state_dict(layer, state)  # with a warning for each of the two
    assert layer.start.filled == {"conv.weight", "conv.bias"}


# --------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name", RECEPTIVE)
@pytest.mark.parametrize(
    ("cfg", "bias", "why"),
    [
        (
            dict(norm_cfg=dict(type="GN", num_groups=2)),
            True,
            "its norm, GroupNorm, cannot be the identity; BN can",
        ),
        (
            dict(norm_cfg=dict(type="BN", affine=False)),
            True,
            "its BN has no parameters or no statistics, which the identity needs",
        ),
        (
            dict(norm_cfg=dict(type="BN", track_running_stats=False)),
            True,
            "its BN has no parameters or no statistics, which the identity needs",
        ),
        (
            dict(act_cfg=dict(type="SiLU")),
            True,
            "its activation, SiLU, is no identity above 0; ReLU is",
        ),
        (
            dict(bias=False),
            True,
            "the plain convolution has a bias and this layer none; bias=True takes it",
        ),
    ],
    ids=["GN", "no affine", "no statistics", "SiLU", "bias"],
)
def test_what_cannot_be_the_plain_convolution_stays_as_it_is(name, cfg, bias, why):
    layer = build(dict(type=name), 4, 6, 3, **cfg)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = plain_state(bias=bias)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        layer.load_state_dict(state, strict=True)
    found = layer.load_state_dict(state, strict=False)
    assert set(found.unexpected_keys) == set(state)
    assert set(found.missing_keys) == {k for k in before if not k.endswith("batches_tracked")}
    assert layer.start == Start(refused=why)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("name", CONVS[3:])
def test_attended_convs_refuse_a_bias_alone(name):
    layer = build(dict(type=name), 4, 6, 3, bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        layer.load_state_dict(plain_state(), strict=True)
    assert layer.start.refused.startswith("the plain convolution has a bias")
    layer.load_state_dict(plain_state(bias=False), strict=True)
    assert layer.start == Start(frozenset({"conv.weight"}), ("weight",))


def test_a_refusal_forgets_nothing():
    layer = build(dict(type="RFAConv"), 4, 6, 3, act_cfg=dict(type="SiLU"))
    layer.load_state_dict(layer.state_dict())
    filled = layer.start.filled
    assert filled == set(layer.state_dict())
    layer.load_state_dict(plain_state(), strict=False)
    assert layer.start.filled == filled
    assert layer.start.refused


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("key", ["weight", "conv.weight"])
@pytest.mark.parametrize("strict", [True, False])
def test_other_shapes_are_an_error_that_names_both(name, key, strict):
    net = nn.ModuleDict(dict(block=nn.Sequential(build(dict(type=name), 4, 6, 3))))
    message = (
        f"block.0.{key}: the checkpoint's convolution has the shape (6, 8, 3, 3), but the {name} "
        "in its place needs (6, 4, 3, 3)"
    )
    with pytest.raises(WarmStartError, match=f"^{re.escape(message)}$"):
        net.load_state_dict({f"block.0.{key}": torch.zeros(6, 8, 3, 3)}, strict=strict)
    assert issubclass(WarmStartError, ValueError)


# --------------------------------------------------------------------------- input_floor


@pytest.mark.parametrize("name", RECEPTIVE)
@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        (dict(input_floor="0"), TypeError, r"^input_floor='0': must be a number$"),
        (dict(input_floor=True), TypeError, r"^input_floor=True: must be a number$"),
        (dict(input_floor=None), TypeError, r"^input_floor=None: must be a number$"),
        (dict(input_floor=0.5), ValueError, r"^input_floor=0\.5: must be finite and at most 0$"),
        (dict(input_floor=float("-inf")), ValueError, r"^input_floor=-inf: must be finite"),
        (dict(input_floor=float("nan")), ValueError, r"^input_floor=nan: must be finite"),
        (
            dict(input_floor=-1, bias=False),
            ValueError,
            r"^input_floor=-1 with bias=False: .*; pass bias=True$",
        ),
        (
            dict(input_floor=-1, norm_cfg=None),
            ValueError,
            r"^input_floor=-1 with norm_cfg=None: .*; pass a norm, or act_cfg=None",
        ),
    ],
)
def test_input_floor_is_checked(name, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        MODELS.get(name)(4, 6, 3, **kwargs)


@pytest.mark.parametrize("name", RECEPTIVE)
def test_valid_input_floors(name):
    layer = MODELS.get(name)
    assert layer(4, 6, 3).input_floor == 0
    assert layer(4, 6, 3, bias=False, input_floor=0).input_floor == 0
    found = layer(4, 6, 3, input_floor=-2)
    assert (found.input_floor, type(found.input_floor)) == (-2.0, float)
    # Without an activation there is no floor to heed.
    bare = layer(4, 6, 3, input_floor=-2, norm_cfg=None, act_cfg=None).eval()
    plain = nn.Conv2d(4, 6, 3, padding=1)
    bare.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5) * 9
    torch.testing.assert_close(bare(x), plain(x), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------- the norm


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


def test_the_layers_here_are_all_that_are_registered():
    prefix = f"{RFAConv.__module__.rpartition('.')[0]}."
    found = {n for n, c in MODELS.module_dict.items() if c.__module__.startswith(prefix)}
    assert found == set(CONVS)
    assert {n for n in found if issubclass(MODELS.get(n), ReceptiveFieldConv)} == set(RECEPTIVE)
