"""Which new layers train or are frozen after a checkpoint, and how they are initialised."""

import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.layers.warm_start.start import Start, WarmStartError
from rfa_mmdet.models import retrofit
from tests.helpers.edited import (
    COORD,
    KINDS,
    RFA,
    edited_resnet,
    image,
    own_state,
    plain_net,
    replaced,
)
from tests.helpers.zoo import relative


def is_new(name: str, depth: int) -> bool:
    parts = name.split(".")
    return "coord_att" in parts or (
        parts[0].startswith("layer") and parts[2:3] == [replaced(depth)]
    )


def has_statistics(norm: str, depth: int, loaded: str) -> bool:
    """Return whether a checkpoint gave a norm its statistics; mmdet's own norms count as such."""
    if not is_new(norm, depth) or loaded == "own":
        return True
    return loaded == "plain" and "coord_att" not in norm


def in_frozen_stage(name: str, frozen: int) -> bool:
    if name.split(".")[0] in ("conv1", "bn1"):
        return frozen >= 0
    return name.startswith(tuple(f"layer{i}." for i in range(1, frozen + 1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("loaded", ["nothing", "plain", "own"])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_new_parameters_train_and_new_norms_use_batches(kind, depth, loaded, norm_eval):
    for frozen in range(-1, 5):
        net = edited_resnet(kind, depth, frozen_stages=frozen, norm_eval=norm_eval)
        if loaded != "nothing":
            own = loaded == "own"
            state = own_state(kind, depth) if own else plain_net(depth).state_dict()
            load_state_dict(net, state, strict=own)
        norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert sum(is_new(n, depth) for n in norms) == 2 * len(CONV_PLACES[depth])
        for training in (True, False, True):
            net.train(training)
            for name, parameter in net.named_parameters():
                still = in_frozen_stage(name, frozen) and not is_new(name, depth)
                assert parameter.requires_grad == (not still), (frozen, training, name)
            for name, norm in norms.items():
                held = norm_eval or in_frozen_stage(name, frozen)
                held &= has_statistics(name, depth, loaded)
                assert norm.training == (training and not held), (frozen, training, name)


# Number of blocks; each has one replaced convolution and one plug-in.
CONV_PLACES = {18: range(8), 50: range(16)}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_with_other_shapes_loads_nothing(kind):
    """MMEngine skips such keys with a warning; freezing them would freeze random values."""
    net = edited_resnet(kind)
    state = copy.deepcopy(own_state(kind, 18))
    odd = [k for k in state if k.endswith("coord_att.bn1.running_mean")]
    assert len(odd) == 8
    state |= {key: state[key][:-1] for key in odd}
    load_state_dict(net, state)
    net.train()
    on_batches = {n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert on_batches == {key.removesuffix(".running_mean") for key in odd}


@pytest.mark.parametrize("kind", KINDS)
def test_norms_on_batch_statistics_stay_so_after_resuming(kind):
    net = edited_resnet(kind)
    load_state_dict(net, plain_net(18).state_dict())
    expected = modes(net.train())
    state = net.state_dict()
    assert state.keys() == edited_resnet(kind).state_dict().keys()
    resumed = edited_resnet(kind)
    load_state_dict(resumed, state)
    assert modes(resumed.train()) == expected
    assert any(expected.values())
    again = edited_resnet(kind)
    load_state_dict(again, resumed.eval().state_dict())
    assert modes(again.train()) == expected
    # Without the metadata, like the backbone's part of a file, everything counts as pretrained.
    load_state_dict(again, dict(state))
    assert not any(modes(again.train()).values())
    # Also without anything frozen.
    free = edited_resnet(kind, norm_eval=False).train()
    load_state_dict(again, free.state_dict())
    assert not any(modes(again.train()).values())


@pytest.mark.parametrize("noted", [3, "layer1", [3, None], {"layer1": 1}, None])
def test_unusual_metadata_is_ignored(noted):
    net = edited_resnet("Retrofit")
    state = net.state_dict()
    state._metadata[""]["rfa_mmdet_on_batches"] = noted
    load_state_dict(net, state)
    assert not any(modes(net.train()).values())


def modes(net: nn.Module) -> dict[str, bool]:
    return {n: m.training for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [-1, 2])
def test_warm_start_with_norm_eval_matches_the_plain_net(kind, frozen):
    for depth in (18, 50):
        plain = plain_net(depth)
        net = edited_resnet(kind, depth, plugins=False, frozen_stages=frozen, norm_eval=True)
        load_state_dict(net, plain.state_dict(), strict=True)
        net.train()
        plain.train()  # ResNet's norm_eval is on by default
        inner = [m.norm for m in net.modules() if isinstance(m, RFAConv)]
        assert inner
        assert not any(norm.training for norm in inner)
        assert relative(plain(image()), net(image())) <= 1e-4
        assert not any(norm.running_mean.any() for norm in inner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", ["nothing", "plain", "own"])
def test_what_the_user_froze_stays_frozen(kind, loaded):
    net = edited_resnet(kind, frozen_stages=1)
    if loaded != "nothing":
        state = own_state(kind, 18) if loaded == "own" else plain_net(18).state_dict()
        load_state_dict(net, state)
    net.requires_grad_(False)
    for training in (True, False, True):
        net.train(training)
        assert not any(p.requires_grad for p in net.parameters())
    # Only one layer; the others keep training.
    net = edited_resnet(kind, frozen_stages=1)
    conv = net.get_submodule(f"layer1.0.{replaced(18)}")
    conv.attention.requires_grad_(False)
    net.train()
    assert not conv.attention.weight.requires_grad
    assert conv.feature.weight.requires_grad


def test_loaded_module_freezes_the_same_as_its_checkpoint():
    bias = dict(RFA, bias=True)
    edits = [dict(where=r"layer\d\.\d+\.conv1", conv=bias)]
    plain = copy.deepcopy(plain_net(18))
    plain.frozen_stages = 2
    plain.train()
    around = retrofit(plain, edits)
    loaded = edited_resnet("Retrofit", plugins=False, rfa=bias, frozen_stages=2)
    load_state_dict(loaded, plain_net(18).state_dict())
    loaded.train()
    trained = [
        {name for name, p in net.named_parameters() if p.requires_grad} for net in (around, loaded)
    ]
    assert "layer1.0.conv1.conv.bias" in trained[0]  # the plain one has none
    # A frozen convolution of a built module stays frozen.
    frozen = {f"layer{s}.{i}.conv1.conv.weight" for s in (1, 2) for i in (0, 1)}
    assert trained[0] == trained[1] - frozen
    assert frozen < trained[1]
    assert around.layer1[0].conv1.start == loaded.layer1[0].conv1.start
    modes = [{n: m.training for n, m in net.named_modules()} for net in (around, loaded)]
    assert modes[0] == modes[1]


def test_second_edit_is_tracked_too(reports):
    cfg = dict(type="ResNet", depth=18, base_channels=8, frozen_stages=4)
    net = retrofit(cfg, [dict(where=r"layer1\.\d\.conv1", conv=RFA)])
    first = net.new_layers
    retrofit(net, [dict(after=r"layer2\.\d", plugin=COORD)], strict_start=True)
    assert net.new_layers is first
    assert list(first.layers) == [
        *("layer1.0.conv1", "layer1.1.conv1"),
        *("layer2.0.coord_att", "layer2.1.coord_att"),
    ]
    reports.clear()
    load_state_dict(net, plain_net(18).state_dict())
    assert len(reports) == 1
    assert "warm-started  2 layers from 2 keys" in reports[0]
    net.train()
    trained = {n.rpartition(".coord_att.")[0] for n, p in net.named_parameters() if p.requires_grad}
    assert {"layer2.0", "layer2.1"} <= trained
    state = {**plain_net(18).state_dict(), "fc.weight": torch.zeros(1)}
    with pytest.raises(WarmStartError, match=r"fc\.weight"):  # the second edit's strict_start
        load_state_dict(net, state)


def test_values_loaded_into_a_part_of_the_module_are_kept(tmp_path):
    """A detector's backbone loads its own pretrained weights."""
    edits = [dict(after="backbone.layer4.1", plugin=dict(type="SE"))]
    backbone = dict(type="ResNet", depth=18, base_channels=8)
    detector = dict(
        type="RetinaNet",
        backbone=backbone,
        neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
        bbox_head=dict(type="RetinaHead", num_classes=2, in_channels=8, feat_channels=8),
    )
    cfg = dict(type="Retrofit", module=detector, edits=edits)
    trained = MODELS.build(copy.deepcopy(cfg)).state_dict()
    key = "backbone.layer4.1.se.fc.2.weight"
    trained[key].fill_(0.5)
    file = saved(tmp_path / "trained.pth", dict(state_dict=trained))
    backbone["init_cfg"] = dict(file, prefix="backbone.")
    net = MODELS.build(cfg)
    net.init_weights()
    assert torch.equal(net.state_dict()[key], trained[key])


def test_start_of_third_party_layers():
    @MODELS.register_module(name="ForeignConv", force=True)
    class ForeignConv(nn.Conv2d):
        pass

    edits = [dict(where="0", conv=dict(type="ForeignConv")), dict(where="1", conv=RFA)]
    net = retrofit(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), edits)
    foreign, own = net[0], net[1]
    kept = net.new_layers
    assert kept.start_of("0") == Start()
    assert kept.start_of("1") == own.start != Start()  # from the replaced convolution
    attributes = set(vars(foreign))
    net.load_state_dict({"0.weight": torch.zeros(4, 3, 3, 3)}, strict=False)
    net.load_state_dict({"0.bias": torch.zeros(4), "1.conv.bias": torch.zeros(4)}, strict=False)
    assert kept.start_of("0") == Start(frozenset({"weight", "bias"}))
    assert set(vars(foreign)) == attributes
    # A copy has its own record.
    twin = copy.deepcopy(net)
    twin.load_state_dict({"1.conv.weight": own.conv.weight.data}, strict=False)
    assert twin.new_layers.start_of("1") == twin[1].start
    assert kept.start_of("1") == own.start


def test_plugins_get_the_dtype_of_a_loaded_module():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).double()
    retrofit(net, [dict(after="0", plugin=dict(type="EMA", factor=4))])
    retrofit(net, [dict(after="1", plugin=dict(type="SE", in_channels=8))])  # has no parameters
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert net(torch.rand(1, 3, 8, 8).double()).dtype == torch.float64


def saved(path, state: dict) -> dict:
    torch.save(state, path)
    return dict(type="Pretrained", checkpoint=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_pretrained_checkpoint_warm_starts_a_module(kind, tmp_path, reports):
    plain = plain_net(18)
    init_cfg = saved(tmp_path / "plain.pth", dict(state_dict=plain.state_dict()))
    net = edited_resnet(kind, plugins=False, init_cfg=init_cfg, strict_start=True)
    before = net.layer1[0].conv1.start
    assert not before.filled
    net.init_weights()
    assert len(reports) == 1
    assert "warm-started  8 layers from 8 keys (RFAConv)" in reports[0]
    net.eval()
    plain.eval()
    assert relative(plain(image()), net(image())) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["scratch", "pretrained"])
def test_init_weights_starts_new_layers_in_their_own_way(kind, first, tmp_path):
    # The backbone's own init would clearly change depthwise and grouped convolutions.
    init_cfg = [dict(type="Constant", val=7.0, layer="Conv2d")]
    if first == "pretrained":
        init_cfg.append(saved(tmp_path / "plain.pth", plain_net(18).state_dict()))
    rfa = dict(RFA, norm_cfg=dict(type="GN", num_groups=1))  # rejects the plain convolution
    net = edited_resnet(kind, rfa=rfa, plugins=False, init_cfg=init_cfg)
    net.init_weights()
    conv = net.layer1[0].conv1
    for own in (conv.attention, conv.feature):
        limit = 1 / own.weight[0].numel() ** 0.5  # torch's uniform
        assert 0.5 * limit < own.weight.abs().max().item() <= limit
    stem = net.state_dict()["conv1.weight"]
    if first == "scratch":
        assert bool((stem == 7).all())
    else:
        assert torch.equal(stem, plain_net(18).state_dict()["conv1.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_second_init_weights_changes_nothing(kind):
    net = edited_resnet(kind)
    net.init_weights()
    before = copy.deepcopy(net.state_dict())
    net.init_weights()  # MMEngine warns and does nothing
    after = net.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
