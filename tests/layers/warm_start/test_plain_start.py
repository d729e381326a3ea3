"""A layer started from a plain convolution has the same outputs.

The reference is torch's own Conv2d in double precision.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from tests.helpers.registered import CONVS, RECEPTIVE, build_randomly

LEAKY = dict(type="LeakyReLU", negative_slope=0.1)
# Every layer, and every variant that can start from a plain convolution.
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
    """Return whether inputs below the floor are clipped."""
    return cfg["type"] in RECEPTIVE and cfg.get("act_cfg", "ReLU") is not None


def takes_floor(cfg: dict) -> bool:
    return cfg["type"] in RECEPTIVE and cfg.get("norm_cfg", "BN") is not None


class Case(NamedTuple):
    plain: nn.Conv2d
    layer: nn.Module
    floor: float
    x: Tensor  # from the floor on


@st.composite
def cases(draw, cfg: dict) -> Case:
    pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
    # A 1x1 RFAConv is a plain convolution, so there is nothing to start.
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
    layer = build_randomly(cfg, channels, out_channels, *window, own_bias, mode, **more).double()
    return Case(plain, layer, floor, floor + 3 * torch.rand(2, channels, *size).double())


def difference(a: Tensor, b: Tensor) -> float:
    # Relative to at least a hundredth of the inputs: windows in the padding are 0.
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-2)).item()


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.data())
def test_outputs_equal_the_plain_convolution(variant, data):
    plain, layer, floor, x = data.draw(cases(VARIANTS[variant]))
    source = plain.state_dict()
    kept = {k: v.clone() for k, v in source.items()}
    layer.load_state_dict(source, strict=True)
    layer.eval()
    assert source.keys() == kept.keys()
    assert all(torch.equal(source[k], v) for k, v in kept.items())
    assert layer.start.plain == tuple(kept)
    # The floor itself passes.
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
def test_outputs_below_the_floor_are_equal_only_without_clipping(variant, floor):
    cfg = VARIANTS[variant]
    more = dict(input_floor=floor) if cfg["type"] in RECEPTIVE else {}
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1).double()
    layer = build_randomly(cfg, 4, 6, 3, padding=1, **more).double().eval()
    layer.load_state_dict(plain.state_dict())
    below = floor - torch.rand(2, 4, 5, 5).double()
    found = difference(plain(below), layer(below))
    assert found > 1e-2 if cuts_off(cfg) else found <= 1e-10
    assert difference(plain(floor - below), layer(floor - below)) <= 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_with_norm_eval(variant):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1).double()
    layer = build_randomly(VARIANTS[variant], 4, 6, 3, padding=1).double()
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
    # Not a saddle point: each gate has a parameter that changes. Parameters before a last layer
    # that is still zero follow one step later.
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
def test_1x1_rfaconv_loads_any_plain_convolution(bias, more):
    if more.get("norm_cfg"):
        more = dict(norm_cfg=dict(type="GN", num_groups=2))
    plain = nn.Conv2d(4, 6, 1, bias=bias).double()
    layer = build_randomly(dict(type="RFAConv"), 4, 6, 1, bias=bias, **more).double()
    layer.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5).double()
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVS)
def test_inside_a_model_with_mmengines_loader(name):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False))
    for load in (
        lambda net, state: net.load_state_dict(state, strict=True),
        lambda net, state: load_state_dict(net, state, strict=True),
    ):
        layer = build_randomly(dict(type=name), 4, 6, 3, padding=0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), layer).eval()
        load(net, plain.state_dict())
        assert layer.start.plain == ("weight",)
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONVS)
def test_subclasses_start_too(name):
    derived = type("Mine", (MODELS.get(name),), {})
    plain = nn.Conv2d(4, 6, 3, padding=1)
    layer = derived(4, 6, 3).eval()
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert layer.start.plain == ("weight", "bias")
    x = torch.rand(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("own", "given"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_precision_of_the_layer_is_kept(name, own, given):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1).to(given)
    layer = build_randomly(dict(type=name), 4, 6, 3, padding=1).to(own).eval()
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert {v.dtype for k, v in layer.state_dict().items() if "num_batches" not in k} == {own}
    # In double precision, only the rounding of the weights to the layer's own precision remains: a
    # file in half precision is exact in a higher one, and so must be the layer.
    x = torch.rand(2, 4, 5, 5).double()
    assert difference(plain.double()(x), layer.double()(x)) <= 8 * torch.finfo(own).eps
