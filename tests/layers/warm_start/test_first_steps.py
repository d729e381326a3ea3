"""The first training steps of a warm-started layer whose norm trains on batches."""

import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from rfa_mmdet.layers import RFAConv, RFCAConv, RFCBAMConv
from rfa_mmdet.layers.warm_start.first_steps import only_shifts
from tests.helpers.torch_features import compiles_operators

LAYERS = (RFAConv, RFCBAMConv, RFCAConv)
# On a CPU, float32 uses the operators and everything else the formula.
TYPES = {torch.float32: 1e-4, torch.float64: 1e-6}


def pair(kind=RFAConv, dtype=torch.float64, padding=1, **kwargs) -> tuple[nn.Module, nn.Conv2d]:
    """Return a layer started from a convolution, and the convolution."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=padding).to(dtype)
    layer = kind(4, 6, 3, padding=padding, **kwargs).to(dtype)
    layer.load_state_dict(plain.state_dict())
    return layer.train(), plain


def maps(batch: int = 4, side: int = 9, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.rand(batch, 4, side, side, generator=generator)).to(dtype)


def step(layer: nn.Module, lr: float = 0.01) -> None:
    torch.optim.SGD(layer.parameters(), lr).step()


def gradients(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of the input."""
    x = x.clone().requires_grad_()
    y = net(x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return y.detach(), x.grad


def same(a, b, tolerance: float = 1e-6) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("floor", [0.0, -2.0])
def test_first_step_equals_the_convolution_then_trains_normally(kind, dtype, floor):
    layer, plain = pair(kind, dtype, input_floor=floor)
    x, other = (maps(seed=seed, dtype=dtype) + floor for seed in (0, 1))
    same(gradients(layer, x), gradients(plain, x), TYPES[dtype])
    torch.testing.assert_close(layer.norm.running_mean, layer.feature(x).mean((0, 2, 3)))
    # It equals the convolution in evaluation, and on the batch's own statistics.
    same([layer.eval()(other)], [plain(other)], TYPES[dtype])
    twin = copy.deepcopy(layer).train()
    twin.settled = True
    same([twin(x)], [plain(x)], TYPES[dtype])
    layer.train()
    step(layer)
    before = copy.deepcopy(layer.norm.state_dict())
    twin = copy.deepcopy(layer)
    twin.settled = True
    same(gradients(layer, x), gradients(twin, x), 0)
    assert layer.settled
    assert not torch.equal(layer.norm.running_mean, before["running_mean"])
    assert torch.equal(layer.norm.weight, before["weight"])


def test_first_step_with_unfolded_windows():
    layer, plain = pair(feature="unfold")
    same(gradients(layer, maps()), gradients(plain, maps()))
    assert layer.norm.running_mean.all()


@pytest.mark.parametrize("kind", LAYERS)
def test_accumulated_batches_equal_the_convolution(kind):
    layer, plain = pair(kind)
    for seed in range(3):
        x = maps(seed=seed)
        same(gradients(layer, x), gradients(plain, x))
    mean = layer.norm.running_mean.clone()
    torch.testing.assert_close(mean, layer.feature(maps()).mean((0, 2, 3)))  # of the first
    # A step that a scaler skips, e.g. after an overflow, changes nothing.
    step(layer, lr=0.0)
    same(gradients(layer, maps(seed=3)), gradients(plain, maps(seed=3)))
    assert torch.equal(layer.norm.running_mean, mean)


def test_several_levels_equal_the_convolution():
    layer, plain = pair()
    levels = [maps(side=side, seed=side) for side in (16, 8, 4)]
    for net in (layer, plain):
        torch.autograd.backward([net(x).square().sum() for x in levels])
    # The final weight is K times the plain one.
    same([layer.conv.weight.grad * 9, layer.conv.bias.grad], [plain.weight.grad, plain.bias.grad])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_activation_checkpointing_gives_the_same_result(kind, reentrant):
    layer, _ = pair(kind)
    twin, x = copy.deepcopy(layer), maps()
    for _ in range(3):
        found = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant), x)
        same(found, gradients(twin, x), 0)
        for net in (layer, twin):
            step(net)
            net.zero_grad()
    same(layer.parameters(), twin.parameters(), 0)
    assert layer.settled


@pytest.mark.parametrize("kind", LAYERS)
def test_norm_without_gradients_trains_on_batches_immediately(kind):
    """No optimizer step would tell that the warm start is over."""
    layer, plain = pair(kind)
    layer.norm.requires_grad_(False)
    same([layer(maps())], [plain(maps())])
    assert layer.settled
    assert layer.norm.num_batches_tracked == 2  # the statistics taken, and those of the batch


def test_empty_batch_is_skipped():
    layer, plain = pair()
    assert layer(maps()[:0]).shape == (0, 6, 9, 9)
    assert not layer.norm.running_mean.any()
    same([layer(maps())], [plain(maps())])
    assert layer.norm.running_mean.all()


@pytest.mark.parametrize("kind", LAYERS)
def test_first_step_with_autocast(kind):
    # Without padding: its zeros lie on ReLU's corner, where rounding decides the gradient.
    layer, plain = pair(kind, torch.float32, padding=0)
    exact, x = copy.deepcopy(layer), maps(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(layer, x), gradients(plain, x)
    same(found, expected, 3e-2)
    # Statistics are not rounded.
    torch.testing.assert_close(layer.norm.running_mean, layer.feature(x).mean((0, 2, 3)))
    # The final weight is the plain one times a constant; the others' gradients are float32's.
    times = (layer.conv.weight / plain.weight).mean()
    ours, theirs = ([conv.weight.grad, conv.bias.grad] for conv in (layer.conv, plain))
    same([ours[0] * times, ours[1]], theirs, 3e-2)
    gradients(exact, x)
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-12)
        assert error < 3e-2, name


@pytest.mark.parametrize("before", ["the first batch", "the first step", "the second step"])
def test_saved_and_resumed_at_any_point(before, tmp_path):
    layer, _ = pair()
    resumed = RFAConv(4, 6, 3).double()
    names = list(resumed.state_dict())
    moments = ("the first batch", "the first step", "the second step")
    for number in range(3):
        if moments[number] == before:
            torch.save(layer.state_dict(), tmp_path / "layer.pth")
            state = torch.load(tmp_path / "layer.pth", weights_only=True)
            assert list(state) == names  # only the layer's own state
            resumed.load_state_dict(state)
            break
        gradients(layer, maps(seed=number))
        if number:
            step(layer)
    for net in (layer, resumed):
        net.zero_grad()
    for seed in range(5, 8):
        same(gradients(resumed, maps(seed=seed)), gradients(layer, maps(seed=seed)), 0)
        for net in (layer, resumed):
            step(net)
    same(resumed.parameters(), layer.parameters(), 0)


def test_layer_without_warm_start_uses_batches_immediately():
    torch.manual_seed(0)
    fresh = RFAConv(4, 6, 3).double()
    loaded = RFAConv(4, 6, 3).double()
    loaded.load_state_dict(fresh.state_dict())
    for seed in range(2):
        same(gradients(loaded, maps(seed=seed)), gradients(fresh, maps(seed=seed)), 0)
    assert loaded.settled
    assert loaded.norm.num_batches_tracked == 2


def test_frozen_norm_takes_no_statistics_until_unfrozen():
    layer, _ = pair()
    layer.norm.eval()  # as norm_eval does
    for seed in range(3):
        gradients(layer, maps(seed=seed))
        step(layer)
    assert not layer.norm.running_mean.any()
    expected = layer(maps())
    layer.norm.train()
    same([layer(maps())], [expected])
    assert layer.norm.running_mean.all()


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("average", [ExponentialMovingAverage, AveragedModel])
def test_weight_averages_are_correct(average, buffers):
    layer, plain = pair(dtype=torch.float32)
    if average is AveragedModel:
        averaged = average(layer, use_buffers=buffers)
    else:
        averaged = average(layer, momentum=0.1, update_buffers=buffers)
    x = maps(64, dtype=torch.float32)
    for seed in range(4):
        gradients(layer, maps(64, seed=seed, dtype=torch.float32))
        step(layer, lr=1e-6)
        averaged.update_parameters(layer)
        same([averaged.eval()(x)], [plain(x)], 0.05)
    assert layer.settled


@compiles_operators
def test_compiled_graph_only_breaks_in_the_first_step():
    torch._dynamo.reset()
    layer, plain = pair(dtype=torch.float32)
    # In a model whose compiled code contains the layer.
    net, same_net = nn.Sequential(nn.ReLU(), layer), nn.Sequential(nn.ReLU(), plain)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, backend=backend)
    x = maps(dtype=torch.float32)
    same(gradients(compiled, x), gradients(same_net, x), 1e-4)
    step(layer)
    compiled(x)
    assert layer.settled
    graphs.clear()
    twin = copy.deepcopy(net)
    for _ in range(2):
        same([compiled(x)], [twin(x)], 1e-4)
    assert len(graphs) == 1
    same([torch.compile(twin, backend=backend, fullgraph=True)(x)], [net(x)], 1e-4)
    torch._dynamo.reset()


def test_traces_and_transforms_do_not_change_the_layer():
    layer, _ = pair()
    before = copy.deepcopy(layer.state_dict())
    parameters = dict(layer.named_parameters())
    torch.func.functional_call(layer, {k: 2 * v for k, v in parameters.items()}, maps())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert only_shifts(layer.norm, 0.0)
