"""The report of a loaded checkpoint, and strict_start."""

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from rfa_mmdet.layers.warm_start.start import WarmStartError
from rfa_mmdet.models import retrofit
from tests.helpers.edited import (
    KINDS,
    RFA,
    edited_resnet,
    plain_net,
)
from tests.helpers.norms import randomise_norms
from tests.helpers.registered import CONVS
from tests.helpers.zoo import CASES, inputs_of, relative


def test_report_of_a_classifier_checkpoint(reports):
    net = edited_resnet("RFAResNet")
    state = {
        **plain_net(18).state_dict(),
        "fc.weight": torch.zeros(1000, 64),
        "fc.bias": torch.zeros(1000),
    }
    load_state_dict(net, state)
    places = [f"layer{s}.{i}.conv1" for s in range(1, 5) for i in range(2)]
    plugins = [f"layer{s}.{i}.coord_att" for s in range(1, 5) for i in range(2)]
    new = [
        key
        for key in net.state_dict()
        if key.startswith(tuple(plugins)) and not key.endswith("num_batches_tracked")
    ]
    assert reports == [
        "\n".join(
            [
                "RFAResNet, loaded from a checkpoint:",
                f"  loaded        {len(plain_net(18).state_dict()) - 8} keys unchanged",
                f"  warm-started  8 layers from 8 keys (RFAConv): {', '.join(places)}",
                f"  new           {len(new)} keys: {', '.join(new)}",
                "  skipped       2 keys of the checkpoint: fc.weight, fc.bias",
            ]
        )
    ]


@pytest.mark.parametrize(
    ("plugin", "kinds"),
    [
        (dict(type="EMA", factor=8), "EMA"),
        (dict(type="ConAM", patch_size=1, hidden_channels=4), "ConAM, nearly"),
        (dict(type="SE", start="paper"), None),
    ],
)
def test_report_lists_plugins_that_start_as_the_identity(plugin, kinds, reports):
    cfg = dict(type="ResNet", depth=18, base_channels=8)
    net = retrofit(cfg, [dict(after=r"layer4\.\d", plugin=plugin)])
    load_state_dict(net, plain_net(18).state_dict())
    lines = reports[0].splitlines()
    names = ", ".join(net.new_layers.layers)
    expected = (
        [f"  identity      2 plug-ins start as the identity ({kinds}): {names}"] if kinds else []
    )
    assert [line for line in lines if line.startswith("  identity")] == expected
    # Its own keys win, and it is no longer reported as the identity.
    load_state_dict(net, {k: v + 1 for k, v in net.state_dict().items()})
    load_state_dict(net, plain_net(18).state_dict())
    assert "identity" not in "".join(reports[1:])


def test_report_of_a_built_module(reports):
    net = copy.deepcopy(plain_net(18))
    keys = len(net.state_dict())
    conv = dict(where=r"layer4\.\d\.conv1", conv=dict(type="RFAConv"))
    retrofit(net, [conv, dict(after=r"layer4\.\d", plugin=dict(type="SE"))])
    new = [key for key in net.state_dict() if ".se." in key]
    assert reports == [
        "\n".join(
            [
                "ResNet, retrofitted with its own weights:",
                f"  loaded        {keys - 2} keys unchanged",
                "  warm-started  2 layers from 2 keys (RFAConv): layer4.0.conv1, layer4.1.conv1",
                "  identity      2 plug-ins start as the identity (SE): layer4.0.se, layer4.1.se",
                f"  new           {len(new)} keys: {', '.join(new)}",
                "  skipped       0 keys",
            ]
        )
    ]


def test_report_of_a_built_module_does_not_speak_of_a_checkpoint(reports):
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    retrofit(net, [dict(where="0", conv=dict(type="Conv2dAdaptivePadding"))])
    assert reports[0].startswith("Sequential, retrofitted with its own weights:\n")
    assert "checkpoint" not in reports[0]


def test_lazy_modules_are_reported(reports):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(4, 1))
    retrofit(net, [dict(where="0", conv=dict(type="RFAConv"))])
    assert "loaded        2 keys unchanged" in reports[0]


def test_report_lists_at_most_a_hundred_keys(reports):
    net = edited_resnet("RFAResNet", 50)
    load_state_dict(net, {"conv1.weight": net.state_dict()["conv1.weight"]})
    own = [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]
    new = next(line for line in reports[0].splitlines() if line.startswith("  new"))
    assert new.startswith(f"  new           {len(own) - 1} keys: ")
    assert new.endswith(f", and {len(own) - 101} more")


def test_report_of_modules_shared_by_heads(reports):
    case = CASES["RTMDetHead"]
    torch.manual_seed(1)
    plain = randomise_norms(MODELS.build(copy.deepcopy(case.cfg)))
    conv = dict(type="RFAConv", bias=True, input_floor=case.floor)
    edits = [dict(where=case.where, conv=conv)]
    net = retrofit(copy.deepcopy(case.cfg), edits, strict_start=True)
    load_state_dict(net, plain.state_dict(), strict=True)
    (report,) = reports
    # Two convolutions in each of two branches, with the names of both levels.
    places = [
        f"{b}_convs.{level}.{i}.conv" for b in ("cls", "reg") for level in (0, 1) for i in (0, 1)
    ]
    assert len(net.new_layers.layers) == 4
    line = next(line for line in report.splitlines() if "warm-started" in line)
    assert line.startswith("  warm-started  8 layers from 8 keys (RFAConv): ")
    assert set(line.split(": ")[1].split(", ")) == set(places)
    assert f"loaded        {len(plain.state_dict()) - 8} keys" in report
    assert "  new           0 keys\n" in report
    assert report.endswith("  skipped       0 keys of the checkpoint")
    net.eval()
    plain.eval()
    inputs = inputs_of(case)
    assert relative(plain(*inputs), net(*inputs)) <= 1e-4


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("derived", [False, True])
def test_published_names_are_loaded(name, derived, reports):
    def net() -> nn.Module:
        module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3))
        cfg = dict(type=MODELS.get(name))
        if derived:
            cfg = dict(type=type(f"My{name}", (MODELS.get(name),), {}))
        return retrofit(module, [dict(where="1", conv=cfg)], strict_start=True)

    torch.manual_seed(0)
    source, target = net(), net()
    theirs = {f"1.{ours}": f"1.{key}" for key, ours in PUBLISHED[name].items()}
    state = {theirs.get(key, key): value for key, value in source.state_dict().items()}
    assert state.keys() != source.state_dict().keys()
    reports.clear()
    target.load_state_dict(state)
    (report,) = reports
    assert report.endswith(f": loaded all {len(state)} keys of the checkpoint")
    assert target[1].start.filled == set(source[1].state_dict())
    x = torch.rand(2, 3, 9, 9)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_report_gives_the_reason_for_skipped_keys(reports):
    norm_cfg = dict(type="GN", num_groups=1)
    rfa = dict(RFA, norm_cfg=norm_cfg)
    net = edited_resnet("RFAResNet", plugins=False, rfa=rfa, stage_with_rfa=(0, 0, 0, 1))
    state = {**plain_net(18).state_dict(), "bn1.weight": torch.ones(9)}
    load_state_dict(net, state)
    last = reports[0].splitlines()[-1]
    assert last.startswith("  skipped       3 keys of the checkpoint: ")
    assert "bn1.weight (shape (9,) instead of (8,))" in last
    assert "layer4.1.conv1.weight (its norm, GroupNorm, removes the scale of its input, so" in last
    assert "warm-started  0 layers from 0 keys\n" in reports[0]
    # A key that is not loaded does not count as loaded either.
    new = reports[0].splitlines()[-2]
    assert "bn1.weight" in new
    assert "layer4.0.conv1.conv.weight" in new


def test_a_file_for_other_parts_of_a_detector_is_not_reported(reports):
    net = nn.ModuleDict(dict(backbone=edited_resnet("RFAResNet"), head=nn.Conv2d(3, 3, 1)))
    load_state_dict(net, {"head.weight": torch.zeros(3, 3, 1, 1)})
    assert reports == []
    state = {f"backbone.{k}": v for k, v in plain_net(18).state_dict().items()}
    load_state_dict(net, state)
    assert len(reports) == 1
    assert "warm-started  8 layers from 8 keys (RFAConv): layer1.0.conv1" in reports[0]
    assert "skipped       0 keys" in reports[0]


@pytest.mark.parametrize("kind", KINDS)
def test_strict_start(kind):
    state = {
        **plain_net(18).state_dict(),
        "fc.weight": torch.zeros(1000, 64),
        "fc.bias": torch.zeros(1000),
    }
    message = (
        r"^strict_start=True: \w*ResNet does not use 2 keys of the checkpoint: fc\.weight, "
        r"fc\.bias\. To allow some"
    )
    with pytest.raises(WarmStartError, match=message):
        load_state_dict(edited_resnet(kind, strict_start=True), state)
    with pytest.raises(WarmStartError, match=r"1 keys .*: fc\.bias\. To allow some"):
        load_state_dict(edited_resnet(kind, strict_start=r"fc\.w.*"), state)
    load_state_dict(edited_resnet(kind, strict_start=r"fc\..*"), state)
    load_state_dict(edited_resnet(kind, strict_start=True), plain_net(18).state_dict())
    load_state_dict(edited_resnet(kind), state)
