"""RFCBAMConv and RFCAConv in inference on the CPU, where their features are never made as a whole.

The same formulas as in training: test_receptive_field_convs.py.
"""

import copy
import dataclasses
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rfa_mmdet.layers.conv import receptive_field
from rfa_mmdet.ops import dispatch
from rfa_mmdet.ops.lazy_windows import LazyFeatures
from tests.layers import formulas
from tests.layers.formulas import TOLERANCE, Case, Exact, relative_error
from tests.layers.test_receptive_field_convs import LAYERS
from tests.ops.backends import require

NAMES = ("RFCBAMConv", "RFCAConv")
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True, scope="module")
def cpu_backend():
    require("cpu")


def build(name: str, case: Case, **kwargs) -> nn.Module:
    act_cfg = case.act and dict(type=case.act)
    return dataclasses.replace(case, training=False).build(
        LAYERS[name][0], act_cfg=act_cfg, **kwargs
    )


@torch.no_grad()
def formula(name: str, layer: nn.Module, case: Case, x: Tensor) -> Tensor:
    state = {key: value.double() for key, value in layer.state_dict().items()}
    return LAYERS[name][1](Exact(state, False), case, x.double())


@torch.no_grad()
def infer(layer: nn.Module, x: Tensor) -> Tensor:
    """Run it by the kernels, in float64 too, for which they are not chosen."""
    if x.dtype != torch.float64:
        assert layer.lazy_features(x) is not None
    with mock.patch.object(receptive_field, "can_be_lazy", return_value=True):
        return layer(x)


def compare(name: str, case: Case, dtypes=(torch.float64, torch.float32)) -> None:
    layer, x = build(name, case), case.input()
    if torch.bfloat16 in dtypes:  # numbers that it can hold
        layer, x = layer.bfloat16().float(), x.bfloat16().float()
    expected = formula(name, layer, case, x)
    for dtype in dtypes:
        found = infer(copy.deepcopy(layer).to(dtype), x.to(dtype))
        assert found.dtype == dtype
        assert relative_error(found, expected) <= TOLERANCE[dtype]


@each
@given(case=formulas.cases())
@example(case=Case(kernel=(1, 1), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(case=Case(kernel=(7, 7), padding=(3, 3), channels=65, batch=1, size=(4, 3)))
def test_output_is_the_formula(name, case):
    compare(name, dataclasses.replace(case, act=case.act and "ReLU"))


# Vectors have 4 to 16 lanes, panels 3 vectors, products blocks of 4 or 8 rows; tiles, hundreds of
# positions: sizes about each of these.
ODD = [
    Case(batch=1, channels=1, out_channels=1, size=(1, 1)),
    Case(batch=1, channels=1, out_channels=1, size=(2, 1)),
    Case(channels=13, out_channels=17, size=(1, 47)),
    Case(channels=7, out_channels=49, size=(47, 1)),
    *(Case(batch=1, out_channels=7, channels=9, size=(3, w)) for w in (15, 16, 17, 48, 49)),
    Case(batch=1, channels=2, out_channels=3, size=(3, 641)),
    Case(batch=1, channels=2, out_channels=3, size=(2, 1931), stride=(1, 2)),
    Case(batch=1, channels=4, out_channels=5, size=(97, 89), stride=(2, 2)),
    Case(batch=3, channels=66, out_channels=33, size=(29, 31), groups=3),
    Case(batch=2, channels=9, out_channels=9, size=(19, 23), groups=9),
    Case(batch=1, channels=2, out_channels=3, size=(41, 43), dilation=(12, 12), padding=(12, 12)),
    Case(batch=1, channels=2, out_channels=3, size=(13, 17), kernel=(9, 1), padding=(4, 0)),
]


@each
@pytest.mark.parametrize("case", ODD, ids=str)
def test_odd_sizes(name, case):
    compare(name, case)


@each
@pytest.mark.parametrize("act", ["ReLU", None])
def test_bfloat16(name, act):
    compare(name, Case(channels=16, out_channels=24, size=(12, 19), act=act), (torch.bfloat16,))


@each
def test_autocast(name):
    case = Case(channels=16, out_channels=24, size=(12, 19))
    layer, x = build(name, case), case.input()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = infer(layer, x)
    assert found.dtype == torch.bfloat16
    # Of input and weights too, which `test_bfloat16` rounds before.
    assert relative_error(found, formula(name, layer, case, x)) <= 2 * TOLERANCE[torch.bfloat16]


@each
@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_magnitude_of_the_input(name, magnitude):
    case = Case(channels=8, out_channels=8, size=(13, 11), seed=3)
    layer, x = build(name, case), case.input() * magnitude
    expected = formula(name, layer, case, x)
    assert relative_error(infer(layer, x), expected) <= TOLERANCE[torch.float32]


@each
@pytest.mark.parametrize("norm_cfg", [None, dict(type="BN", affine=False)], ids=str)
@torch.no_grad()
def test_without_norm_or_its_parameters(name, norm_cfg):
    case = Case(channels=5, out_channels=6, size=(9, 8))
    layer, x = build(name, case, norm_cfg=norm_cfg).double(), case.input().double()
    torch.testing.assert_close(infer(layer, x), layer(x), rtol=1e-10, atol=1e-12)


@each
def test_nan_reaches_the_output(name):
    case = Case(size=(9, 11))
    layer, x = build(name, case), case.input()
    x[0, 1, 4, 5] = torch.nan
    expected = formula(name, layer, case, x)
    found = infer(layer, x)
    assert found[0].isnan().any()
    assert not found[1].isnan().any()
    assert torch.equal(found.isnan(), expected.isnan())


@each
@torch.no_grad()
def test_input_is_not_read_past_its_ends_and_may_be_a_view(name):
    case = Case(batch=1, channels=3, size=(6, 7))
    layer, x = build(name, case), case.input()
    expected = layer(x)
    wide = torch.full((x.numel() + 128,), torch.nan)
    inner = wide[64:-64].view_as(x).copy_(x)
    assert torch.equal(layer(inner), expected)
    view = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    kept = view.clone()
    assert torch.equal(layer(view), expected)
    assert torch.equal(view, kept)


@each
def test_features_are_made_where_somebody_needs_them(name):
    case = Case()
    layer, x = build(name, case), case.input()
    assert layer.lazy_features(x) is None  # a gradient may be asked for
    with torch.no_grad():
        assert layer.lazy_features(x) is not None
        assert layer.lazy_features(x.double()) is None
        assert layer.lazy_features(x[:0]) is None
        assert layer.lazy_features(x.to("meta")) is None
        with FlopCounterMode(display=False) as counter:
            layer(x)
        of_convolution = 2 * 2 * 4 * 27 * 35
        assert counter.get_total_flops() > of_convolution
        for watched in (layer.feature, layer.norm, layer.act):
            handle = watched.register_forward_hook(lambda *_: None)
            assert layer.lazy_features(x) is None
            handle.remove()
        layer.norm.train()
        assert layer.lazy_features(x) is None
        for cfg in (dict(norm_cfg=dict(type="GN", num_groups=3)), dict(act_cfg=dict(type="SiLU"))):
            assert LAYERS[name][0](3, 4, 3, **cfg).eval().lazy_features(x) is None


@each
@torch.no_grad()
def test_without_the_kernels_the_formula_runs(name, monkeypatch):
    case = Case()
    layer, x = build(name, case), case.input()
    expected = layer(x)
    monkeypatch.setattr(dispatch, "missing", lambda backend: "none here")
    monkeypatch.setattr(dispatch, "_noticed", set())
    with pytest.warns(UserWarning, match="convolutions run in plain torch.*none here"):
        found = layer(x)
    assert not torch.equal(found, expected)  # another order of sums
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------- operators


def features(x: Tensor, **changes) -> LazyFeatures:
    channels = x.shape[1]
    torch.manual_seed(0)
    feature, shift = torch.randn(channels * 9, 1, 3, 3), torch.randn(channels * 9)
    given = dict(relu=True, stride=(2, 1), padding=(1, 1), dilation=(1, 1))
    return LazyFeatures(x, feature, shift, **{**given, **changes})


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
@torch.no_grad()
def test_gates_are_checked(first, second, message):
    gates = torch.rand(first), torch.rand(second)
    with pytest.raises(ValueError, match=message):
        features(torch.randn(2, 4, 7, 6)).convolve(gates, torch.randn(6, 4, 3, 3), None, 1)


@torch.no_grad()
def test_features_are_checked():
    with pytest.raises(ValueError, match=r"x of shape .*: must not be empty"):
        features(torch.randn(0, 4, 7, 6)).max_and_mean()
    with pytest.raises(TypeError, match="x: must be float32, float64 or bfloat16"):
        features(torch.randn(2, 4, 7, 6).half()).coordinate_means()
    with pytest.raises(ValueError, match="smaller than the window"):
        features(torch.randn(2, 4, 7, 6), dilation=(9, 9)).max_and_mean()


@torch.no_grad()
def test_every_bit_is_the_same_for_any_number_of_threads():
    lazy = features(torch.randn(3, 40, 50, 61))
    by_position = torch.rand(3, 40), torch.rand(3, 9, 25, 61)
    by_coordinate = torch.rand(3, 40, 3, 25), torch.rand(3, 40, 3, 61)
    weight, threads = torch.randn(24, 40, 3, 3), torch.get_num_threads()

    def run(number: int) -> list[Tensor]:
        torch.set_num_threads(number)
        outputs = [lazy.convolve(gates, weight, None, 1) for gates in (by_position, by_coordinate)]
        return [lazy.max_and_mean(), *lazy.coordinate_means(), *outputs]

    try:
        first, *others = (run(number) for number in (1, 2, 5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
