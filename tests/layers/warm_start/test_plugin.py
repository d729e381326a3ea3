"""Plug-ins that start as the identity: outputs, first steps and checkpoints."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from mmengine.model import BaseModule, Sequential
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint, save_checkpoint
from torch import Tensor, nn

from rfa_mmdet.layers import ConAM
from rfa_mmdet.layers.warm_start.start import WarmStartError
from tests.helpers.registered import CHANNELS, PLUGINS, accepts, feature_map, plugin, required
from tests.helpers.torch_features import CONV_TYPES
from tests.helpers.touched import TOOLS

SCALES = {"EMA": 2, "SE": 2, "ECA": 2, "CBAM": 4, "CoordAtt": 4, "ConAM": 1 / 2}
# The first step changes the last layers of the gates; the others follow.
FIRST = {
    "EMA": {"gn.weight", "gn.bias", "conv3x3.weight", "conv3x3.bias"},
    "SE": {"fc.2.weight"},
    "ECA": {"conv.weight"},
    "CBAM": {"channel.mlp.2.weight", "spatial.weight"},
    "CoordAtt": {"conv_h.weight", "conv_h.bias", "conv_w.weight", "conv_w.bias"},
    "ConAM": {"linear2.weight"},
}


@pytest.fixture(params=PLUGINS)
def name(request) -> str:
    return request.param


def build(name: str, start: str = "identity", **kwargs) -> nn.Module:
    if accepts(name, "scale_by_patches"):
        kwargs = dict(scale_by_patches=True) | kwargs
    if accepts(name, "reduction") and not accepts(name, "hidden_channels"):
        kwargs = dict(reduction=4) | kwargs  # wide enough for its ReLU not to be dead
    if accepts(name, "factor"):
        kwargs = dict(factor=8) | kwargs  # 4 channels per group, so softmax is not trivial
    return plugin(name, start=start, **kwargs)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def run(layer: nn.Module, x: Tensor, scale: float = 1.0) -> list[Tensor]:
    """Return output and gradients of input and parameters, multiplied by a factor."""
    x = x.clone().requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [scale * t for t in (y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream))]


def assert_identity(layer: nn.Module) -> None:
    assert layer.is_identity()
    x = feature_map()
    assert far(layer(x), x) <= 1e-6


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tool", [None, "forward hook"])
def test_identity_until_the_first_step(name, training, tool):
    layer, x = build(name).train(training), feature_map()
    if tool is not None:  # its modules are called then
        TOOLS[tool](layer)
    assert layer.output_scale == SCALES[name]
    assert layer.is_identity()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    y, of_x, *gradients = run(layer, x)
    upstream = run(nn.Identity(), x)[1]
    assert far(y, x) <= 1e-6
    assert far(of_x, upstream) <= 1e-6
    with torch.no_grad():
        assert far(layer(x), x) <= 1e-6
    names = [n for n, _ in layer.named_parameters()]
    largest = max(float(g.abs().max()) for g in gradients)
    moved = {
        n for n, g in zip(names, gradients, strict=True) if float(g.abs().max()) > 1e-5 * largest
    }
    assert moved == FIRST[name]
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    assert not layer.is_identity()
    y, _, *gradients = run(layer, x)
    assert far(y, x) > 1e-4
    assert all(g.any() for g in gradients)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tool", [None, "forward hook"])
def test_checkpoint_wins_and_the_output_scale_stays(name, training, tool):
    paper, layer = (build(name, start).double().train(training) for start in ("paper", "identity"))
    assert paper.output_scale == 1
    layer.load_state_dict(dict(paper.state_dict()), strict=True)
    if tool is not None:
        TOOLS[tool](layer)
    x = feature_map().double()
    for found, expected in zip(run(layer, x), run(paper, x, SCALES[name]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), SCALES[name] * paper.eval()(x))
    torch.testing.assert_close(layer.attention_map(x), paper.attention_map(x))


@pytest.mark.parametrize("dtype", CONV_TYPES)
def test_identity_in_half_precision(name, dtype):
    layer, x = build(name).to(dtype), feature_map().to(dtype)
    assert layer(x).equal(x)
    assert layer.is_identity()


@pytest.mark.parametrize("patches", [1, 4])
def test_conam_without_scaling_is_close_to_the_identity(patches):
    size = 9 if patches == 1 else 5
    layer = ConAM(CHANNELS, size, 8, start="identity")
    x = torch.randn(2, CHANNELS, 9, 9)
    assert layer.output_scale == 1
    torch.testing.assert_close(layer(x), (1 + 1 / patches) * x)
    assert not layer.is_identity()


class Parent(BaseModule):
    def __init__(self, layer: nn.Module, init_cfg: list[dict]) -> None:
        super().__init__(init_cfg)
        self.layer = layer


WEIGHED = ["Conv1d", "Conv2d", "Linear"]
INITS = {
    "Kaiming": dict(type="Kaiming", layer=WEIGHED),
    "Xavier": dict(type="Xavier", layer=WEIGHED, distribution="uniform", bias=0.5),
    "Normal": dict(type="Normal", layer=WEIGHED, std=0.01),
    "Constant": dict(type="Constant", layer=[*WEIGHED, "GroupNorm", "_BatchNorm"], val=3, bias=3),
    "Zero": dict(type="Constant", layer=WEIGHED, val=0),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("container", [None, nn.Sequential, Sequential])
def test_parents_init_weights_keeps_the_identity(name, init, container):
    layer = build(name)
    parent = Parent(container(layer) if container else layer, [INITS[init]])
    parent.init_weights()
    assert_identity(layer)
    # Everything else has torch's defaults, regardless of the parent's init_cfg.
    fresh = build(name)
    for key, value in layer.state_dict().items():
        if key in layer.constant_attention()[0]:
            continue
        limit = fresh.state_dict()[key].double().abs().max()
        assert value.double().abs().max() <= max(4 * limit, 1), key
    kernels = {key: p for key, p in fresh.named_parameters() if p.dim() > 1}
    assert all(bool(layer.get_parameter(k).any()) is bool(p.any()) for k, p in kernels.items())
    assert any(float(g.abs().max()) > 1e-4 for g in run(layer, feature_map())[2:])
    before = copy.deepcopy(layer.state_dict())
    parent.init_weights()  # MMEngine warns and does nothing
    assert all(v.equal(before[k]) for k, v in layer.state_dict().items())


def test_apply_on_the_meta_device(name):
    seen = []
    build(name).to("meta").apply(seen.append)
    assert seen


def test_apply_reinitialises_a_trained_layer(name):
    layer = build(name)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    layer.apply(lambda module: [nn.init.constant_(p, 3) for p in module.parameters()])
    assert all(bool((p == 3).all()) for p in layer.parameters())


def test_parents_init_weights_is_kept_with_the_paper_start(name):
    parent = Parent(build(name, "paper"), [INITS["Constant"]])
    parent.init_weights()
    assert all(bool((p == 3).all()) for p in parent.layer.parameters())


def test_pretrained_checkpoint_with_plugin_keys_wins(name, tmp_path):
    source = build(name, "paper").state_dict()
    torch.save({f"layer.{key}": value for key, value in source.items()}, tmp_path / "file.pth")
    pretrained = dict(type="Pretrained", checkpoint=str(tmp_path / "file.pth"))
    parent = Parent(build(name), [pretrained, INITS["Constant"]])
    parent.init_weights()
    assert all(value.equal(source[key]) for key, value in parent.layer.state_dict().items())
    assert parent.layer.output_scale == SCALES[name]  # from the config, as always


@pytest.mark.parametrize("start", ["paper", "identity"])
def test_checkpoint_of_another_start_is_refused(name, start, tmp_path):
    net, file = nn.Sequential(build(name, start)), tmp_path / "file.pth"
    save_checkpoint(dict(state_dict=get_state_dict(net)), str(file))
    load_checkpoint(nn.Sequential(build(name, start)), str(file), strict=True)
    other = "paper" if start == "identity" else "identity"
    message = rf"^0\.start: .* with start='{start}', but this {name} has start='{other}'"
    with pytest.raises(WarmStartError, match=message):
        load_checkpoint(nn.Sequential(build(name, other)), str(file))
    # Nothing is known about a state dict without metadata, and a plain detector's has no start.
    state = torch.load(file, weights_only=True)["state_dict"]
    build(name, other).load_state_dict({k.removeprefix("0."): v for k, v in state.items()})
    plain = OrderedDict()
    plain._metadata = state._metadata
    nn.Sequential(build(name, other)).load_state_dict(plain, strict=False)


def test_start_is_shown_and_checked(name):
    assert f"start='identity', output_scale={SCALES[name]:g}" in repr(build(name))
    assert "start=" not in repr(build(name, "paper"))
    for wrong in ("identiti", None, True):
        with pytest.raises(ValueError, match=rf"^start={wrong!r}: must be one of \('paper', 'id"):
            build(name, wrong)


def test_copies_and_pickles_keep_the_start(name):
    layer = build(name)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_identity(twin)
    # Modules pickled before the argument existed start as in the paper.
    old = build(name, "paper")
    old._state_dict_hooks.clear()
    expected = old(feature_map())
    for attribute in ("start", "output_scale"):
        vars(old).pop(attribute, None)
    assert pickle.loads(pickle.dumps(old))(feature_map()).equal(expected)


def test_every_plugin_supports_identity(name):
    assert accepts(name, "start")
    assert MODELS.get(name)(CHANNELS, **required(name)).start == "paper"
