"""What trains and what is held, after which checkpoint; and what the report of a load says."""

import copy
import functools

import pytest
import torch
from mmdet.models.backbones.resnet import ResNet
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from rfa_mmdet.layers.warm_start.start import WarmStartError
from rfa_mmdet.models import RFAResNet, retrofit
from rfa_mmdet.models.retrofit import new_layers
from tests.helpers.zoo import CASES, flat, inputs_of, stir

RFA = dict(type="RFAConv")
COORD = dict(type="CoordAtt")  # a plug-in with a BN in it
KINDS = ("RFAResNet", "Retrofit")
CONVS = ("RFAConv", "RFCBAMConv", "RFCAConv", "CAMConv", "CBAMConv", "CAConv")


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")


@pytest.fixture
def reports(monkeypatch) -> list[str]:
    """What is logged while loading."""
    found = []
    monkeypatch.setattr(new_layers, "print_log", lambda text, logger: found.append(text))
    return found


def replaced(depth: int) -> str:
    return "conv1" if depth < 50 else "conv2"


def build(kind: str, depth: int = 18, plugins: bool = True, rfa: dict = RFA, **kwargs) -> nn.Module:
    """ResNet with RFAConv in every block, and a plug-in where the kind puts it."""
    kwargs = dict(base_channels=8, **kwargs)
    if kind == "RFAResNet":
        plugins = [dict(cfg=COORD, position="after_conv2")] if plugins else None
        return RFAResNet(depth, rfa=rfa, plugins=plugins, **kwargs)
    edits = [dict(where=rf"layer\d\.\d+\.{replaced(depth)}", conv=rfa)]
    edits += [dict(after=r"layer\d\.\d+", plugin=COORD)] if plugins else []
    strict = {k: kwargs.pop(k) for k in ("strict_start",) if k in kwargs}
    module = dict(type="ResNet", depth=depth, **kwargs)
    return MODELS.build(dict(type="Retrofit", module=module, edits=edits, **strict))


@functools.cache
def plain_net(depth: int) -> nn.Module:
    torch.manual_seed(1)
    return stir(ResNet(depth, base_channels=8))


@functools.cache
def own_state(kind: str, depth: int) -> dict[str, Tensor]:
    return build(kind, depth).state_dict()


def is_new(name: str, depth: int) -> bool:
    parts = name.split(".")
    return "coord_att" in parts or (
        parts[0].startswith("layer") and parts[2:3] == [replaced(depth)]
    )


def is_filled(name: str, depth: int, loaded: str) -> bool:
    """Whether a checkpoint gave this name its value; what is mmdet's counts as if one had."""
    if not is_new(name, depth) or loaded == "own":
        return True
    by_plain = (".conv.weight", ".norm.running_mean", ".norm.running_var")
    return loaded == "plain" and "coord_att" not in name and name.endswith(by_plain)


def in_frozen_stage(name: str, frozen: int) -> bool:
    if name.split(".")[0] in ("conv1", "bn1"):
        return frozen >= 0
    return name.startswith(tuple(f"layer{i}." for i in range(1, frozen + 1)))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def relative(a: object, b: object) -> float:
    pairs = zip(flat(a), flat(b), strict=True)
    return max(float((x - y).detach().abs().max() / x.detach().abs().max()) for x, y in pairs)


# --------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("loaded", ["nothing", "plain", "own"])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_only_what_a_checkpoint_filled_is_frozen_or_held(kind, depth, loaded, norm_eval):
    for frozen in range(-1, 5):
        net = build(kind, depth, frozen_stages=frozen, norm_eval=norm_eval)
        if loaded != "nothing":
            own = loaded == "own"
            state = own_state(kind, depth) if own else plain_net(depth).state_dict()
            load_state_dict(net, state, strict=own)
        norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert sum(is_new(n, depth) for n in norms) == 2 * len(CONV_PLACES[depth])
        for training in (True, False, True):
            net.train(training)
            for name, parameter in net.named_parameters():
                still = in_frozen_stage(name, frozen) and is_filled(name, depth, loaded)
                assert parameter.requires_grad == (not still), (frozen, training, name)
            for name, norm in norms.items():
                held = norm_eval or in_frozen_stage(name, frozen)
                held &= is_filled(f"{name}.running_mean", depth, loaded)
                assert norm.training == (training and not held), (frozen, training, name)


# Number of blocks, each with one replaced convolution and one plug-in.
CONV_PLACES = {18: range(8), 50: range(16)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_other_shapes_fills_nothing(kind):
    """MMEngine leaves such keys out with a warning: holding them would hold random values."""
    net = build(kind, frozen_stages=4)
    state = copy.deepcopy(own_state(kind, 18))
    odd = [k for k in state if "coord_att.conv_h" in k or k.endswith("attention.weight")]
    assert len(odd) == 8 * 3
    state |= {key: state[key][:-1] for key in odd}
    load_state_dict(net, state)
    net.train()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == set(odd)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [-1, 2])
def test_a_warm_start_under_norm_eval_computes_what_the_plain_net_does(kind, frozen):
    for depth in (18, 50):
        plain = plain_net(depth)
        net = build(kind, depth, plugins=False, frozen_stages=frozen, norm_eval=True)
        load_state_dict(net, plain.state_dict(), strict=True)
        net.train()
        plain.train()  # ResNet's norm_eval is on by default
        inner = [m.norm for m in net.modules() if isinstance(m, RFAConv)]
        assert inner
        assert not any(norm.training for norm in inner)
        assert relative(plain(image()), net(image())) <= 1e-4
        # It is the held norms that make it so.
        for norm in inner:
            norm.train()
        assert relative(plain(image()), net(image())) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", ["nothing", "plain", "own"])
def test_what_the_user_froze_stays_frozen(kind, loaded):
    net = build(kind, frozen_stages=1)
    if loaded != "nothing":
        state = own_state(kind, 18) if loaded == "own" else plain_net(18).state_dict()
        load_state_dict(net, state)
    net.requires_grad_(False)
    for training in (True, False, True):
        net.train(training)
        assert not any(p.requires_grad for p in net.parameters())
    # One layer alone: the others keep training.
    net = build(kind, frozen_stages=1)
    conv = net.get_submodule(f"layer1.0.{replaced(18)}")
    conv.attention.requires_grad_(False)
    net.train()
    assert not conv.attention.weight.requires_grad
    assert conv.feature.weight.requires_grad


def test_around_a_loaded_module_the_same_is_frozen_as_after_its_checkpoint():
    bias = dict(RFA, bias=True)
    edits = [dict(where=r"layer\d\.\d+\.conv1", conv=bias)]
    plain = copy.deepcopy(plain_net(18))
    plain.frozen_stages = 2
    plain.train()
    around = retrofit(plain, edits)
    loaded = build("Retrofit", plugins=False, rfa=bias, frozen_stages=2)
    load_state_dict(loaded, plain_net(18).state_dict())
    loaded.train()
    trained = [
        {name for name, p in net.named_parameters() if p.requires_grad} for net in (around, loaded)
    ]
    assert trained[0] == trained[1]
    assert "layer1.0.conv1.conv.bias" in trained[0]  # the plain one had none
    assert "layer1.0.conv1.conv.weight" not in trained[0]
    assert around.layer1[0].conv1.start == loaded.layer1[0].conv1.start
    modes = [{n: m.training for n, m in net.named_modules()} for net in (around, loaded)]
    assert modes[0] == modes[1]


def test_around_a_loaded_module_plugins_have_its_precision():
    net = nn.Sequential(nn.Conv2d(3, 8, 3)).double()
    retrofit(net, [dict(after="0", plugin=dict(type="EMA", factor=4))])
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert net(torch.rand(1, 3, 8, 8).double()).dtype == torch.float64


# --------------------------------------------------------------------------- the report


def test_report_of_a_classifiers_checkpoint(reports):
    net = build("RFAResNet")
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
                "RFAResNet, from its checkpoint:",
                f"  loaded        {len(plain_net(18).state_dict()) - 8} keys as they are",
                f"  warm-started  8 keys, for 8 layers (RFAConv): {', '.join(places)}",
                f"  new           {len(new)} keys: {', '.join(new)}",
                "  skipped       2 keys of the checkpoint: fc.weight, fc.bias",
            ]
        )
    ]


def test_report_names_at_most_a_hundred_keys(reports):
    net = build("RFAResNet", 50)
    load_state_dict(net, {"conv1.weight": net.state_dict()["conv1.weight"]})
    own = [key for key in net.state_dict() if not key.endswith("num_batches_tracked")]
    new = next(line for line in reports[0].splitlines() if line.startswith("  new"))
    assert new.startswith(f"  new           {len(own) - 1} keys: ")
    assert new.endswith(f", and {len(own) - 101} more")


def test_report_of_modules_that_heads_share(reports):
    case = CASES["RTMDetHead"]
    torch.manual_seed(1)
    plain = stir(MODELS.build(copy.deepcopy(case.cfg)))
    conv = dict(type="RFAConv", bias=True, input_floor=case.floor)
    edits = [dict(where=case.where, conv=conv)]
    net = retrofit(copy.deepcopy(case.cfg), edits, strict_start=True)
    load_state_dict(net, plain.state_dict(), strict=True)
    (report,) = reports
    # Two convolutions of each of two branches, under the names of both levels.
    places = [
        f"{b}_convs.{level}.{i}.conv" for b in ("cls", "reg") for level in (0, 1) for i in (0, 1)
    ]
    assert len(net.new_layers.layers) == 4
    line = next(line for line in report.splitlines() if "warm-started" in line)
    assert line.startswith("  warm-started  8 keys, for 8 layers (RFAConv): ")
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
    target.load_state_dict(state)
    (report,) = reports
    assert report.endswith(f", from its checkpoint: all {len(state)} keys")
    assert target[1].start.filled == set(source[1].state_dict())
    x = torch.rand(2, 3, 9, 9)
    assert torch.equal(target.eval()(x), source.eval()(x))


def test_report_says_why_a_key_is_skipped(reports):
    norm_cfg = dict(type="GN", num_groups=1)
    rfa = dict(RFA, norm_cfg=norm_cfg)
    net = build("RFAResNet", plugins=False, rfa=rfa, stage_with_rfa=(0, 0, 0, 1))
    state = {**plain_net(18).state_dict(), "bn1.weight": torch.ones(9)}
    load_state_dict(net, state)
    last = reports[0].splitlines()[-1]
    assert last.startswith("  skipped       3 keys of the checkpoint: ")
    assert "bn1.weight (shape (9,), here (8,))" in last
    assert "layer4.1.conv1.weight (its norm, GroupNorm, cannot be the identity; BN can)" in last
    assert "warm-started  0 keys, for 0 layers\n" in reports[0]
    # The key that was not loaded is not counted as filled from the checkpoint either.
    new = reports[0].splitlines()[-2]
    assert "bn1.weight" in new
    assert "layer4.0.conv1.conv.weight" in new


def test_a_file_for_other_parts_of_a_detector_is_not_reported(reports):
    net = nn.ModuleDict(dict(backbone=build("RFAResNet"), head=nn.Conv2d(3, 3, 1)))
    load_state_dict(net, {"head.weight": torch.zeros(3, 3, 1, 1)})
    assert reports == []
    state = {f"backbone.{k}": v for k, v in plain_net(18).state_dict().items()}
    load_state_dict(net, state)
    assert len(reports) == 1
    assert "warm-started  8 keys, for 8 layers (RFAConv): layer1.0.conv1" in reports[0]
    assert "skipped       0 keys" in reports[0]


@pytest.mark.parametrize("kind", KINDS)
def test_strict_start(kind):
    state = {
        **plain_net(18).state_dict(),
        "fc.weight": torch.zeros(1000, 64),
        "fc.bias": torch.zeros(1000),
    }
    message = (
        r"^strict_start=True: 2 keys of the checkpoint go nowhere in \w*ResNet: fc\.weight, "
        r"fc\.bias\. A pattern"
    )
    with pytest.raises(WarmStartError, match=message):
        load_state_dict(build(kind, strict_start=True), state)
    with pytest.raises(WarmStartError, match=r"1 keys .*: fc\.bias\. A pattern"):
        load_state_dict(build(kind, strict_start=r"fc\.w.*"), state)
    load_state_dict(build(kind, strict_start=r"fc\..*"), state)
    load_state_dict(build(kind, strict_start=True), plain_net(18).state_dict())
    load_state_dict(build(kind), state)


# --------------------------------------------------------------------------- initialisation


def saved(path, state: dict) -> dict:
    torch.save(state, path)
    return dict(type="Pretrained", checkpoint=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretrained_file_warm_starts_a_module(kind, tmp_path, reports):
    plain = plain_net(18)
    init_cfg = saved(tmp_path / "plain.pth", dict(state_dict=plain.state_dict()))
    net = build(kind, plugins=False, init_cfg=init_cfg, strict_start=True)
    before = net.layer1[0].conv1.start
    assert not before.filled
    net.init_weights()
    assert len(reports) == 1
    assert "warm-started  8 keys, for 8 layers (RFAConv)" in reports[0]
    net.eval()
    plain.eval()
    assert relative(plain(image()), net(image())) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["scratch", "pretrained"])
def test_init_weights_starts_new_layers_in_their_own_way(kind, first, tmp_path):
    # What the backbone's own init would do to a depthwise or grouped convolution shows at once.
    init_cfg = [dict(type="Constant", val=7.0, layer="Conv2d")]
    if first == "pretrained":
        init_cfg.append(saved(tmp_path / "plain.pth", plain_net(18).state_dict()))
    rfa = dict(RFA, norm_cfg=dict(type="GN", num_groups=1))  # refuses the plain convolution
    net = build(kind, rfa=rfa, plugins=False, init_cfg=init_cfg)
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
def test_a_second_init_weights_changes_nothing(kind):
    net = build(kind)
    net.init_weights()
    before = copy.deepcopy(net.state_dict())
    net.init_weights()  # MMEngine warns, and leaves everything
    after = net.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
