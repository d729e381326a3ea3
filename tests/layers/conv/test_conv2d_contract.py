"""Convolutions have Conv2d's arguments and attributes, and work inside ConvModule."""

import inspect

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from torch import nn
from torch.nn import functional as F

from tests.helpers.registered import CHANNELS, CONVS, changes, conv, feature_map

GRID = [
    dict(),
    dict(stride=2),
    dict(stride=(2, 3)),
    dict(padding=1),
    dict(padding=(0, 2)),
    dict(dilation=2),
    dict(padding=(2, 3), dilation=(2, 3), stride=(3, 1)),
    dict(padding=1, groups=4),
    dict(padding=1, bias=False),
    dict(padding=1, padding_mode="reflect"),
    dict(padding=2, padding_mode="circular", stride=2),
    dict(padding=2, padding_mode="replicate", dilation=2),
]


OWN = {
    "RFAConv": ["norm_cfg", "act_cfg", "input_floor", "backend", "feature"],
    "RFCBAMConv": ["norm_cfg", "act_cfg", "input_floor", "backend", "hidden_channels"],
    "RFCAConv": ["norm_cfg", "act_cfg", "input_floor", "backend", "reduction"],
    "CAMConv": ["reduction"],
    "CBAMConv": ["reduction", "spatial_kernel_size"],
    "CAConv": ["reduction"],
}


@pytest.mark.parametrize("layer_name", CONVS)
def test_signature_lists_every_argument_in_conv2ds_order(layer_name):
    kind = MODELS.get(layer_name)
    plain = list(inspect.signature(nn.Conv2d).parameters)[:9]
    for cls in (kind, type("Derived", (kind,), {})):
        shown = inspect.signature(cls).parameters
        assert list(shown) == [*plain, *OWN[layer_name]]
        assert all(p.annotation is not p.empty for p in shown.values())
        required = [name for name, p in shown.items() if p.default is p.empty]
        assert required == ["in_channels", "out_channels", "kernel_size"]
        assert [n for n, p in shown.items() if p.kind is p.KEYWORD_ONLY] == OWN[layer_name]
    # The shown defaults are the real ones.
    defaults = {n: p.default for n, p in shown.items() if n not in required}
    torch.manual_seed(0)
    given = kind(CHANNELS, 16, 3, **defaults).state_dict()
    torch.manual_seed(0)
    left_out = kind(CHANNELS, 16, 3).state_dict()
    assert all(torch.equal(given[key], value) for key, value in left_out.items())
    by_position = kind(CHANNELS, 16, 3, 2, 3, 4, 2, False, "reflect")
    for name, value in dict(stride=2, padding=3, dilation=4).items():
        assert getattr(by_position, name) == (value, value)
    assert (by_position.groups, by_position.padding_mode) == (2, "reflect")
    assert by_position.conv.bias is None


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 3), (4, 3), 5])
@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_output_size_and_attributes_match_conv2d(layer_name, kernel, kwargs):
    kwargs = dict(dict(padding=0), **kwargs)
    x = torch.randn(1, 8, 14, 13)
    expected = nn.Conv2d(8, 12, kernel, **kwargs)
    layer = conv(layer_name, 8, 12, kernel, **kwargs).eval()
    assert layer(x).shape == expected(x).shape
    for attribute in (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "padding_mode", "transposed", "output_padding"),
    ):
        assert getattr(layer, attribute) == getattr(expected, attribute), attribute


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(stride=2),
        dict(stride=(1, 2)),
        dict(padding=2),
        dict(dilation=2, padding=2),  # keeps the size
        dict(groups=4),
        dict(bias=False),
        dict(padding_mode="reflect"),
        dict(padding_mode="replicate"),
        dict(padding_mode="circular"),
        dict(kernel_size=5, padding=2),
        dict(kernel_size=(1, 3), padding=(0, 1)),
    ],
    ids=str,
)
def test_no_argument_is_ignored(layer_name, kwargs):
    base = dict(kernel_size=3, padding=1)
    a = conv(layer_name, CHANNELS, 16, **base)
    b = conv(layer_name, CHANNELS, 16, **{**base, **kwargs})
    for layer in (a, b):
        for key, parameter in layer.named_parameters():
            if key.endswith("bias"):
                parameter.data += 0.1
    assert changes(a, b)


@pytest.mark.parametrize("layer_name", CONVS)
def test_unknown_argument_names_the_layer_and_the_valid_ones(layer_name):
    kind = MODELS.get(layer_name)
    message = (
        rf"^{layer_name}\(\) got an unexpected keyword argument 'factor'; valid: in_channels, "
    )
    for cls in (kind, type("Derived", (kind,), {})):
        with pytest.raises(TypeError, match=f"{message}.*, {', '.join(OWN[layer_name])}$"):
            cls(CHANNELS, 16, 3, factor=2)


@pytest.mark.parametrize("layer_name", CONVS)
def test_bias_is_added_to_every_output_channel(layer_name):
    with_bias = conv(layer_name, CHANNELS, 16, 3, padding=1).eval()
    without = conv(layer_name, CHANNELS, 16, 3, padding=1, bias=False).eval()
    extra = set(with_bias.state_dict()) - set(without.state_dict())
    assert len(extra) == 1, "bias is on by default, as in Conv2d, and adds one parameter"
    without.load_state_dict(with_bias.state_dict(), strict=False)
    bias = with_bias.state_dict()[extra.pop()].normal_()
    x = feature_map()
    found = with_bias(x) - without(x)
    torch.testing.assert_close(found, bias[None, :, None, None].expand_as(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(groups=3), ValueError, r"^groups=3: must divide in_channels=32 and out_channels=16"),
        (dict(padding=-1), ValueError, "^padding=-1: must be at least 0"),
        (dict(padding="same"), TypeError, "^padding='same': must be an int"),
        (dict(padding=1.0), TypeError, r"^padding=1\.0: must be an int"),
        (dict(padding=(1, 1, 1, 1)), TypeError, r"^padding=\(1, 1, 1, 1\): .*pair of ints"),
        (dict(stride=(1, 0)), ValueError, "^stride=0: must be at least 1"),
        (dict(stride=(1, "2")), TypeError, "^stride='2': must be an int"),
        (dict(dilation=(1,)), TypeError, r"^dilation=\(1,\): must be an int or a pair"),
        (dict(kernel_size=None), TypeError, "^kernel_size=None: must be an int"),
        (dict(kernel_size=4), ValueError, r"^padding=None with the even kernel_size=\(4, 4\)"),
        (dict(kernel_size=(3, 2)), ValueError, r"^padding=None with the even kernel_size=\(3, 2\)"),
        (dict(padding_mode="mirror"), ValueError, "^padding_mode='mirror': must be one of .*zeros"),
        (dict(padding_mode=None), ValueError, "^padding_mode=None: must be one of .*reflect"),
    ],
    ids=str,
)
def test_conv_arguments_are_checked_when_the_layer_is_built(layer_name, kwargs, error, message):
    with pytest.raises(error, match=message):
        conv(layer_name, **{"in_channels": 32, "out_channels": 16, "kernel_size": 3, **kwargs})


@pytest.mark.parametrize("layer_name", CONVS)
def test_maps_smaller_than_the_window_raise(layer_name):
    x = torch.randn(1, CHANNELS, 4, 9)
    layer = conv(layer_name, CHANNELS, 16, 3, padding=1, dilation=3).eval()
    message = r"\(1, 32, 4, 9\).*padding=\(1, 1\).*kernel_size=\(3, 3\).*dilation=\(3, 3\)"
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert layer(torch.randn(1, CHANNELS, 5, 9)).shape == (1, 16, 1, 5)
    for mode, widest in (("reflect", 3), ("circular", 4)):
        good = conv(layer_name, CHANNELS, 16, 3, padding=widest, padding_mode=mode).eval()
        assert good(x).shape == (1, 16, 2 + 2 * widest, 7 + 2 * widest)
        wide = conv(layer_name, CHANNELS, 16, 3, padding=widest + 1, padding_mode=mode).eval()
        with pytest.raises(ValueError, match=rf"padding_mode='{mode}'.*\(1, 32, 4, 9\)"):
            wide(x)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("norm", [None, "BN", "GN"])
@pytest.mark.parametrize("act", [None, "ReLU", "LeakyReLU"])
def test_conv_module(layer_name, norm, act):
    torch.manual_seed(0)
    norm_cfg = {"BN": dict(type="BN"), "GN": dict(type="GN", num_groups=4), None: None}[norm]
    block = ConvModule(
        CHANNELS,
        16,
        (3, 5),
        stride=(2, 1),
        padding=(1, 3),
        dilation=(1, 2),
        groups=2,
        conv_cfg=dict(type=layer_name),
        norm_cfg=norm_cfg,
        act_cfg=act and dict(type=act),
    ).eval()
    assert type(block.conv) is MODELS.get(layer_name)
    assert block.in_channels == CHANNELS
    assert block.out_channels == 16
    assert block.kernel_size == (3, 5)
    assert block.stride == (2, 1)
    assert block.padding == block.conv.padding == (1, 3)
    assert block.dilation == (1, 2)
    assert block.groups == 2
    assert block.transposed is False
    assert block.output_padding == (0, 0)
    # A bias only without a norm.
    shapes = [v.shape for v in block.conv.state_dict().values()]
    twin = conv(layer_name, CHANNELS, 16, (3, 5), padding=0, groups=2, bias=norm is None)
    assert shapes == [v.shape for v in twin.state_dict().values()]
    x = feature_map()
    expected = block.conv(x)
    if norm == "BN":
        expected = expected / (1 + 1e-5) ** 0.5
    elif norm == "GN":
        expected = F.group_norm(expected, 4)
    if act:
        expected = F.relu(expected) if act == "ReLU" else F.leaky_relu(expected)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize(
    ("mode", "own"),
    [
        ("zeros", "zeros"),
        ("zero", "zeros"),
        ("reflect", "reflect"),
        ("replicate", "replicate"),
        # mmcv 2.1 does not pass padding_mode on, so it is zeros for Conv2d too.
        ("circular", "zeros"),
    ],
)
def test_conv_module_pads_like_the_layer(layer_name, mode, own):
    block = ConvModule(
        CHANNELS,
        16,
        3,
        padding=2,
        conv_cfg=dict(type=layer_name),
        act_cfg=None,
        padding_mode=mode,
    ).eval()
    layer = conv(layer_name, CHANNELS, 16, 3, padding=2, padding_mode=own).eval()
    layer.load_state_dict(block.conv.state_dict())
    x = feature_map()
    assert block.padding == 2
    if layer_name == "RFAConv":  # attention over the whole map may depend on the border
        torch.testing.assert_close(block(x), layer(x))
    assert block(x).shape == layer(x).shape == (2, 16, 11, 9)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_through_conv_cfg(layer_name, mode):
    kwargs = dict(kernel_size=3, padding=1, act_cfg=None)
    cfg = dict(type=layer_name, padding_mode=mode)
    block = ConvModule(CHANNELS, 16, conv_cfg=cfg, **kwargs).eval()
    assert block.conv.padding_mode == mode
    layer = conv(layer_name, CHANNELS, 16, 3, padding=1, padding_mode=mode).eval()
    layer.load_state_dict(block.conv.state_dict())
    torch.testing.assert_close(block(feature_map()), layer(feature_map()))


@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_rfa_conv_of_1x1_is_conv2d(kwargs):
    kwargs = dict(dict(padding=0), **kwargs)
    plain, layer = nn.Conv2d(8, 12, 1, **kwargs), conv("RFAConv", 8, 12, 1, **kwargs)
    assert type(layer) is nn.Conv2d
    assert repr(layer) == repr(plain)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 8, 7, 5)
    assert torch.equal(layer(x), plain(x))
