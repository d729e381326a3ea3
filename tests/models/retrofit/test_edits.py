"""Errors for invalid edits, and the plan of a dry run."""

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from rfa_mmdet.layers import EMA
from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.models import retrofit


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")


NET = dict(type="ResNet", depth=50, base_channels=8)
RFA = dict(type="RFAConv")


@pytest.mark.parametrize(
    ("edits", "kind", "message"),
    [
        ([], TypeError, r"^edits=\[\]: must be a list of dicts, at least one"),
        (dict(where="x", conv=RFA), TypeError, "^edits=.*must be a list of dicts"),
        (["x"], TypeError, r"^edits\[0\]='x': must be dict\(where="),
        ([dict(where="x")], ValueError, r"^edits\[0\] has the keys \['where'\]: must be"),
        ([dict(where="x", plugin=RFA)], ValueError, r"^edits\[0\] has the keys"),
        ([dict(where="x", conv="RFAConv")], TypeError, r"^edits\[0\]: conv='RFAConv'"),
        ([dict(where="(", conv=RFA)], ValueError, r"^edits\[0\]: where='\(' is not a regular"),
        ([dict(where="x", conv=dict(type="RFAConf"))], ValueError, "'RFAConf' is not registered"),
        (
            [dict(where=r"layer2\.0\.conf2", conv=RFA)],
            ValueError,
            r"matches no module; similar names \(of \d+\): layer2\.0\.conv2",
        ),
        (
            [dict(after=r"layer5", plugin=dict(type="SE"))],
            ValueError,
            r"^edits\[0\]: after='layer5' matches no module; similar names \(of \d+\): layer\d",
        ),
        (
            [dict(where=r"layer2\.0\.conv\d", conv=RFA)],
            ValueError,
            r"layer2\.0\.conv1 is a 1x1 convolution.*also matches layer2\.0\.conv2, which can be",
        ),
        (
            [dict(where=r"layer2\.0\.bn2", conv=RFA)],
            ValueError,
            r"layer2\.0\.bn2 is a BatchNorm2d, not a plain convolution; similar",
        ),
        (
            [dict(where=r"layer2\.0\.conv2", conv=RFA)] * 2,
            ValueError,
            r"^edits\[1\].* matches layer2\.0\.conv2, which edits\[0\] already replaces",
        ),
        (
            [dict(where=r"layer2\.0\.conv2", conv=dict(RFA, no_such=1))],
            TypeError,
            r"layer2\.0\.conv2: .*no_such.* does not fit here",
        ),
        (
            [dict(after=r"layer2\.0", plugin=dict(type="EMA", factor=5))],
            ValueError,
            r"layer2\.0: .*does not fit here: factor=5: must divide in_channels=64",
        ),
        (
            [dict(after=r"layer2\.0", plugin=dict(type="SE"))] * 2,
            ValueError,
            r"layer2\.0 already has a 'se'; add a postfix",
        ),
        (
            [dict(after=r"relu", plugin=dict(type="SE"))],
            ValueError,
            "^relu: .*output channels of a ReLU are unknown; pass example_input, or set in_",
        ),
    ],
)
def test_invalid_edits_give_clear_errors(edits, kind, message):
    with pytest.raises(kind, match=message):
        retrofit(dict(NET), edits)


def test_layer_without_groups_support_raises():
    @MODELS.register_module(name="UngroupedConv", force=True)
    class UngroupedConv(nn.Conv2d):
        def __init__(self, *args, groups=1, **kwargs):
            if groups != 1:
                raise ValueError(f"groups={groups}: must be 1")
            super().__init__(*args, **kwargs)

    cfg = dict(type="ResNeXt", depth=50, base_channels=8, groups=4, base_width=8)
    with pytest.raises(ValueError, match=r"^layer4\.0\.conv2: .*groups=4: must be 1"):
        retrofit(cfg, [dict(where=r"layer4\.\d\.conv2", conv=dict(type="UngroupedConv"))])


def test_rejected_edit_changes_nothing():
    net = MODELS.build(dict(NET))
    before = copy.deepcopy(net)
    edits = [
        dict(where=r"layer4\.\d\.conv2", conv=RFA),
        dict(after=r"layer4\.\d", plugin=dict(type="EMA", factor=7)),
    ]
    with pytest.raises(ValueError, match="factor=7"):
        retrofit(net, edits)
    assert net.state_dict().keys() == before.state_dict().keys()
    assert not any(isinstance(m, AttentionConv2d | EMA) for m in net.modules())


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            dict(where="2", conv=dict(type="RFAConv", norm_cfg=dict(type="GN", num_groups=2))),
            "^2: RFAConv cannot start from the convolution that it replaces: .*",
        ),
        (
            dict(where="2", conv=dict(type="RFAConv", bias=False)),
            "^2: RFAConv cannot start .*: the plain convolution has a bias, but this layer has no",
        ),
        (dict(after="1", plugin=dict(type="SE")), "^1 already has a 'se'; add a postfix"),
    ],
)
def test_a_built_module_that_cannot_be_edited_is_unchanged(second, message):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3))
    before, x = copy.deepcopy(net), torch.randn(1, 4, 9, 9)
    first = [dict(where="0", conv=RFA), dict(after="1", plugin=dict(type="SE"))]
    with pytest.raises(ValueError, match=message):
        retrofit(net, [*first, second])
    assert repr(net) == repr(before)
    assert torch.equal(net(x), before(x))


def test_plugin_after_a_sequential_with_its_own_forward():
    class Pooling(nn.Sequential):
        def forward(self, x):
            return self[0](x) + 1

    net = nn.Sequential(Pooling(nn.Conv2d(4, 4, 1), nn.ReLU()))
    x = torch.randn(2, 4, 5, 5)
    expected = net(x)
    net = retrofit(net, [dict(after="0", plugin=dict(type="SE", in_channels=4, start="paper"))])
    torch.testing.assert_close(net(x), net[0].se(expected))


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        (dict(module="ResNet"), TypeError, "^module='ResNet': must be a config"),
        (
            dict(module=nn.Conv2d(3, 3, 3), train_cfg=1),
            ValueError,
            "^train_cfg: only valid if module",
        ),
        (dict(module=dict(NET), strict_start=3), TypeError, "^strict_start=3: must be"),
        (
            dict(module=dict(NET), strict_start="("),
            ValueError,
            r"^strict_start='\(' is not a regular",
        ),
    ],
)
def test_invalid_arguments_give_clear_errors(kwargs, kind, message):
    with pytest.raises(kind, match=message):
        retrofit(edits=[dict(where=r"layer2\.0\.conv2", conv=RFA)], **kwargs)


def test_shape_mismatch_names_the_layer_and_both_shapes():
    plain = MODELS.build(dict(NET, base_channels=16))
    net = retrofit(dict(NET), [dict(where=r"layer4\.0\.conv2", conv=RFA)])
    message = r"layer4\.0\.conv2\.weight: .*\(128, 128, 3, 3\), but the RFAConv .*\(64, 64, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        load_state_dict(net, plain.state_dict(), strict=False)


def test_dry_run_only_prints_the_plan(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    edits = [
        dict(where=r"layer4\.0\.conv2", conv=RFA),
        dict(after=r"layer4\.2", plugin=dict(type="EMA")),
    ]
    net = retrofit(dict(NET), edits, dry_run=True)
    assert not any(isinstance(m, AttentionConv2d | EMA) for m in net.modules())
    out = capsys.readouterr().out
    # 64 channels: 64 * (81 + 9 + 18) more
    for text in ("layer4.0.conv2", "Conv2d 64 -> 64, 3x3", "RFAConv", "+6,912", "EMA as .ema"):
        assert text in out, text
