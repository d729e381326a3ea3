"""RFAConv against the paper's formula, written here once more: unfold, loops, stride k."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.ops.rfa_conv import receptive_field_mean

NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
ACTIVATIONS = {"ReLU": torch.relu, "SiLU": F.silu, None: lambda z: z}


@dataclass(frozen=True)
class Case:
    """One layer and one input, everything that shapes them."""

    batch: int = 2
    channels: int = 3
    out_channels: int = 4
    size: tuple[int, int] = (7, 5)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = True
    mode: str = "zeros"
    act: str | None = "ReLU"
    training: bool = True
    seed: int = 0

    def out_size(self) -> tuple[int, int]:
        spans = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans)

    def layer(self) -> RFAConv:
        """The layer in float32, no parameter and no running statistic at its default."""
        torch.manual_seed(self.seed)
        layer = RFAConv(
            self.channels,
            self.out_channels,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.mode,
            act_cfg=self.act and dict(type=self.act),
        )
        layer.norm.weight.data.uniform_(0.5, 1.5)
        layer.norm.bias.data.normal_()
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2)
        layer.attention.weight.data.normal_()
        return layer.train(self.training)

    def input(self) -> Tensor:
        # A mean other than zero, so that padded zeros differ from real cells on average.
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, self.channels, *self.size, generator=generator) + 0.5


def formula(
    case: Case, x: Tensor, weights: dict[str, Tensor], constant_statistics: bool = False
) -> tuple[Tensor, Tensor]:
    """The paper's layer in x's precision; also F before its activation."""
    batch, channels, (kh, kw), (h, w) = case.batch, case.channels, case.kernel, case.out_size()
    positions = kh * kw
    (pv, ph), (height, width) = case.padding, case.size
    if case.mode == "zeros":
        padded = x.new_zeros(batch, channels, height + 2 * pv, width + 2 * ph)
        padded[:, :, pv : pv + height, ph : ph + width] = x
    else:
        rows = np.pad(np.arange(height), pv, mode=NUMPY_MODES[case.mode])
        columns = np.pad(np.arange(width), ph, mode=NUMPY_MODES[case.mode])
        padded = x[:, :, torch.from_numpy(rows)][:, :, :, torch.from_numpy(columns)]
    windows = F.unfold(padded, case.kernel, case.dilation, 0, case.stride)
    windows = windows.reshape(batch, channels, positions, h, w)

    # F: every (channel, position) has a kernel of its own over the window of the channel
    kernels = weights["feature.weight"].reshape(channels, positions, positions)
    before = torch.einsum("bcjhw,cij->bcihw", windows, kernels)
    if case.training:
        mean = before.mean((0, 3, 4))
        var = ((before - mean[None, :, :, None, None]) ** 2).mean((0, 3, 4))
        if constant_statistics:
            mean, var = mean.detach(), var.detach()
    else:
        mean = weights["norm.running_mean"].reshape(channels, positions)
        var = weights["norm.running_var"].reshape(channels, positions)
    gamma = weights["norm.weight"].reshape(channels, positions)
    beta = weights["norm.bias"].reshape(channels, positions)
    scale = gamma / (var + 1e-5).sqrt()
    before = before * scale[None, :, :, None, None]
    before = before + (beta - mean * scale)[None, :, :, None, None]
    features = ACTIVATIONS[case.act](before)

    # S: softmax over the positions of a[c, i] * A
    average = sum(windows[:, :, i] for i in range(positions)) / positions
    a = weights["attention.weight"].reshape(channels, positions)
    logits = torch.stack([average * a[None, :, i, None, None] for i in range(positions)], 2)
    powers = (logits - logits.amax(2, keepdim=True).detach()).exp()
    attention = powers / powers.sum(2, keepdim=True)

    # Windows side by side: (h * kh, w * kw), and a convolution that steps from one to the next
    wide = x.new_zeros(batch, channels, h * kh, w * kw)
    for i in range(kh):
        for j in range(kw):
            position = i * kw + j
            wide[:, :, i::kh, j::kw] = features[:, :, position] * attention[:, :, position]
    out = F.conv2d(
        wide, weights["conv.weight"], weights.get("conv.bias"), stride=(kh, kw), groups=case.groups
    )
    return out, before


def relative_error(found: Tensor, expected: Tensor, terms: Tensor | None = None) -> float:
    """Largest difference over the largest expected value, or over that of what sums up to it."""
    assert found.shape == expected.shape
    scale = max(float(t.abs().max()) for t in (expected, terms) if t is not None)
    return float((found.double() - expected.double()).abs().max()) / max(scale, 1e-30)


def compare(case: Case, dtype: torch.dtype, tolerance: float, gradients: bool = True) -> float:
    """Compare the layer in ``dtype`` with the formula in float64 at the same numbers."""
    layer, x = case.layer(), case.input()
    state = {k: v.double() for k, v in layer.state_dict().items()}
    names = [name for name, _ in layer.named_parameters()]
    expected_inputs = [x.double().requires_grad_()]
    expected_inputs += [state[name].requires_grad_() for name in names]
    expected, before = formula(case, expected_inputs[0], state)
    # The derivative of ReLU jumps: near 0, rounding decides which side float32 is on.
    margin = float(before.detach().abs().min()) if case.act == "ReLU" else 1.0

    layer = layer.to(dtype)
    x = x.to(dtype).requires_grad_()
    out = layer(x)
    assert out.dtype == dtype
    assert relative_error(out.detach(), expected.detach()) <= tolerance
    if not gradients and margin < 1e-5:
        return margin
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, expected_inputs, upstream)
    # BN in training mode subtracts from the gradient of the features what the batch statistics
    # take back, often all but the eps: rounding is to be measured by what is subtracted from.
    feature = 1 + names.index("feature.weight")
    terms = [None] * len(expected_inputs)
    fixed, _ = formula(case, expected_inputs[0], state, constant_statistics=True)
    terms[feature] = torch.autograd.grad(fixed, expected_inputs[feature], upstream)[0]
    found = torch.autograd.grad(out, [x, *layer.parameters()], upstream.to(dtype))
    for name, f, e, t in zip(["x", *names], found, expected_gradients, terms, strict=True):
        assert relative_error(f, e, t) <= tolerance, name
    return margin


@st.composite
def cases(draw) -> Case:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 17 // groups))
    out_channels = groups * draw(st.integers(1, 9 // groups))
    side = st.integers(1, 5)
    kernel = draw(st.tuples(side, side).filter(lambda k: k != (1, 1)))
    stride = draw(st.tuples(*[st.integers(1, 3)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = draw(st.tuples(*[st.integers(0, min(span, 6)) for span in spans]))
    # From a window that fits just once to maps of odd and even sizes; a padding that the mode
    # can take from inside the map.
    sizes = []
    for span, p in zip(spans, padding, strict=True):
        least = max(1, span - 2 * p)
        least = max(least, {"reflect": p + 1, "circular": p}.get(mode, 1))
        sizes.append(draw(st.integers(least, least + 8)))
    case = Case(
        batch=draw(st.sampled_from([1, 2, 3])),
        channels=channels,
        out_channels=out_channels,
        size=tuple(sizes),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        mode=mode,
        act=draw(st.sampled_from(["ReLU", "ReLU", "SiLU", None])),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
    # Statistics of a few values divide by a variance that may be any small number.
    h, w = case.out_size()
    assume(not case.training or case.batch * h * w >= 8)
    return case


@given(cases())
def test_float64_forward_and_every_gradient_are_the_formula(case):
    compare(case, torch.float64, 1e-10)


@given(cases())
@example(Case(kernel=(2, 4), padding=(0, 3)))
@example(Case(kernel=(1, 5), padding=(0, 2), stride=(2, 3), dilation=(1, 2), size=(9, 11)))
@example(Case(channels=17, kernel=(5, 5), padding=(2, 2), groups=17, out_channels=17))
@example(Case(mode="circular", dilation=(3, 3), padding=(3, 3), batch=1, size=(9, 9)))
def test_float32_is_the_formula(case):
    compare(case, torch.float32, 1e-5, gradients=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_float32_relu_gradients_are_the_formula(training, mode, dilation):
    window = dict(dilation=(dilation,) * 2, padding=(dilation,) * 2, stride=(2, 2))
    case = Case(mode=mode, training=training, size=(9, 11), **window)
    margin = compare(case, torch.float32, 1e-5)
    assert margin > 1e-6, "choose another seed: a feature lies on ReLU's corner"


def test_defaults_are_those_of_the_paper():
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
    case = Case(
        batch=1, channels=2, out_channels=2, size=(4, 3), kernel=(2, 3), padding=(1, 1), act="SiLU"
    )
    layer = case.layer().double().train(training)
    names = [name for name, _ in layer.named_parameters()]
    inputs = [case.input().double(), *(p.detach() for p in layer.parameters())]

    def run(x, *weights):
        # A copy each time: running statistics move in training mode.
        module = copy.deepcopy(layer)
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs])


def test_running_statistics_follow_the_features():
    case = Case(act=None)
    layer, x = case.layer(), case.input()
    before = F.conv2d(x, layer.feature.weight, padding=1, groups=3)
    mean = 0.9 * layer.norm.running_mean + 0.1 * before.mean((0, 2, 3))
    var = 0.9 * layer.norm.running_var + 0.1 * before.var((0, 2, 3), unbiased=True)
    layer(x)
    torch.testing.assert_close(layer.norm.running_mean, mean)
    torch.testing.assert_close(layer.norm.running_var, var)


@given(cases())
def test_attention_map_is_the_softmax_of_the_scaled_means(case):
    layer, x = case.layer().double(), case.input().double()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dilation", [1, 2])
def test_autocast_is_finite_and_near_float32(dtype, dilation):
    layer = Case(channels=8, dilation=(dilation,) * 2, padding=(dilation,) * 2).layer()
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], torch.randn_like(out))
    assert all(g.isfinite().all() for g in gradients)
    # Eight bits of mantissa in bfloat16, eleven in float16, over sums of 72 products.
    tolerance = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    assert relative_error(out.detach(), expected.detach()) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dilation", [1, 2])
def test_attention_is_float32_under_autocast(dtype, dilation):
    layer = RFAConv(1, 1, 3, dilation=dilation, padding=0, norm_cfg=None, act_cfg=None).eval()
    # Logits of 1e5 overflow in float16, and half precision cannot tell 1e5 from 1e5 + 1.
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
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
    window = dict(stride=2, padding=1, padding_mode=mode)
    x = torch.empty(0, 4, 7, 5, requires_grad=True)
    expected = nn.Sequential(nn.Conv2d(4, 6, 3, **window), nn.BatchNorm2d(6)).eval()(x)
    layer = RFAConv(4, 6, 3, **window).eval()
    out = layer(x)
    assert out.shape == expected.shape == (0, 6, 4, 3)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], torch.empty_like(out))
    assert gradients[0].shape == x.shape
    assert all(not g.any() for g in gradients[1:])


def test_one_value_a_channel_is_refused_in_training_as_by_torch():
    x = torch.randn(1, 2, 3, 3)
    layer = RFAConv(2, 2, 3, padding=0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    assert layer.eval()(x).shape == (1, 2, 1, 1)


@pytest.mark.parametrize("dilation", [1, 2])
def test_input_is_left_as_it_was_and_may_be_a_view(dilation):
    layer = RFAConv(3, 4, 3, dilation=dilation).eval()
    base = torch.randn(2, 9, 11, 3)
    view = base.permute(0, 3, 2, 1)[:, :, 1::2]  # no contiguous layout
    kept = view.clone()
    torch.testing.assert_close(layer(view), layer(kept))
    assert torch.equal(view, kept)
