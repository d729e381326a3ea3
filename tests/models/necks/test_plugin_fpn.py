"""PluginFPN: outputs with plug-ins, keys, and FPN checkpoints."""

import pytest
import torch
from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_mmdet.layers import EMA, SE, RFAConv
from rfa_mmdet.layers.warm_start.start import WarmStartError
from rfa_mmdet.models.necks.plugin_fpn import PluginFPN

CHANNELS = [8, 16, 32]
EMA8 = dict(type="EMA", factor=8)
LATERAL = dict(cfg=EMA8, position="after_lateral")
OUTPUT = dict(cfg=dict(type="SE", hidden_channels=4), position="after_output")
RFA = dict(type="RFAConv")


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")


def maps(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    sides = [(20, 12), (10, 6), (5, 3)]
    return tuple(
        torch.randn(2, c, *side, generator=generator)
        for c, side in zip(CHANNELS, sides, strict=True)
    )


def neck(num_outs: int = 3, seed: int = 0, **kwargs) -> PluginFPN:
    torch.manual_seed(seed)
    cfg = dict(type="PluginFPN", in_channels=CHANNELS, out_channels=16, num_outs=num_outs)
    return MODELS.build({**cfg, **kwargs})


def through(module: nn.Module, x: Tensor, *plugins: str) -> Tensor:
    """Apply the convolution of a ConvModule, then its plug-ins by name."""
    x = module.conv(x)
    for name in plugins:
        x = getattr(module, name)(x)
    return x


def by_hand(net: PluginFPN, xs: tuple, lateral: dict, output: dict) -> list[Tensor]:
    """Apply FPN's formula; the dicts name the plug-ins of each level."""
    levels = [
        through(c, x, *lateral.get(i, ()))
        for i, (c, x) in enumerate(zip(net.lateral_convs, xs, strict=True))
    ]
    for i in range(len(levels) - 1, 0, -1):
        up = F.interpolate(levels[i], size=levels[i - 1].shape[2:], mode="nearest")
        levels[i - 1] = levels[i - 1] + up
    return [through(net.fpn_convs[i], x, *output.get(i, ())) for i, x in enumerate(levels)]


def assert_equal(found: tuple, expected: list, tolerance: float = 1e-6) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).detach().abs().max() / b.detach().abs().max()) <= tolerance


# --------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("levels", [(0,), (1, 2), (2,), None])
@pytest.mark.parametrize("position", ["after_lateral", "after_output"])
def test_plugins_are_at_the_chosen_positions(position, levels):
    plugin = dict(cfg=EMA8, position=position) | ({} if levels is None else dict(levels=levels))
    net, xs = neck(plugins=[plugin]), maps()
    names = dict.fromkeys((0, 1, 2) if levels is None else levels, ("ema",))
    lateral, output = (names, {}) if position == "after_lateral" else ({}, names)
    found = net(xs)
    assert_equal(found, by_hand(net, xs, lateral, output))
    convs = net.lateral_convs if position == "after_lateral" else net.fpn_convs
    assert {i for i, conv in enumerate(convs) if hasattr(conv, "ema")} == set(names)
    assert sum(isinstance(m, EMA) for m in net.modules()) == len(names)
    # They have an effect at each of these levels.
    without = by_hand(net, xs, {}, {})
    changed = {i for i, (a, b) in enumerate(zip(found, without, strict=True)) if not a.equal(b)}
    below = set(range(max(names) + 1))  # the top-down sum
    assert changed == (below if lateral else set(names))


def test_both_positions_and_several_plugins_in_order():
    plugins = [
        dict(LATERAL, levels=(0, 2)),
        dict(OUTPUT, levels=[1]),
        dict(cfg=dict(EMA8, postfix="_last"), position="after_output", levels=(1, 2)),
    ]
    net, xs = neck(plugins=plugins), maps()
    lateral = {0: ("ema",), 2: ("ema",)}
    output = {1: ("se", "ema_last"), 2: ("ema_last",)}
    assert_equal(net(xs), by_hand(net, xs, lateral, output))
    swapped = by_hand(net, xs, lateral, {**output, 1: ("ema_last", "se")})
    assert not torch.allclose(net(xs)[1], swapped[1], rtol=1e-4, atol=1e-4)
    assert isinstance(net.fpn_convs[1].se, SE)


def test_levels_start_at_the_finest():
    plugins = [dict(LATERAL, levels=(0,)), dict(OUTPUT, levels=(1,))]
    net, xs = neck(2, start_level=1, plugins=plugins), maps()
    assert len(net.lateral_convs) == 2
    assert_equal(net(xs), by_hand(net, xs[1:], {0: ("ema",)}, {1: ("se",)}))


@pytest.mark.parametrize("source", ["on_input", "on_lateral", "on_output"])
def test_extra_convolutions_have_plugins_and_conv_cfg_too(source):
    kwargs = dict(add_extra_convs=source, conv_cfg=RFA)
    net = neck(5, plugins=[dict(OUTPUT, levels=(0, 3, 4))], **kwargs).eval()
    xs = maps()
    levels = by_hand(net, xs, {}, {0: ("se",)})
    laterals = [conv.conv(x) for conv, x in zip(net.lateral_convs, xs, strict=True)]
    start = dict(on_input=xs[2], on_lateral=laterals[2], on_output=levels[2])[source]
    levels.append(through(net.fpn_convs[3], start, "se"))
    levels.append(through(net.fpn_convs[4], levels[3], "se"))
    assert_equal(net(xs), levels)
    assert [type(conv.conv) for conv in net.fpn_convs] == [RFAConv] * 5
    assert [conv.conv.stride for conv in net.fpn_convs[3:]] == [(2, 2)] * 2


def test_pooled_levels_have_neither():
    net, xs = neck(5, plugins=[OUTPUT], conv_cfg=RFA).eval(), maps()
    levels = by_hand(net, xs, {}, dict.fromkeys(range(3), ("se",)))
    for _ in range(2):
        levels.append(levels[-1][..., ::2, ::2])
    assert_equal(net(xs), levels)
    assert len(net.fpn_convs) == 3


@pytest.mark.parametrize("more", [{}, dict(norm_cfg=dict(type="BN")), dict(add_extra_convs=True)])
def test_conv_cfg_only_applies_to_3x3_convolutions(more):
    net, plain = neck(4, conv_cfg=RFA, **more), FPN(CHANNELS, 16, 4, **more)
    assert {type(conv.conv) for conv in net.lateral_convs} == {nn.Conv2d}
    assert {type(conv.conv) for conv in net.fpn_convs} == {RFAConv}
    for new, old in zip(net.fpn_convs, plain.fpn_convs, strict=True):
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding"):
            assert getattr(new.conv, attribute) == getattr(old.conv, attribute)
        assert (new.conv.conv.bias is None) == (old.conv.bias is None)


# --------------------------------------------------------------------------- keys and checkpoints


def test_other_keys_match_fpn():
    plain = FPN(CHANNELS, 16, 5, add_extra_convs="on_input").state_dict()
    kwargs = dict(add_extra_convs="on_input", plugins=[LATERAL, OUTPUT])
    net = neck(5, conv_cfg=RFA, **kwargs)
    new = tuple(f"{name}." for name in net.new_layers.layers)
    assert len(new) == 3 + 5 + 5
    own = {k: v.shape for k, v in net.state_dict().items() if not k.startswith(new)}
    assert own == {k: v.shape for k, v in plain.items() if not k.startswith(new)}
    # Without conv_cfg, all of FPN's keys; without any argument, exactly FPN's.
    assert set(plain) <= set(neck(5, **kwargs).state_dict())
    assert set(neck(5, add_extra_convs="on_input").state_dict()) == set(plain)


@torch.no_grad()
def test_without_arguments_it_equals_fpn():
    net, plain = neck(4), FPN(CHANNELS, 16, 4)
    plain.load_state_dict(net.state_dict(), strict=True)
    assert all(a.equal(b) for a, b in zip(net(maps()), plain(maps()), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("extra", [False, "on_input", "on_output"])
def test_fpn_checkpoint_warm_starts_it(extra):
    torch.manual_seed(1)
    plain = FPN(CHANNELS, 16, 5, add_extra_convs=extra)
    kwargs = dict(add_extra_convs=extra, strict_start=True)
    net = neck(5, conv_cfg=dict(RFA, input_floor=-64.0), **kwargs).eval()
    load_state_dict(net, plain.state_dict(), strict=True)
    # float32 keeps 24 bits of a shift by 64.
    assert_equal(net(maps()), list(plain(maps())), 1e-4)
    # Without the floor, values below 0 are clipped.
    net = neck(5, conv_cfg=RFA, **kwargs).eval()
    load_state_dict(net, plain.state_dict(), strict=True)
    with pytest.raises(AssertionError):
        assert_equal(net(maps()), list(plain(maps())), 1e-2)


def test_strict_start_and_other_shapes():
    state = {**FPN(CHANNELS, 16, 3).state_dict(), "old.weight": torch.zeros(1)}
    with pytest.raises(
        WarmStartError, match=r"PluginFPN does not use 1 keys of the checkpoint: old\.weight"
    ):
        load_state_dict(neck(conv_cfg=RFA, strict_start=True), state)
    load_state_dict(neck(conv_cfg=RFA, strict_start=r"old\..*"), state)
    message = r"fpn_convs\.0\.conv\.weight: .*\(24, 24, 3, 3\), but the RFAConv .*\(16, 16, 3, 3\)"
    with pytest.raises(WarmStartError, match=message):
        load_state_dict(neck(conv_cfg=RFA), FPN(CHANNELS, 24, 3).state_dict())


def test_init_weights_keeps_the_scale_of_new_layers():
    net = neck(conv_cfg=RFA, plugins=[LATERAL])
    net.init_weights()
    conv = net.fpn_convs[0].conv
    assert 0.5 < conv.attention.weight.abs().max().item() <= 1  # torch's, for a fan of 1
    assert 0.2 < conv.feature.weight.abs().max().item() <= 1 / 3  # and of 9


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("extra", ["on_input", "on_lateral", "on_output"])
def test_every_parameter_gets_a_gradient(extra):
    net = neck(5, add_extra_convs=extra, conv_cfg=RFA, plugins=[LATERAL, OUTPUT])
    xs = tuple(x.requires_grad_() for x in maps())
    out = net(xs)
    torch.manual_seed(1)
    torch.autograd.backward(out, [torch.randn_like(y) for y in out])
    assert all(x.grad.any() for x in xs)
    unreached = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        (dict(plugins=["EMA"]), TypeError, r"^plugins\[0\]='EMA': must be dict\(cfg="),
        (dict(plugins=[dict(cfg=EMA8)]), TypeError, r"^plugins\[0\]=.*must be dict\(cfg="),
        (dict(plugins=[LATERAL, dict(position="after_output")]), TypeError, r"^plugins\[1\]="),
        (dict(plugins=LATERAL), TypeError, r"^plugins=.*: must be a list of dicts"),
        (
            dict(plugins=[dict(LATERAL, stages=(0,))]),
            ValueError,
            r"^plugins\[0\] has the keys \['cfg', 'position', 'stages'\]: must be cfg, position",
        ),
        (
            dict(plugins=[dict(cfg=EMA8, position="after_conv1")]),
            ValueError,
            r"^plugins\[0\]: position='after_conv1': must be one of \('after_lateral', 'after_out",
        ),
        (
            dict(plugins=[dict(LATERAL, levels=(0, 3))]),
            ValueError,
            r"^plugins\[0\]: levels=\(0, 3\): must be in \(0, 1, 2\) for after_lateral",
        ),
        (dict(plugins=[dict(LATERAL, levels=())]), ValueError, r"^plugins\[0\]: levels=\(\): "),
        (dict(plugins=[dict(LATERAL, levels=(-1,))]), ValueError, r"^plugins\[0\]: levels=\(-1,\)"),
        (dict(plugins=[dict(LATERAL, levels=1)]), TypeError, r"^plugins\[0\]: levels=1: must be a"),
        (
            dict(num_outs=5, plugins=[dict(OUTPUT, levels=(3,))]),
            ValueError,
            r"levels=\(3,\): must be in \(0, 1, 2\) for after_output",  # the others are pooled
        ),
        (
            dict(plugins=[dict(LATERAL, cfg=dict(type="EMMA"))]),
            ValueError,
            r"^plugins\[0\]\.cfg\.type='EMMA' is not registered",
        ),
        (
            dict(plugins=[dict(LATERAL, cfg=dict(type="EMA", factor=7))]),
            ValueError,
            r"^lateral_convs\.0: .*factor=7: must divide in_channels=16",
        ),
        (
            dict(plugins=[LATERAL, LATERAL]),
            ValueError,
            r"^lateral_convs\.0 already has a 'ema'; add a postfix to the plug-in",
        ),
        (dict(conv_cfg="RFAConv"), TypeError, "^conv_cfg='RFAConv': must be a dict with a 'type'"),
        (
            dict(conv_cfg=dict(type="RFACov")),
            ValueError,
            r"^conv_cfg\.type='RFACov' is not registered",
        ),
        (
            dict(strict_start=1),
            TypeError,
            r"^strict_start=1: must be a bool or a regular expression",
        ),
        (dict(no_such=1), TypeError, "no_such"),
    ],
)
def test_invalid_arguments_give_clear_errors(kwargs, kind, message):
    with pytest.raises(kind, match=message):
        PluginFPN(**{**dict(in_channels=CHANNELS, out_channels=16, num_outs=3), **kwargs})
