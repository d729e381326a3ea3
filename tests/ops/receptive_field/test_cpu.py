"""The C++ kernels, compared with the paper's formula in float64, for many windows and sizes."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field import WindowFeatures, autograd, fold_batch_norm, rfa_conv
from rfa_mmdet.ops.receptive_field.schema import OPERATORS
from tests.helpers import formulas
from tests.helpers.backends import build, require, run
from tests.helpers.formulas import Case, relative_error
from tests.helpers.memory import deterministic
from tests.helpers.operator_calls import arguments, operator_calls
from tests.helpers.tolerances import TOLERANCES
from tests.helpers.torch_features import has_opcheck

DTYPES = (torch.float64, torch.float32)
cases = partial(formulas.cases, pointwise=False)
acts = st.sampled_from(["ReLU", None])


@pytest.fixture(autouse=True, scope="module")
def cpu_backend():
    require("cpu")


def compare(case: Case, dtypes=DTYPES, **kwargs) -> None:
    layer, x = build(case, backend="cpu", **kwargs), case.input()
    if torch.bfloat16 in dtypes:  # round to values that bfloat16 can represent
        layer, x = layer.bfloat16().float(), x.bfloat16().float()
    formulas.compare(layer, lambda exact, x: formulas.rfa_conv(exact, case, x), x, dtypes)


@given(cases(), acts)
def test_output_and_all_gradients_match_the_formula(case, act):
    compare(dataclasses.replace(case, act=act))


@settings(max_examples=30)
@given(cases(), acts, st.booleans())
def test_bfloat16(case, act, library):
    # No batch statistics: the variance may only depend on the last three bits of the input.
    with torch.backends.mkldnn.flags(enabled=library):  # with oneDNN's products, and without
        compare(dataclasses.replace(case, act=act, training=False), (torch.bfloat16,))


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [16, 75])  # one block, and several
def test_bfloat16_in_training(channels, training, library):
    case = Case(batch=2, channels=channels, out_channels=24, size=(15, 41), training=training)
    with torch.backends.mkldnn.flags(enabled=library):
        compare(case, (torch.bfloat16,))


@pytest.mark.parametrize("case", formulas.ODD_SIZES, ids=str)
def test_odd_sizes(case):
    compare(case)


@pytest.mark.parametrize("norm_cfg", [None, dict(type="BN", affine=False)], ids=str)
@pytest.mark.parametrize("feature", ["conv", "unfold"])
@pytest.mark.parametrize("training", [True, False])
def test_without_norm_or_its_parameters(norm_cfg, feature, training):
    case = Case(batch=2, channels=5, out_channels=6, size=(9, 8), training=training, act=None)
    layer = build(case, backend="cpu", norm_cfg=norm_cfg, feature=feature).double()
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    x = case.input().double()
    for found, expected in zip(run(layer, x), run(reference, x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_of_the_input(magnitude, training, dtype):
    case = Case(batch=2, channels=8, out_channels=8, size=(13, 11), training=training, seed=3)
    layer, x = build(case, backend="cpu"), case.input() * magnitude
    reference = copy.deepcopy(layer).double()
    reference.backend = "reference"
    # With logits of 1e3, rounding the logits alone causes errors of this size.
    tolerance = 10 * TOLERANCES[dtype].output
    found = run(copy.deepcopy(layer).to(dtype), x.to(dtype))
    for f, e in zip(found, run(reference, x.double()), strict=True):
        assert f.isfinite().all()
        assert relative_error(f, e) < tolerance


def window_statistics(x, kernel, stride, padding, dilation):
    channels = x.shape[1]
    windows = F.unfold(x.double(), kernel, dilation, padding, stride).unflatten(1, (channels, -1))
    windows = windows.permute(1, 2, 0, 3).flatten(2)  # (C, K, B * h * w)
    mean = windows.mean(2)
    centred = windows - mean[:, :, None]
    return mean, centred @ centred.mT / windows.shape[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "window",
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (0, 0), (1, 1)),
        ((2, 5), (1, 3), (1, 4), (2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 1e3])
def test_moments(dtype, window, offset):
    x = (torch.randn(3, 5, 37, 41) + offset).to(dtype)
    first, second = torch.ops.rfa_mmdet.window_moments(x, *window)
    mean, covariance = window_statistics(x, *window)
    tolerance = TOLERANCES[dtype].statistics
    # The values nearly cancel in the mean, so measure its error relative to the values.
    assert relative_error(first, mean, float(x.double().abs().mean())) < tolerance
    assert relative_error(second, covariance) < tolerance


def test_gradients_of_an_empty_batch_are_zero():
    """A rank may have an empty batch. New memory is NaN in these tests."""
    x, kernels, shift = torch.empty(0, 4, 6, 5), torch.rand(36, 1, 3, 3), torch.rand(36)
    weight, grad_y = torch.rand(6, 4, 3, 3), torch.empty(0, 6, 6, 5)
    window = (3, 3), (1, 1), (1, 1), (1, 1)
    gates = torch.empty(0, 4), torch.empty(0, 9, 6, 5)
    needs = (True,) * 4
    with deterministic():
        found = [
            *torch.ops.rfa_mmdet.rfa_conv_backward(
                grad_y, x, shift.view(36, 1, 1, 1), kernels, shift, True, weight, needs, *window, 1
            ),
            *torch.ops.rfa_mmdet.gated_conv_backward(
                grad_y, x, kernels, shift, True, *gates, weight, needs, *window, 1
            ),
        ]
    assert {tuple(t.shape) for t in found} >= {weight.shape, kernels.shape, shift.shape}
    assert all((t == 0).all() for t in found)


def test_statistics_far_from_zero_match_torch():
    # With a mean of 1e3 deviations, squares in float32 lose the deviation completely.
    x = torch.randn(4, 6, 23, 29) + 1e3
    layer = build(Case(channels=6, padding=(0, 0)), backend="cpu")
    exact = copy.deepcopy(layer.norm).double()
    layer(x)
    features = F.conv2d(x.double(), layer.feature.weight.double(), groups=6)
    exact(features)
    tolerance = TOLERANCES[torch.float32].statistics
    assert relative_error(layer.norm.running_mean, exact.running_mean) < tolerance
    ratio = layer.norm.running_var / exact.running_var
    assert relative_error(ratio, torch.ones(54)) < tolerance


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["ReLU", None])
def test_gradcheck(kernel, training, act):
    window = dict(size=(4, 3), kernel=kernel, padding=(1, 1))
    case = Case(batch=2, channels=2, out_channels=2, act=act, training=training, **window)
    assert formulas.gradcheck(build(case, backend="cpu"), case.input())


def test_second_derivative_raises():
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    layer = build(Case(channels=2), backend="cpu").double()
    with pytest.raises(RuntimeError, match="no second derivative; pass backend='reference'"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_results_are_bitwise_reproducible(threads, dtype):
    case = Case(batch=2, channels=24, out_channels=20, size=(33, 37))
    layer, x = build(case, backend="cpu").to(dtype), case.input().to(dtype)
    before = torch.get_num_threads()
    try:
        alone = run(copy.deepcopy(layer), x)
        torch.set_num_threads(threads)
        again = run(copy.deepcopy(layer), x)
    finally:
        torch.set_num_threads(before)
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    for name, a, b in zip(names, alone, again, strict=True):
        # torch sums the gradient of the bias.
        assert torch.equal(a, b) or (name == "conv.bias" and threads > 1), name


def saved_bytes(layer, x) -> int:
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(sizes.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("channels", "size"),
    [(64, (100, 167)), (128, (50, 84)), (256, (50, 84)), (512, (25, 42)), (512, (5, 5))],
)
def test_kept_bytes_are_those_of_a_plain_convolution(channels, size, training):
    x = torch.randn(1, channels, *size, requires_grad=True)
    layer = build(Case(channels=channels, out_channels=channels, training=training), backend="cpu")
    plain = torch.nn.Conv2d(channels, channels, 3, padding=1)
    assert saved_bytes(layer, x) <= 1.1 * saved_bytes(plain, x)


@pytest.mark.parametrize("feature", ["conv", "unfold"])
def test_recomputed_statistics_give_the_same_gradients_as_saved_ones(feature, monkeypatch):
    results = []
    for least in (0, float("inf")):
        monkeypatch.setattr(autograd, "KEEP_FROM", least)
        torch.manual_seed(0)
        layer = build(Case(channels=4, out_channels=5), backend="cpu", feature=feature)
        results.append(run(layer, torch.randn(2, 4, 9, 8)))
    for saved, recomputed in zip(*results, strict=True):
        assert torch.equal(saved, recomputed)


@pytest.mark.parametrize("frozen", ["conv", "feature", "attention", "norm", "all", "input"])
def test_freezing_parameters_does_not_change_other_gradients(frozen):
    case = Case(batch=2, channels=4, out_channels=5, size=(9, 8))
    layer, x = build(case, backend="cpu").double(), case.input().double()
    upstream = torch.randn(2, 5, 9, 8, dtype=torch.float64)
    full = copy.deepcopy(layer)
    named = dict(full.named_parameters())
    given = x.clone().requires_grad_()
    expected = dict(
        zip(
            ["input", *named],
            torch.autograd.grad(full(given), [given, *named.values()], upstream),
            strict=True,
        )
    )
    given = x.clone().requires_grad_(frozen != "input")
    for name, p in layer.named_parameters():
        p.requires_grad_(frozen != "all" and not name.startswith(frozen))
    wanted = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if frozen != "input":
        wanted["input"] = given
    found = torch.autograd.grad(layer(given), list(wanted.values()), upstream)
    for name, gradient in zip(wanted, found, strict=True):
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_views_and_layouts(layout):
    case = Case(batch=2, channels=4, out_channels=5, size=(9, 8))
    layer = build(case, backend="cpu").double().eval()
    base = torch.randn(2, 9, 16, 4, dtype=torch.float64)
    x = base.permute(0, 3, 1, 2)[..., ::2]
    kept = base.clone()
    torch.testing.assert_close(layer(x.to(memory_format=layout)), layer(x.clone()))
    assert torch.equal(base, kept)


def test_input_is_not_read_past_its_ends():
    case = Case(batch=1, channels=3, out_channels=4, size=(6, 7))
    layer, x = build(case, backend="cpu").eval(), case.input()
    wide = torch.full((x.numel() + 128,), torch.nan)
    inner = wide[64:-64].view_as(x).copy_(x)
    assert torch.equal(layer(inner), layer(x))


# --------------------------------------------------------------------------- operators


@has_opcheck
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, torch.channels_last), (torch.bfloat16, torch.contiguous_format)],
)
def test_operators_pass_opcheck(dtype, layout):
    calls = operator_calls(dtype, layout)
    assert {operator._qualified_op_name.partition("::")[2] for operator, _ in calls} == {
        *OPERATORS,
        *("fold_batch_norm", "fold_moments", "fold_moments_backward"),
    }
    for operator, inputs in calls:
        results = torch.library.opcheck(operator.default, inputs)
        assert set(results.values()) == {"SUCCESS"}


OVER_THE_MAP = dict(x=torch.zeros(2, 4, 1, 6), window=([5, 3], [1, 1], [1, 1], [1, 1]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=torch.zeros(2, 4, 7)), ValueError, r"x: must be \(B, C, H, W\)"),
        (dict(x=torch.zeros(2, 4, 7, 6).half()), TypeError, "x: must be float32, float64 or bf"),
        (dict(x=torch.zeros(2, 4, 0, 6)), ValueError, "x of shape .*: only the batch may be empty"),
        (OVER_THE_MAP, ValueError, "smaller than the window"),
        (dict(weight=torch.zeros(6, 4, 3, 3)), ValueError, r"weight: must have .* \[6, 2, 3, 3\]"),
        (dict(weight=torch.zeros(6, 2, 3, 3).double()), TypeError, "weight: must be Float as x is"),
        (dict(groups=3), ValueError, "groups=3: must divide the channels 4 and 6"),
        (dict(attention=torch.zeros(4, 9)), ValueError, r"attention: must .* \[36, 1, 1, 1\]"),
        (dict(feature=torch.zeros(36, 9)), ValueError, r"feature: must .* \[36, 1, 3, 3\]"),
        (dict(window=([3, 3], [0, 1], [1, 1], [1, 1])), ValueError, r"stride=\[0, 1\].*least 1"),
        (dict(window=([3, 3], [1, 1], [-1, 1], [1, 1])), ValueError, r"padding=\[-1, 1\]"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias: must have the shape \[6\]"),
    ],
    ids=str,
)
def test_arguments_of_the_kernels_are_checked(changes, error, message):
    x, (attention, feature, shift), weight, window = arguments()
    given = dict(x=x, attention=attention, feature=feature, weight=weight, window=window)
    given = {**given, "bias": None, "groups": 2, **changes}
    with pytest.raises(error, match=message):
        torch.ops.rfa_mmdet.rfa_conv(
            given["x"],
            given["attention"],
            given["feature"],
            shift,
            True,
            given["weight"],
            given["bias"],
            *given["window"],
            given["groups"],
        )


def test_functions_without_a_layer_match_the_reference():
    x, weight = torch.randn(2, 4, 9, 7), torch.randn(6, 4, 3, 3)
    attention, feature = torch.randn(36, 1, 1, 1), torch.randn(36, 1, 3, 3)
    gamma, beta = torch.rand(36) + 0.5, torch.randn(36)
    window = Window((3, 3), padding=(1, 1))
    _, folded, shift, mean, var = fold_batch_norm(x, feature, gamma, beta, 1e-3, window)
    features = WindowFeatures(x, folded, shift, True, window)
    y = features.attend(attention, weight, None, 1)
    running = (torch.zeros(36), torch.zeros(36))
    expected = rfa_conv(
        *(x, attention, feature, weight),
        norm=lambda f: F.batch_norm(f, *running, gamma, beta, True, 1.0, 1e-3),
        act=torch.relu,
        padding=(1, 1),
    )
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((mean, var), running)
