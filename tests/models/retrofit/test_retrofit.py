"""Retrofit of mmdet's own modules: edited layers, unchanged keys, and outputs."""

import copy
import pickle

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.models import retrofit
from tests.helpers.norms import randomise_norms
from tests.helpers.registered import CONVS, RECEPTIVE
from tests.helpers.zoo import CASES, Case, flat, inputs_of, relative


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")


def conv_cfg(name: str, case: Case) -> dict:
    cfg = dict(type=name)
    if name in RECEPTIVE and case.floor:
        cfg |= dict(bias=True, input_floor=case.floor)
    return cfg


def plain_of(case: Case) -> nn.Module:
    torch.manual_seed(1)
    return randomise_norms(
        MODELS.build(copy.deepcopy(case.cfg))
    )  # heads' own init would hide the layers


def in_eval(net: nn.Module) -> nn.Module:
    net.eval()  # mmdet's ResNet returns None
    return net


def with_convs(case: Case, name: str = "RFAConv", **kwargs) -> nn.Module:
    edits = [dict(where=case.where, conv=conv_cfg(name, case))]
    cfg = dict(type="Retrofit", module=copy.deepcopy(case.cfg), edits=edits, **kwargs)
    return MODELS.build(cfg)


def new_names(net: nn.Module) -> set[str]:
    """Return all names of the new layers, including shared ones."""
    new = set(net.new_layers.layers.values())
    return {name for name, m in net.named_modules(remove_duplicate=False) if m in new}


def outside(net: nn.Module, names: set[str]) -> dict[str, tuple]:
    inner = tuple(f"{name}." for name in names)
    return {k: tuple(v.shape) for k, v in net.state_dict().items() if not k.startswith(inner)}


@pytest.mark.parametrize("name", CASES)
def test_types_names_and_keys_outside_the_edits_are_kept(name):
    case = CASES[name]
    plain, net = plain_of(case), with_convs(case)
    assert type(net) is type(plain)
    names = new_names(net)
    assert names
    assert all(isinstance(net.get_submodule(n), RFAConv) for n in names)
    assert outside(net, names) == outside(plain, names)
    for n in names:
        new, old = net.get_submodule(n), plain.get_submodule(n)
        for attribute in (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
            *("groups", "padding_mode"),
        ):
            assert getattr(new, attribute) == getattr(old, attribute), (n, attribute)
        assert (new.conv.bias is not None) == (old.bias is not None or bool(case.floor))
        assert new.groups > 1 or case.groups == 1
    kept = {n: type(m) for n, m in plain.named_modules() if n not in names}
    inner = tuple(f"{n}." for n in names)
    found = {n: type(m) for n, m in net.named_modules() if not n.startswith(inner)}
    assert {n: t for n, t in found.items() if n not in names} == kept


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("conv", CONVS)
def test_warm_start_matches_the_plain_module(name, conv):
    case = CASES[name]
    plain, net = in_eval(plain_of(case)), with_convs(case, conv, strict_start=True)
    net.load_state_dict(plain.state_dict(), strict=True)
    net.eval()
    inputs = inputs_of(case)
    with torch.no_grad():
        expected, found = flat(plain(*inputs)), flat(net(*inputs))
    assert relative(expected, found) <= 1e-4
    # the outputs depend on these layers
    layer = next(iter(net.new_layers.layers.values()))
    torch.nn.init.normal_(layer.conv.weight)
    with torch.no_grad():
        assert relative(expected, flat(net(*inputs))) > 1e-3


def gradients(net, inputs) -> dict[str, torch.Tensor]:
    """Return the gradients of the parameters that have one; check that the inputs do."""
    outputs = flat(net(*inputs))
    torch.manual_seed(2)
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    assert all(t.grad is not None for t in flat(inputs))
    return {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_reach_every_parameter(name):
    case = CASES[name]
    edits = [
        dict(where=case.where, conv=dict(type="RFAConv")),
        dict(after=case.after, plugin=dict(type="SE", hidden_channels=8, start="paper")),
    ]
    net = retrofit(copy.deepcopy(case.cfg), edits)
    net.init_weights()
    randomise_norms(net)  # mmdet starts some norms at 0, which stops the gradients
    net.train()
    plain = plain_of(case)
    plain.init_weights()
    randomise_norms(plain)
    plain.train()
    new = tuple(f"{layer}." for layer in new_names(net))
    found, expected = gradients(net, inputs_of(case)), gradients(plain, inputs_of(case))
    for n, _ in net.named_parameters():
        assert not n.startswith(new) or found[n].any(), n
    # Of the others, all that have a gradient in the plain module. Rounding decides if some are 0.
    kept = {n for n in expected if not n.startswith(new)}
    assert kept
    assert {n for n in found if not n.startswith(new)} == kept


@pytest.mark.parametrize("name", CASES)
def test_loading_through_mmengine_reports_nothing_missing(name):
    case = CASES[name]
    plain, net = plain_of(case), with_convs(case, strict_start=True)
    load_state_dict(net, plain.state_dict(), strict=True)  # raises on any missing key
    for layer in net.new_layers.layers.values():
        assert layer.start.plain[0] == "weight"


@pytest.mark.parametrize("name", CASES)
def test_loaded_module_keeps_its_outputs(name):
    case = CASES[name]
    plain = in_eval(plain_of(case))
    net = copy.deepcopy(plain)
    edits = [dict(where=case.where, conv=conv_cfg("RFAConv", case))]
    assert retrofit(net, edits) is net
    assert not net.training
    inputs = inputs_of(case)
    with torch.no_grad():
        assert relative(flat(plain(*inputs)), flat(net(*inputs))) <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_are_complete(name):
    case = CASES[name]
    edits = [
        dict(where=case.where, conv=conv_cfg("RFAConv", case)),
        dict(after=case.after, plugin=dict(type="ECA")),
    ]
    net = retrofit(copy.deepcopy(case.cfg), edits)
    inputs = inputs_of(case)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.new_layers.module is twin
        assert twin.train.__self__.module is twin
        for name_, layer in twin.new_layers.layers.items():
            assert twin.get_submodule(name_) is layer
            assert layer is not net.get_submodule(name_)
        with torch.no_grad():
            found, expected = flat(twin.eval()(*inputs)), flat(net.eval()(*inputs))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        # The plug-ins of the copy run, not those of the original.
        for layer in net.new_layers.layers.values():
            assert layer not in set(twin.modules())


def test_all_convs_of_a_resnet50_start_exactly():
    torch.manual_seed(0)
    plain = randomise_norms(MODELS.build(dict(type="ResNet", depth=50, norm_eval=True)))
    x = torch.randn(2, 3, 64, 96)
    for conv in CONVS:
        edits = [dict(where=r"layer\d\.\d+\.conv2", conv=dict(type=conv))]
        net = retrofit(dict(type="ResNet", depth=50, norm_eval=True), edits, strict_start=True)
        net.load_state_dict(plain.state_dict())
        assert len(net.new_layers.layers) == 16
        for mode in (False, True):  # eval, and training under norm_eval
            with torch.no_grad():
                plain.train(mode)
                assert relative(flat(plain(x)), flat(net.train(mode)(x))) <= 1e-4


def test_whole_detector_is_edited_in_place():
    from mmengine.hub import get_config

    cfg = get_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py").model
    cfg.backbone.init_cfg = None
    edits = [
        dict(where=r"backbone\.layer4\.\d\.conv\d", conv=dict(type="RFAConv")),
        dict(where=r"bbox_head\.cls_convs\.0", conv=dict(type="RFAConv", input_floor=-16)),
        dict(after=r"neck\.lateral_convs\.0", plugin=dict(type="EMA")),
    ]
    # In double precision: the head's outputs here are a thousandth of what is summed up for them.
    net = MODELS.build(dict(type="Retrofit", module=cfg, edits=edits)).double()
    assert type(net).__name__ == "RetinaNet"
    plain = MODELS.build(cfg).double()
    load_state_dict(net, plain.state_dict(), strict=False)
    assert all(
        layer.start.plain
        for layer in net.new_layers.layers.values()
        if layer is not None and isinstance(layer, RFAConv)
    )
    x = torch.randn(1, 3, 64, 64).double()
    net.eval()
    plain.eval()
    ema = net.neck.lateral_convs[0].ema
    with torch.no_grad():
        assert relative(flat(plain(x)), flat(net(x))) <= 1e-9
        ema.gn.bias.normal_()
        assert relative(flat(plain(x)), flat(net(x))) > 1e-3


def test_plugins_run_after_their_module_in_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    plain = copy.deepcopy(net)
    edits = [
        dict(after="0", plugin=dict(type="EMA", factor=4, start="paper")),
        dict(after="0", plugin=dict(type="ECA", postfix="_late", start="paper")),
    ]
    retrofit(net, edits)
    assert type(net[0]) is nn.Conv2d
    assert list(net.new_layers.layers) == ["0.ema", "0.eca_late"]
    x = torch.randn(2, 3, 8, 8)
    expected = plain[1](net[0].eca_late(net[0].ema(plain[0](x))))
    assert torch.equal(net(x), expected)
    assert set(net.state_dict()) - set(plain.state_dict()) == {
        f"0.{n}" for n, _ in net[0].named_parameters() if n not in ("weight", "bias")
    }


def test_plugin_after_a_sequential_runs_once():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.ReLU())
    plain = copy.deepcopy(net)
    retrofit(net, [dict(after="0", plugin=dict(type="SE", start="paper"))])
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(net(x), plain[1](net[0].se(plain[0](x))))


def test_replacement_and_plugin_at_the_same_module():
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    plain = copy.deepcopy(net)
    retrofit(
        net,
        [
            dict(after="0", plugin=dict(type="SE", start="paper")),
            dict(where="0", conv=dict(type="RFAConv")),
        ],
    )
    x = torch.rand(1, 4, 8, 8)
    torch.testing.assert_close(net.eval()(x), net[0].se(plain(x)))


def test_plain_weights_start_a_convolution_but_not_its_trained_plugin():
    net = nn.Sequential(nn.Conv2d(4, 8, 3))
    plugin = dict(after="0", plugin=dict(type="SE"))
    trained = retrofit(copy.deepcopy(net), [plugin])
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.uniform_(-1, 1)
    both = retrofit(nn.Sequential(nn.Conv2d(4, 8, 3)), [dict(where="0", conv=dict(type="RFAConv"))])
    both = retrofit(both, [plugin])
    both.load_state_dict(trained.state_dict(), strict=True)
    x = torch.rand(2, 4, 9, 9)
    torch.testing.assert_close(both.eval()(x), trained.eval()(x), rtol=1e-4, atol=1e-4)
