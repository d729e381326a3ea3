"""RFAConv, compared with an independent implementation of its formula."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from torch.nn import functional as F

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.ops.receptive_field import receptive_field_mean
from tests.helpers import formulas
from tests.helpers.formulas import Case
from tests.helpers.tolerances import TOLERANCES
from tests.helpers.torch_features import AUTOCAST_TYPES

cases = partial(formulas.cases, pointwise=False)


def build(case: Case) -> RFAConv:
    return case.build(RFAConv, act_cfg=case.act and dict(type=case.act))


def compare(case: Case) -> float:
    return formulas.compare(
        build(case), lambda exact, x: formulas.rfa_conv(exact, case, x), case.input()
    )


@given(cases())
@example(Case(kernel=(2, 4), padding=(0, 3)))
@example(Case(kernel=(1, 5), padding=(0, 2), stride=(2, 3), dilation=(1, 2), size=(9, 11)))
@example(Case(channels=17, kernel=(5, 5), padding=(2, 2), groups=17, out_channels=17))
@example(Case(mode="circular", dilation=(3, 3), padding=(3, 3), batch=1, size=(9, 9)))
def test_output_and_all_gradients_match_the_formula(case):
    compare(case)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_relu_gradients_in_float32(training, mode, dilation):
    window = dict(dilation=(dilation,) * 2, padding=(dilation,) * 2, stride=(2, 2))
    case = Case(mode=mode, training=training, size=(9, 11), seed=1, **window)
    assert compare(case) > 1e-5, "choose another seed: a feature is at ReLU's kink"


def test_defaults_match_the_paper():
    layer = RFAConv(4, 6, 3)
    keys = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert keys == {
        "attention.weight": (36, 1, 1, 1),
        "feature.weight": (36, 1, 3, 3),
        "norm.weight": (36,),
        "norm.bias": (36,),
        "conv.weight": (6, 4, 3, 3),
        "conv.bias": (6,),
    }
    assert layer.padding == (1, 1)
    assert RFAConv(4, 6, (5, 3), dilation=2).padding == (4, 2)
    x = torch.randn(2, 4, 7, 5)
    assert layer(x).shape == (2, 6, 7, 5)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    window = dict(size=(4, 3), kernel=(2, 3), padding=(1, 1))
    case = Case(batch=1, channels=2, out_channels=2, act="SiLU", training=training, **window)
    assert formulas.gradcheck(build(case), case.input())


def test_running_statistics_follow_the_features():
    case = Case(act=None)
    layer, x = build(case), case.input()
    before = F.conv2d(x, layer.feature.weight, padding=1, groups=3)
    mean = 0.9 * layer.norm.running_mean + 0.1 * before.mean((0, 2, 3))
    var = 0.9 * layer.norm.running_var + 0.1 * before.var((0, 2, 3), unbiased=True)
    layer(x)
    torch.testing.assert_close(layer.norm.running_mean, mean)
    torch.testing.assert_close(layer.norm.running_var, var)


@given(cases())
def test_attention_map_is_the_softmax_of_the_scaled_means(case):
    layer, x = build(case).double(), case.input().double()
    found = layer.attention_map(x)
    assert found.shape == (case.batch, case.channels, np.prod(case.kernel), *case.out_size())
    torch.testing.assert_close(found.sum(2), torch.ones_like(found[:, :, 0]))
    # log S[i] - log S[0] = (a[i] - a[0]) * A
    a = layer.attention.weight.reshape(case.channels, -1)
    pad = (case.padding[1],) * 2 + (case.padding[0],) * 2
    padded = F.pad(x, pad, mode="constant" if case.mode == "zeros" else case.mode)
    windows = F.unfold(padded, case.kernel, case.dilation, 0, case.stride)
    average = windows.reshape(case.batch, case.channels, -1, *case.out_size()).mean(2)
    for i in range(a.shape[1]):
        expected = average * (a[:, i] - a[:, 0])[None, :, None, None]
        torch.testing.assert_close(found[:, :, i].log() - found[:, :, 0].log(), expected)


@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_autocast_is_finite_and_close_to_float32(dtype, dilation):
    layer = build(Case(channels=8, dilation=(dilation,) * 2, padding=(dilation,) * 2))
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], torch.randn_like(out))
    assert all(g.isfinite().all() for g in gradients)
    # Twice the tolerance: two convolutions with rounded inputs and weights.
    tolerance = 2 * TOLERANCES[dtype].output
    assert formulas.relative_error(out.detach(), expected.detach()) < tolerance


@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
@pytest.mark.parametrize("dilation", [1, 2])
def test_attention_is_float32_under_autocast(dtype, dilation):
    layer = RFAConv(1, 1, 3, dilation=dilation, padding=0, norm_cfg=None, act_cfg=None).eval()
    # Logits of 1e5 overflow in float16, and 1e5 and 1e5 + 1 are equal in half precision.
    differences = torch.arange(9.0)
    layer.attention.weight.data = (1e5 + differences).reshape(9, 1, 1, 1)
    x = torch.ones(1, 1, 5, 5)
    with torch.autocast("cpu", dtype=dtype):
        found = layer.attention_map(x)
        out = layer(x)
    assert found.dtype == torch.float32
    expected = torch.softmax(differences, 0).reshape(1, 1, 9, 1, 1).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
@pytest.mark.parametrize("dilation", [(1, 1), (1, 3)])
def test_means_are_not_rounded_by_autocast(dtype, dilation):
    x = torch.randn(2, 3, 9, 7) + 100
    window = ((3, 3), (2, 1), (1, 3), dilation)
    expected = receptive_field_mean(x, *window)
    with torch.autocast("cpu", dtype=dtype):
        found = receptive_field_mean(x, *window)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_empty_batch_wherever_torch_accepts_one(mode):
    formulas.check_empty_batch(RFAConv(4, 6, 3, stride=2, padding=1, padding_mode=mode), mode)


def test_one_value_per_channel_raises_in_training():
    x = torch.randn(1, 2, 3, 3)
    layer = RFAConv(2, 2, 3, padding=0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    assert layer.eval()(x).shape == (1, 2, 1, 1)


@pytest.mark.parametrize("dilation", [1, 2])
def test_input_is_not_modified_and_may_be_a_view(dilation):
    layer = RFAConv(3, 4, 3, dilation=dilation).eval()
    base = torch.randn(2, 9, 11, 3)
    view = base.permute(0, 3, 2, 1)[:, :, 1::2]  # no contiguous layout
    kept = view.clone()
    torch.testing.assert_close(layer(view), layer(kept))
    assert torch.equal(view, kept)
