"""RFCBAMConv and RFCAConv on the CPU, where their features are never stored completely.

test_receptive_field_convs.py compares all backends with the formulas.
"""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import example, given
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field import WindowFeatures, autograd
from tests.helpers import formulas
from tests.helpers.backends import require, run
from tests.helpers.formulas import Case, Exact, relative_error
from tests.helpers.receptive_field import LAYERS
from tests.helpers.tolerances import TOLERANCES

NAMES = ("RFCBAMConv", "RFCAConv")


class Plain(Tensor):
    """A subclass without its own behaviour."""


each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True, scope="module")
def cpu_backend():
    require("cpu")


def build(name: str, case: Case, **kwargs) -> nn.Module:
    return case.build(LAYERS[name][0], act_cfg=case.act and dict(type=case.act), **kwargs)


@torch.no_grad()
def formula(name: str, layer: nn.Module, case: Case, x: Tensor) -> Tensor:
    state = {key: value.double() for key, value in layer.state_dict().items()}
    return LAYERS[name][1](Exact(state, layer.training), case, x.double())


def compare(name: str, case: Case, dtypes=(torch.float64, torch.float32)) -> None:
    """Return the modes: with gradients, in training and in evaluation, and without gradients."""
    for training in (True, False):
        case = dataclasses.replace(case, training=training)
        layer, x = build(name, case, backend="cpu"), case.input()
        if torch.bfloat16 in dtypes:  # numbers that it can hold
            layer, x = layer.bfloat16().float(), x.bfloat16().float()
        if not training or case.batch * math.prod(case.out_size()) >= 8:
            formulas.compare(layer, lambda e, x, c=case: LAYERS[name][1](e, c, x), x, dtypes)
        if training:
            continue
        expected = formula(name, layer, case, x)
        for dtype in dtypes:
            with torch.no_grad():
                found = copy.deepcopy(layer).to(dtype)(x.to(dtype))
            assert found.dtype == dtype
            assert relative_error(found, expected) <= TOLERANCES[dtype].output


@each
@given(case=formulas.cases())
@example(case=Case(kernel=(1, 1), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(case=Case(kernel=(7, 7), padding=(3, 3), channels=65, batch=1, size=(4, 3)))
def test_output_and_gradients_match_the_formula(name, case):
    compare(name, dataclasses.replace(case, act=case.act and "ReLU"))


@each
@pytest.mark.parametrize("case", formulas.ODD_SIZES, ids=str)
def test_odd_sizes(name, case):
    compare(name, case)


@each
@pytest.mark.parametrize("act", ["ReLU", None])
@pytest.mark.parametrize("training", [True, False])
def test_bfloat16(name, act, training):
    """Results are as close to float64 as the formula in bfloat16, whose gates round equally."""
    case = Case(channels=16, out_channels=24, size=(12, 19), act=act, training=training)
    layer, x = build(name, case).bfloat16(), case.input().bfloat16()
    exact = run(copy.deepcopy(layer).double(), x.double())
    ours = run(copy.deepcopy(layer), x)
    layer.backend = "reference"
    theirs = run(layer, x)
    least = 1e-3 * max(float(e.norm()) for e in exact[1:])
    for found, made, expected in zip(ours, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        # By norm: after rounding, another channel may have the maximum and all its gradient.
        scale = max(float(expected.norm()), least)
        error, own = (float((y.double() - expected).norm()) / scale for y in (found, made))
        assert error <= max(2 * TOLERANCES[torch.bfloat16].output, 1.5 * own)


@each
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(name, training):
    window = dict(size=(4, 3), kernel=(2, 3), padding=(1, 1))
    case = Case(batch=1, channels=2, out_channels=2, training=training, **window)
    assert formulas.gradcheck(build(name, case, backend="cpu"), case.input())


@each
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("made", [True, False])
def test_autocast(name, training, made):
    case = Case(channels=16, out_channels=24, size=(12, 19), training=training)
    layer = build(name, case, backend="reference" if made else "cpu")
    x = case.input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    # Including input and weights, which `test_bfloat16` rounds before.
    expected = formula(name, layer, case, x)
    assert relative_error(found.detach(), expected) <= 2 * TOLERANCES[torch.bfloat16].output


@each
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_magnitude_of_the_input(name, magnitude, training):
    case = Case(channels=8, out_channels=8, size=(13, 11), seed=3, training=training)
    layer, x = build(name, case), case.input() * magnitude
    exact = run(copy.deepcopy(layer).double(), x.double())
    least = 1e-2 * max(
        float(e.abs().max()) for e in exact[2:]
    )  # of a bias before BN: only rounding
    for i, (found, expected) in enumerate(zip(run(layer, x), exact, strict=True)):
        limit = TOLERANCES[torch.float32].layer_gradient
        assert relative_error(found, expected, least if i > 1 else 0) <= limit


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_statistics_match_torch(name, dtype):
    """Check inputs whose mean is 1000 times their standard deviation."""
    case = Case(channels=5, size=(13, 11))
    layer, x = build(name, case, backend="cpu").to(dtype), case.input().to(dtype) + 1000
    made = copy.deepcopy(layer).double()
    layer(x)
    made.norm(made.feature(x.double()))
    assert layer.norm.num_batches_tracked == made.norm.num_batches_tracked == 1
    # Such values themselves are rounded by 1e-4 of a deviation; a variance, by ten times that.
    for key, of_sum in (("running_mean", 1e-5), ("running_var", 1e-3)):
        limit = of_sum if dtype == torch.float32 else 1e-9
        assert relative_error(getattr(layer.norm, key), getattr(made.norm, key)) <= limit


@each
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm_cfg",
    [None, dict(type="BN", affine=False), dict(type="BN", track_running_stats=False)],
    ids=str,
)
def test_without_norm_or_its_parameters(name, norm_cfg, training):
    case = Case(channels=5, out_channels=6, size=(9, 8), training=training)
    layer, x = build(name, case, norm_cfg=norm_cfg).double(), case.input().double()
    made = copy.deepcopy(layer)
    layer.backend = "cpu"
    found = run(layer, x)
    torch.testing.assert_close(found, run(made, x), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(made.named_buffers()))


@each
@pytest.mark.parametrize("wanted", ["x", "feature.weight", "norm.bias", "conv.weight", "spatial"])
def test_single_gradients(name, wanted):
    case = Case(batch=2, channels=4, out_channels=4, groups=2, size=(9, 8))
    layer, x = build(name, case), case.input()
    wanted = "coordinate.conv_h.weight" if (name, wanted) == ("RFCAConv", "spatial") else wanted
    wanted = "spatial.weight" if wanted == "spatial" else wanted
    named = dict(layer.named_parameters())
    everything = dict(zip(["y", "x", *named], run(layer, x), strict=True))
    layer.requires_grad_(False)
    tensor = x.requires_grad_() if wanted == "x" else named[wanted].requires_grad_()
    y = layer(x)
    generator = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, generator=generator))
    torch.testing.assert_close(tensor.grad, everything[wanted], rtol=1e-5, atol=1e-6)


@each
def test_nan_reaches_the_output(name):
    case = Case(size=(9, 11), training=False)
    layer, x = build(name, case), case.input()
    x[0, 1, 4, 5] = torch.nan
    found = layer(x)
    assert found[0].isnan().any()
    assert not found[1].isnan().any()
    assert torch.equal(found.isnan(), formula(name, layer, case, x).isnan())


@each
def test_input_is_not_read_out_of_bounds_and_may_be_a_view(name):
    case = Case(batch=1, size=(6, 7), training=False)
    layer, x = build(name, case), case.input()
    expected = run(layer, x)
    wide = torch.full((x.numel() + 128,), torch.nan)
    inner = wide[64:-64].view_as(x).copy_(x).detach().requires_grad_()
    y = layer(inner)
    assert torch.equal(y, expected[0])
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    around = torch.full((y.numel() + 128,), torch.nan)
    upstream = around[64:-64].view_as(y).copy_(upstream)
    assert torch.equal(torch.autograd.grad(y, inner, upstream)[0], expected[1])
    view = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    kept = view.clone()
    assert all(torch.equal(a, b) for a, b in zip(run(layer, view), expected, strict=True))
    assert torch.equal(view, kept)


@each
def test_recomputed_statistics_give_the_same_gradients(name, monkeypatch):
    results = []
    for least in (0, math.inf):
        monkeypatch.setattr(autograd, "KEEP_FROM", least)
        results.append(run(build(name, Case()), Case().input()))
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*results, strict=True))


@each
def test_second_derivatives_raise(name):
    layer, x = build(name, Case()), Case().input().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative; pass backend='reference'"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@each
@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing(name, training):
    layer, x = build(name, Case(training=training)), Case().input()
    expected = run(copy.deepcopy(layer), x)
    again = nn.Module()
    again.layer = layer
    again.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    for found, one in zip(run(again, x), expected, strict=True):
        assert torch.equal(found, one)


@each
@pytest.mark.parametrize("training", [True, False])
def test_features_are_materialised_if_needed(name, training):
    case = Case(training=training)
    layer, x = build(name, case), case.input()
    assert layer.window_features(x) is not None
    assert layer.window_features(x.double()) is None
    assert layer.window_features(x[:0]) is None
    assert layer.window_features(x.to("meta")) is None
    with TorchDispatchMode():
        assert layer.window_features(x) is None  # somebody counts operators
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert layer.window_features(fake) is None
    assert layer.window_features(x.as_subclass(Plain)) is not None
    for watched in (layer.feature, layer.norm, layer.act):
        handle = watched.register_forward_hook(lambda *_: None)
        assert layer.window_features(x) is None
        handle.remove()
    group_norm = dict(type="GN", num_groups=3)
    assert build(name, case, norm_cfg=group_norm).window_features(x) is None
    assert build(name, dataclasses.replace(case, act="SiLU")).window_features(x) is None
    one = torch.rand(1, 3, 1, 1)
    assert (
        layer.window_features(one) is None
    ) == training  # torch raises an error that explains it


# --------------------------------------------------------------------------- operators


def features(x: Tensor, **changes) -> WindowFeatures:
    channels = x.shape[1]
    torch.manual_seed(0)
    feature, shift = torch.randn(channels * 9, 1, 3, 3), torch.randn(channels * 9)
    given = dict(kernel_size=(3, 3), stride=(2, 1), padding=(1, 1), dilation=(1, 1))
    return WindowFeatures(x, feature, shift, True, Window(**{**given, **changes}))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((2, 3), (2, 9, 4, 6), r"first: must have the shape \[2, 4\]"),
        ((2, 4), (2, 9, 4, 7), r"second: must have the shape \[2, 9, 4, 6\]"),
        ((2, 4, 3, 5), (2, 4, 3, 6), r"first: must have the shape \[2, 4, 3, 4\]"),
        ((2, 4, 3, 4), (2, 4, 3, 4), r"second: must have the shape \[2, 4, 3, 6\]"),
    ],
    ids=str,
)
def test_gates_are_checked(first, second, message):
    gates = torch.rand(first), torch.rand(second)
    with pytest.raises(ValueError, match=message):
        features(torch.randn(2, 4, 7, 6)).convolve(gates, torch.randn(6, 4, 3, 3), None, 1)


def test_features_are_checked():
    with pytest.raises(ValueError, match=r"x of shape .*: only the batch may be empty"):
        features(torch.randn(2, 4, 0, 6)).max_and_mean()
    with pytest.raises(TypeError, match="x: must be float32, float64 or bfloat16"):
        features(torch.randn(2, 4, 7, 6).half()).coordinate_means()
    with pytest.raises(ValueError, match="smaller than the window"):
        features(torch.randn(2, 4, 7, 6), dilation=(9, 9)).max_and_mean()


def test_first_of_equal_maxima_gets_the_gradient():
    one = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    x = one.repeat(1, 3, 1, 1).requires_grad_()
    identity = torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3).repeat(3, 1, 1, 1)
    shift = torch.zeros(27, dtype=torch.float64)
    pooled = WindowFeatures(x, identity, shift, False, Window((3, 3))).max_and_mean()
    pooled[:, 0].sum().backward()
    seen = nn.functional.fold(
        torch.ones(1, 9, 9), (5, 5), (3, 3)
    )  # number of windows that cover each position
    assert torch.equal(x.grad[0, 0], seen[0, 0].double())
    assert not x.grad[0, 1:].any()


def test_results_are_bitwise_equal_for_any_number_of_threads():
    by_position = torch.rand(3, 40), torch.rand(3, 9, 25, 61)
    by_coordinate = torch.rand(3, 40, 3, 25), torch.rand(3, 40, 3, 61)
    weight, threads = torch.randn(24, 40, 3, 3), torch.get_num_threads()
    data = torch.randn(3, 40, 50, 61)

    def run(number: int) -> list[Tensor]:
        torch.set_num_threads(number)
        given = features(data.clone().requires_grad_())
        outputs = [given.max_and_mean(), *given.coordinate_means()]
        inputs = [given.x, given.feature.requires_grad_(), given.shift.requires_grad_()]
        for gates in (by_position, by_coordinate):
            inputs += [gate.clone().requires_grad_() for gate in gates]
            outputs.append(given.convolve(tuple(inputs[-2:]), weight, None, 1))
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(y.shape, generator=generator) for y in outputs]
        return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]

    try:
        first, *others = (run(number) for number in (1, 2, 5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
