"""Plug-ins that start as the identity, at every place, do not change the net's outputs.

Their gates are exactly 1, so outputs and gradients equal the plain net's except for rounding.
"""

import copy
import functools

import pytest
import torch
from mmdet.models.backbones.resnet import ResNet
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn

from rfa_mmdet.layers.warm_start.plugin import Plugin
from rfa_mmdet.models import PluginFPN, RFAResNet, retrofit
from tests.helpers.identity import IDENTITIES, furthest, run
from tests.helpers.norms import randomise_norms
from tests.helpers.zoo import CASES, inputs_of

PLACES = {
    18: ("after_conv1", "after_conv2", "behind blocks"),
    50: ("after_conv1", "after_conv2", "after_conv3", "behind blocks"),
}
# Evaluation, and training with batch statistics or norm_eval.
MODES = {"eval": (False, True), "train": (True, False), "norm_eval": (True, True)}
# The gates are 1 in bfloat16 too, and what flows back through them is 0. So nothing differs on one
# machine; where products of bfloat16 are split otherwise, a rounding to 8 bits may.
ONE_ROUNDING = torch.finfo(torch.bfloat16).eps
each_plugin = pytest.mark.parametrize("plugin", IDENTITIES)
each_place = pytest.mark.parametrize(
    ("depth", "place"), [(depth, place) for depth, places in PLACES.items() for place in places]
)


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")


def plugins_of(net: nn.Module) -> list[Plugin]:
    return [m for m in net.modules() if isinstance(m, Plugin)]


def image() -> tuple[Tensor]:
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return (x.requires_grad_(),)


@functools.cache
def plain_state(depth: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return randomise_norms(ResNet(depth, base_channels=8)).state_dict()


@functools.cache
def plain_run(depth: int, training: bool, norm_eval: bool, autocast: bool = False) -> dict:
    net = ResNet(depth, base_channels=8, norm_eval=norm_eval)
    net.load_state_dict(plain_state(depth))
    net.train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return run(net, image())


def with_plugins(plugin: str, depth: int, place: str, **kwargs) -> nn.Module:
    kwargs = dict(depth=depth, base_channels=8, **kwargs)
    cfg = IDENTITIES[plugin]
    if place == "behind blocks":  # Retrofit's default
        cfg = {key: value for key, value in cfg.items() if key != "start"}
        net = retrofit(dict(type="ResNet", **kwargs), [dict(after=r"layer\d\.\d+", plugin=cfg)])
    else:
        net = RFAResNet(plugins=[dict(cfg=cfg, position=place)], **kwargs)
    net.init_weights()
    return net


@each_plugin
@each_place
def test_resnet_outputs_are_unchanged(plugin, depth, place):
    net = with_plugins(plugin, depth, place)
    assert len(plugins_of(net)) == {18: 8, 50: 16}[depth]
    for training, norm_eval in MODES.values():
        load_state_dict(net, plain_state(depth))
        net.norm_eval = norm_eval
        net.train(training)
        expected, found = plain_run(depth, training, norm_eval), run(net, image())
        assert furthest(found, expected, outputs=True) <= 1e-6
        assert furthest(found, expected, outputs=False) <= 1e-5
        for name, layer in net.named_modules():
            if isinstance(layer, Plugin):
                own = [g for n, g in found.items() if n.startswith(f"{name}.")]
                assert any(g.any() for g in own), name
    assert all(layer.is_identity() for layer in plugins_of(net))
    for parameter in plugins_of(net)[0].parameters():
        parameter.data.add_(parameter.grad, alpha=-0.1)
    assert furthest(run(net, image()), expected, outputs=True) > 1e-6


@each_plugin
@each_place
def test_resnet_outputs_are_unchanged_with_autocast(plugin, depth, place):
    net = with_plugins(plugin, depth, place, norm_eval=False)
    load_state_dict(net, plain_state(depth))
    net.train()
    expected = plain_run(depth, True, False, autocast=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(net, image())
    assert furthest(found, expected, outputs=True) <= ONE_ROUNDING
    assert furthest(found, expected, outputs=False) <= ONE_ROUNDING


@each_plugin
def test_mmdets_own_resnet_starts_as_the_identity(plugin):
    places = ("after_conv1", "after_conv2", "after_conv3")
    plugins = [dict(cfg=dict(IDENTITIES[plugin], postfix=p), position=p) for p in places]
    net = ResNet(50, base_channels=8, plugins=plugins)
    net.init_weights()
    found = plugins_of(net)
    assert len(found) == 48
    assert all(layer.is_identity() for layer in found)


@each_plugin
@pytest.mark.parametrize("position", ["after_lateral", "after_output"])
def test_fpn_outputs_are_unchanged(plugin, position):
    case = CASES["FPN"]
    kwargs = {key: value for key, value in case.cfg.items() if key != "type"}
    plain = MODELS.build(copy.deepcopy(case.cfg))
    net = PluginFPN(**kwargs, plugins=[dict(cfg=IDENTITIES[plugin], position=position)])
    net.init_weights()
    assert_same(plain, net, case)
    assert len(plugins_of(net)) == 3


@each_plugin
@pytest.mark.parametrize("name", ["RetinaHead", "FCOSHead"])
def test_head_outputs_are_unchanged(plugin, name):
    assert_behind(CASES[name], IDENTITIES[plugin])


@pytest.mark.parametrize("name", CASES)
def test_mmdet_module_outputs_are_unchanged(name):
    # EMA has the most values that a module's own initialisation could change.
    assert_behind(CASES[name], dict(type="EMA", factor=2))


def assert_behind(case, plugin: dict) -> None:
    plain = randomise_norms(MODELS.build(copy.deepcopy(case.cfg)))
    net = retrofit(copy.deepcopy(case.cfg), [dict(after=case.after, plugin=plugin)])
    net.init_weights()
    assert plugins_of(net)
    assert_same(plain, net, case)


def assert_same(plain: nn.Module, net: nn.Module, case) -> None:
    for training in (True, False):
        load_state_dict(net, plain.state_dict())
        plain.train(training)
        net.train(training)
        inputs = inputs_of(case)
        expected, found = run(plain, inputs), run(net, inputs)
        assert furthest(found, expected, outputs=True) <= 1e-6
        assert furthest(found, expected, outputs=False) <= 1e-5
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected, found = run(plain, inputs), run(net, inputs)
        assert furthest(found, expected, outputs=True) <= ONE_ROUNDING
        assert furthest(found, expected, outputs=False) <= ONE_ROUNDING
    assert all(layer.is_identity() for layer in plugins_of(net))


def test_checkpoint_with_plugin_keys_is_not_reinitialised(tmp_path):
    net = with_plugins("CBAM", 18, "behind blocks")
    own = {k: torch.randn_like(v) if ".cbam." in k else v for k, v in net.state_dict().items()}
    torch.save(own, tmp_path / "own.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "own.pth"))
    again = with_plugins("CBAM", 18, "behind blocks", init_cfg=init_cfg)
    assert all(value.equal(own[key]) for key, value in again.state_dict().items())
    assert {layer.output_scale for layer in plugins_of(again)} == {4}
