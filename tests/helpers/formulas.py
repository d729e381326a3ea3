"""Independent implementations of the papers' formulas in float64: unfold, loops, laid-out windows.

They import only the tolerances from the package. ``compare`` compares a layer with one of them.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.tolerances import TOLERANCES

NUMPY_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
ACTIVATIONS = {"ReLU": torch.relu, "SiLU": F.silu, None: lambda z: z}

# --------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Everything that determines one convolution and one input."""

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

    def build(self, layer: type[nn.Module], **kwargs) -> nn.Module:
        """Return the layer in float32, with no gate or running statistic close to its default."""
        torch.manual_seed(self.seed)
        built = layer(
            self.channels,
            self.out_channels,
            self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.mode,
            **kwargs,
        )
        for name, module in built.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                if module.affine:
                    module.weight.data.uniform_(0.5, 1.5)
                    module.bias.data.normal_()
                if module.track_running_stats:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.Conv2d | nn.Linear) and name not in ("feature", "conv"):
                # Different gates that do not saturate.
                bound = module.weight[0].numel() ** -0.5
                module.weight.data.uniform_(-bound, bound)
        return built.train(self.training)

    def input(self) -> Tensor:
        # A nonzero mean, so padded zeros differ from real values on average.
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, self.channels, *self.size, generator=generator) + 0.5


# Sizes around those of vectors (4 to 16 lanes), panels (3 vectors), blocks of products (4 or 8
# rows) and tiles (hundreds of positions).
ODD_SIZES = [
    Case(batch=1, channels=1, out_channels=1, size=(1, 1), training=False),
    Case(batch=1, channels=1, out_channels=1, size=(2, 1)),
    Case(channels=13, out_channels=17, size=(1, 47)),
    Case(channels=7, out_channels=49, size=(47, 1)),
    *(Case(batch=1, out_channels=7, channels=9, size=(3, w)) for w in (15, 16, 17, 48, 49)),
    Case(batch=1, channels=2, out_channels=3, size=(3, 641)),
    Case(batch=1, channels=2, out_channels=3, size=(2, 1931), stride=(1, 2)),
    Case(batch=1, channels=4, out_channels=5, size=(97, 89), stride=(2, 2)),
    Case(batch=1, channels=31, out_channels=67, size=(29, 31)),
    Case(batch=2, channels=66, out_channels=33, size=(9, 11), groups=3),
    Case(batch=2, channels=9, out_channels=9, size=(19, 23), groups=9),
    Case(batch=1, channels=2, out_channels=3, size=(23, 29), stride=(5, 4), kernel=(3, 3)),
    Case(batch=1, channels=2, out_channels=3, size=(41, 43), dilation=(12, 12), padding=(12, 12)),
    Case(batch=1, channels=2, out_channels=3, size=(13, 17), kernel=(9, 1), padding=(4, 0)),
]


@st.composite
def cases(draw, pointwise: bool = True) -> Case:
    """Return cases of any shape; without 1x1 kernels unless ``pointwise``."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = groups * draw(st.one_of(st.integers(1, 17 // groups), st.integers(1, 65 // groups)))
    out_channels = groups * draw(st.integers(1, 9 // groups))
    side = st.one_of(st.integers(1, 4), st.integers(1, 7))
    kernel = draw(st.tuples(side, side).filter(lambda k: pointwise or k != (1, 1)))
    stride = draw(st.tuples(*[st.integers(1, 3)] * 2))
    dilation = draw(st.tuples(*[st.integers(1, 3)] * 2))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = draw(st.tuples(*[st.integers(0, min(span, 6)) for span in spans]))
    # From a window that fits exactly once to maps of odd and even sizes, with a padding that the
    # mode can take from inside the map.
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
    # Statistics of few values divide by a variance that may be arbitrarily small.
    h, w = case.out_size()
    assume(not case.training or case.batch * min(h * w, sum(sizes)) >= 8)
    return case


# --------------------------------------------------------------------------- parts of a formula


@dataclass
class Exact:
    """State of a formula.

    ``margin`` is the smallest distance of any value to a kink, where a derivative jumps and
    rounding decides on which side float32 is.
    """

    weights: dict[str, Tensor]
    training: bool
    constant_statistics: bool = False
    margin: float = field(default=inf)

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def near(self, distance: Tensor) -> None:
        self.margin = min(self.margin, float(distance.detach().abs().min()))

    def relu(self, z: Tensor) -> Tensor:
        self.near(z)
        return z * (z > 0)

    def hard_swish(self, z: Tensor) -> Tensor:
        self.near(z - 3)
        self.near(z + 3)
        return z * (z + 3).clamp(0, 6) / 6

    def largest(self, z: Tensor, dim: int) -> Tensor:
        if z.shape[dim] > 1:
            first, second = z.detach().topk(2, dim).values.unbind(dim)
            # If ReLU makes all of them zero, no gradient passes.
            self.near(torch.where((first == 0) & (second == 0), inf, first - second))
        return z.max(dim).values

    def batch_norm(self, z: Tensor, name: str) -> Tensor:
        """Normalise (B, N, ...) over all dimensions except N."""
        shape = (1, -1) + (1,) * (z.dim() - 2)
        rest = [d for d in range(z.dim()) if d != 1]
        if self.training:
            mean = z.mean(rest)
            var = ((z - mean.reshape(shape)) ** 2).mean(rest)
            # Dividing by the deviation amplifies float32's rounding: values that vary by less than
            # a fiftieth of the input, which varies by one, cannot be compared to 1e-5.
            self.near(var.sqrt() * 5e-4)
            if self.constant_statistics:
                mean, var = mean.detach(), var.detach()
        else:
            mean, var = self[f"{name}.running_mean"], self[f"{name}.running_var"]
        z = (z - mean.reshape(shape)) / (var.reshape(shape) + 1e-5).sqrt()
        return z * self[f"{name}.weight"].reshape(shape) + self[f"{name}.bias"].reshape(shape)


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


def padded(case: Case, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    pv, ph = case.padding
    if case.mode == "zeros":
        wide = x.new_zeros(batch, channels, height + 2 * pv, width + 2 * ph)
        wide[:, :, pv : pv + height, ph : ph + width] = x
        return wide
    rows = np.pad(np.arange(height), pv, mode=NUMPY_MODES[case.mode])
    columns = np.pad(np.arange(width), ph, mode=NUMPY_MODES[case.mode])
    return x[:, :, torch.from_numpy(rows)][:, :, :, torch.from_numpy(columns)]


def windows(case: Case, x: Tensor) -> Tensor:
    """Return the K values in the window of each output position, (B, C, K, h, w)."""
    seen = F.unfold(padded(case, x), case.kernel, case.dilation, 0, case.stride)
    return seen.reshape(x.shape[0], x.shape[1], -1, *case.out_size())


def features(exact: Exact, case: Case, x: Tensor, learnt: bool = True) -> Tensor:
    """Return the receptive-field feature F, (B, C, K, h, w)."""
    seen = windows(case, x)
    batch, channels, positions, h, w = seen.shape
    if learnt:
        # Every (channel, position) has its own kernel over the channel's window.
        kernels = exact["feature.weight"].reshape(channels, positions, positions)
        seen = torch.einsum("bcjhw,cij->bcihw", seen, kernels)
    normal = exact.batch_norm(seen.reshape(batch, channels * positions, h, w), "norm")
    act = exact.relu if case.act == "ReLU" else ACTIVATIONS[case.act]
    return act(normal).reshape(batch, channels, positions, h, w)


def side_by_side(seen: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Lay out windows (B, C, K, h, w) as a map (B, C, h * kh, w * kw)."""
    batch, channels, _, h, w = seen.shape
    kh, kw = kernel
    wide = seen.new_zeros(batch, channels, h * kh, w * kw)
    for i in range(kh):
        for j in range(kw):
            wide[:, :, i::kh, j::kw] = seen[:, :, i * kw + j]
    return wide


def step_over(exact: Exact, case: Case, wide: Tensor) -> Tensor:
    """Apply the final convolution, which strides from window to window."""
    weight, bias = exact["conv.weight"], exact.weights.get("conv.bias")
    return F.conv2d(wide, weight, bias, stride=case.kernel, groups=case.groups)


def rfa_conv(exact: Exact, case: Case, x: Tensor, learnt: bool = True) -> Tensor:
    seen = windows(case, x)
    positions = seen.shape[2]
    # S: softmax over the positions of a[c, i] * A
    average = sum(seen[:, :, i] for i in range(positions)) / positions
    a = exact["attention.weight"].reshape(case.channels, positions)
    logits = torch.stack([average * a[None, :, i, None, None] for i in range(positions)], 2)
    powers = (logits - logits.amax(2, keepdim=True).detach()).exp()
    attention = powers / powers.sum(2, keepdim=True)
    weighted = features(exact, case, x, learnt) * attention
    return step_over(exact, case, side_by_side(weighted, case.kernel))


def coordinate_attention(exact: Exact, x: Tensor, name: str) -> Tensor:
    """Apply coordinate attention to a map (B, C, H, W)."""

    def conv(z: Tensor, conv_name: str) -> Tensor:
        weight, bias = exact[f"{name}.{conv_name}.weight"], exact[f"{name}.{conv_name}.bias"]
        return torch.einsum("bcn,mc->bmn", z, weight[:, :, 0, 0]) + bias[:, None]

    height, width = x.shape[2:]
    of_rows = sum(x[:, :, :, j] for j in range(width)) / width
    of_columns = sum(x[:, :, i] for i in range(height)) / height
    hidden = conv(torch.cat([of_rows, of_columns], 2), "conv1")
    hidden = exact.hard_swish(exact.batch_norm(hidden, f"{name}.bn1"))
    a_h = sigmoid(conv(hidden[:, :, :height], "conv_h"))
    a_w = sigmoid(conv(hidden[:, :, height:], "conv_w"))
    return x * a_w[:, :, None, :] * a_h[:, :, :, None]


# --------------------------------------------------------------------------- comparison


def relative_error(found: Tensor, expected: Tensor, scale: float = 0.0) -> float:
    """Return the largest difference relative to the largest expected value or its summands."""
    assert found.shape == expected.shape
    scale = max(scale, float(expected.abs().max()), 1e-30)
    return float((found.double() - expected.double()).abs().max()) / scale


def compare(
    layer: nn.Module,
    formula: Callable[[Exact, Tensor], Tensor],
    x: Tensor,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32),
) -> float:
    """Compare the layer in each dtype with the formula in float64 for the same values.

    Compares outputs, and gradients of input and parameters for a random upstream gradient; below
    float64, gradients only if no value is within 1e-5 of a kink.

    Returns:
        float: Distance of the closest value to a kink.
    """
    state = {name: value.double() for name, value in layer.state_dict().items()}
    names = [name for name, _ in layer.named_parameters()]
    inputs = [x.double().requires_grad_(), *(state[name].requires_grad_() for name in names)]
    exact = Exact(state, layer.training)
    expected = formula(exact, inputs[0])
    generator = torch.Generator().manual_seed(expected.numel())
    upstream, *others = torch.randn(4, *expected.shape, generator=generator, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
    # Measure rounding relative to the summands of a gradient. In training mode, the batch
    # statistics of BN cancel most of it, often all but the eps. The terms of one upstream gradient
    # may also cancel by chance, but not those of several.
    terms = expected
    if layer.training:
        terms = formula(Exact(state, True, constant_statistics=True), inputs[0])
    draws = [torch.autograd.grad(terms, inputs, u, retain_graph=True) for u in (upstream, *others)]
    scales = [max(float(g.abs().max()) for g in of_one) for of_one in zip(*draws, strict=True)]
    for dtype in dtypes:
        tolerance = TOLERANCES[dtype]
        copied, given_x = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()
        out = copied(given_x)
        assert out.dtype == dtype
        assert relative_error(out.detach(), expected.detach()) <= tolerance.output
        if dtype != torch.float64 and exact.margin < 1e-5:
            continue
        found = torch.autograd.grad(out, [given_x, *copied.parameters()], upstream.to(dtype))
        # A gradient far smaller than all others has the rounding errors of intermediate values.
        least = 1e-3 * max(scales) if dtype != torch.float64 else 0.0
        for name, f, e, scale in zip(["x", *names], found, expected_gradients, scales, strict=True):
            assert relative_error(f, e, max(scale, least)) <= tolerance.gradient, (name, dtype)
    return exact.margin


def gradcheck(layer: nn.Module, x: Tensor) -> bool:
    layer = layer.double()
    names = [name for name, _ in layer.named_parameters()]
    inputs = [x.double(), *(p.detach() for p in layer.parameters())]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        # A copy each time, because running statistics change in training mode.
        module = copy.deepcopy(layer)
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))

    return torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs])


def check_empty_batch(layer: nn.Module, mode: str) -> None:
    """Compare a layer (4, 6, 3, stride 2, padding 1) with torch for an empty batch."""
    x = torch.empty(0, 4, 7, 5, requires_grad=True)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode=mode)
    expected = nn.Sequential(conv, nn.BatchNorm2d(6)).eval()(x)
    out = layer.eval()(x)
    assert out.shape == expected.shape == (0, 6, 4, 3)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], torch.empty_like(out))
    assert gradients[0].shape == x.shape
    assert all(not g.any() for g in gradients[1:])


def check_refused_inputs(layer: nn.Module) -> None:
    """Check that a layer (8, 8, 3, padding 0, dilation 2), window 5, rejects invalid inputs."""
    name = type(layer).__name__
    for x, error, message in [
        (torch.rand(8, 9, 9), ValueError, "input has shape (8, 9, 9); must be (B, C, H, W)"),
        (torch.rand(1, 6, 9, 9), ValueError, "input has 6 channels (shape (1, 6, 9, 9))"),
        (torch.ones(1, 8, 9, 9, dtype=torch.int64), TypeError, "not a tensor of torch.int64"),
        (None, TypeError, "not NoneType"),
        (torch.rand(1, 8, 0, 9), ValueError, "input has an empty map (shape (1, 8, 0, 9))"),
        (torch.rand(1, 8, 4, 9), ValueError, "(1, 8, 4, 9) with padding=(0, 0) is smaller than"),
        (torch.rand(1, 8, 9, 4), ValueError, "(1, 8, 9, 4) with padding=(0, 0) is smaller than"),
    ]:
        with pytest.raises(error) as raised:
            layer(x)
        assert str(raised.value).startswith(f"{name}: ")
        assert message in str(raised.value)
    assert layer.eval()(torch.rand(1, 8, 5, 5)).shape == (1, 8, 1, 1)
