"""The operators in plain torch, compared with their formulas in float64, and their memory."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak_bytes
from rfa_mmdet.ops.receptive_field import plain, slices
from rfa_mmdet.ops.receptive_field.schema import OPERATORS
from tests.helpers import formulas
from tests.helpers.formulas import Case, relative_error
from tests.helpers.memory import nan_filled_memory  # noqa: F401, a fixture
from tests.helpers.tolerances import TOLERANCES

MIB = 2**20
# From blocks of one channel and one row to a single block.
limits = st.sampled_from([8, 400, 3000, 20000, MIB])
cases = partial(formulas.cases, pointwise=False)


@contextmanager
def blocks_of(size: int):
    before = slices.CPU_BYTES
    slices.CPU_BYTES = size
    yield
    slices.CPU_BYTES = before


class Arguments:
    """Arguments of the operators for a case."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(case.seed)
        randn = partial(torch.randn, generator=generator, dtype=torch.float64)
        kh, kw = case.kernel
        wide, size = case.channels * kh * kw, case.out_size()
        self.case, self.window = case, (case.kernel, case.stride, case.padding, case.dilation)
        self.x = randn(case.batch, case.channels, *case.size) + 0.5
        self.attention, self.feature = randn(wide, 1, 1, 1), randn(wide, 1, kh, kw)
        self.shift, self.relu = randn(wide), case.act == "ReLU"
        self.weight = randn(case.out_channels, case.channels // case.groups, kh, kw)
        self.bias = randn(case.out_channels) if case.bias else None
        maps = case.batch, case.channels
        self.channel_gates = randn(maps), randn(case.batch, kh * kw, *size)
        self.row_gates = randn(*maps, kh, size[0]), randn(*maps, kw, size[1])
        self.upstream = partial(torch.randn, generator=generator)

    def features(self, x: Tensor, feature: Tensor, shift: Tensor) -> Tensor:
        """(B, C, K, h, w)."""
        seen = formulas.windows(self.case, x)
        channels, positions = seen.shape[1:3]
        kernels = feature.reshape(channels, positions, positions)
        seen = torch.einsum("bcjhw,cij->bcihw", seen, kernels)
        seen = seen + shift.reshape(channels, positions, 1, 1)
        return torch.relu(seen) if self.relu else seen

    def convolve(self, weighted: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = formulas.side_by_side(weighted, self.case.kernel)
        return F.conv2d(wide, weight, bias, stride=self.case.kernel, groups=self.case.groups)

    def rfa_conv(self, x, attention, feature, shift, weight, bias=None):
        mean = formulas.windows(self.case, x).mean(2, keepdim=True)
        logits = attention.reshape(1, x.shape[1], -1, 1, 1) * mean
        features = self.features(x, feature, shift)
        return self.convolve(features * logits.softmax(2), weight, bias)

    def gated_conv(self, x, feature, shift, first, second, weight, bias=None):
        features = self.features(x, feature, shift)
        if first.dim() == 2:
            gates = first[:, :, None, None, None] * second[:, None]
        else:
            gates = first[:, :, :, None, :, None] * second[:, :, None, :, None, :]
            gates = gates.flatten(2, 3)
        return self.convolve(features * gates, weight, bias)


def zero_padded(case: Case) -> Case:
    return Case(**{**case.__dict__, "mode": "zeros"})


def check(found, expected, dtype=torch.float64) -> None:
    """Compare the results of a backward pass with autograd's."""
    for f, e in zip(found, expected, strict=True):
        assert f.dtype in (dtype, torch.float32, torch.float64)
        assert relative_error(f, e) < TOLERANCES[dtype].gradient


def lowered(tensors, dtype):
    return [None if t is None else t.to(dtype) for t in tensors]


def compare_conv(given: Arguments, dtype, gates=None) -> None:
    """Compare output and gradients of ``rfa_conv``, or of ``gated_conv`` if given gates."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, bias = lowered((given.x, given.weight, given.bias), dtype)
    features = lowered((given.feature, given.shift), sums)
    if gates is None:
        attention = given.attention.to(sums)
        learnt, formula = [x, attention, *features, weight], given.rfa_conv
        inputs, forward = (x, attention, *features, given.relu), plain.rfa_conv
        backward = plain.rfa_conv_backward
    else:
        gates = lowered(gates, sums)
        learnt, formula = [x, *features, *gates, weight], given.gated_conv
        inputs, forward = (x, *features, given.relu, *gates), plain.gated_conv
        backward = plain.gated_conv_backward
    learnt = [*learnt, bias] if bias is not None else learnt
    learnt = [t.double().clone().requires_grad_() for t in learnt]
    y = forward(*inputs, weight, bias, *given.window, given.case.groups)
    expected = formula(*learnt)
    assert y.dtype == dtype
    assert relative_error(y, expected.detach()) < TOLERANCES[dtype].output
    upstream = given.upstream(y.shape, dtype=torch.float64).to(dtype)
    needs = (True, True, True, bias is not None)
    found = backward(upstream, *inputs, weight, needs, *given.window, given.case.groups)
    found = found if bias is not None else found[:-1]
    check(found, torch.autograd.grad(expected, learnt, upstream.double()), dtype)


@given(cases(), limits)
def test_rfa_conv(case, limit):
    with blocks_of(limit):
        compare_conv(Arguments(zero_padded(case)), torch.float64)


@given(cases(), limits, st.booleans())
def test_gated_conv(case, limit, rows):
    given = Arguments(zero_padded(case))
    with blocks_of(limit):
        compare_conv(given, torch.float64, given.row_gates if rows else given.channel_gates)


@settings(max_examples=20)
@given(cases(), limits)
def test_pools(case, limit):
    given = Arguments(zero_padded(case))
    inputs = [given.x, given.feature, given.shift]
    learnt = [t.clone().requires_grad_() for t in inputs]
    features = given.features(*learnt)
    pooled = torch.stack([features.max(1).values, features.mean(1)], 1)
    laid_out = features.unflatten(2, case.kernel)
    rows, columns = laid_out.mean((3, 5)), laid_out.mean((2, 4))
    with blocks_of(limit):
        channel_pools, largest = plain.pool_channels(*inputs, given.relu, True, *given.window)
        coordinate_means = plain.pool_coordinates(*inputs, given.relu, *given.window)
        torch.testing.assert_close(channel_pools, pooled.detach())
        torch.testing.assert_close(coordinate_means, (rows.detach(), columns.detach()))
        upstream = given.upstream(pooled.shape, dtype=torch.float64)
        found = plain.pool_channels_backward(
            upstream, *inputs, given.relu, largest, (True, True), *given.window
        )
        check(found, torch.autograd.grad(pooled, learnt, upstream, retain_graph=True))
        upstreams = [given.upstream(t.shape, dtype=torch.float64) for t in (rows, columns)]
        found = plain.pool_coordinates_backward(
            *upstreams, *inputs, given.relu, (True, True), *given.window
        )
        check(found, torch.autograd.grad((rows, columns), learnt, upstreams))


@settings(max_examples=20)
@given(cases(), limits, st.sampled_from([0.0, 1e3]))
def test_moments(case, limit, offset):
    case = zero_padded(case)
    given = Arguments(case)
    x = (given.x + offset).requires_grad_()
    seen = formulas.windows(case, x).permute(1, 2, 0, 3, 4).flatten(2)  # (C, K, B * h * w)
    mean, count = seen.mean(2), seen.shape[2]
    centred = seen - mean.unsqueeze(2)
    covariance = centred @ centred.mT / count
    slope = given.upstream(covariance.shape, dtype=torch.float64)
    slope, constant = slope + slope.mT, given.upstream(mean.shape, dtype=torch.float64)
    values = slope @ seen.detach() + constant.unsqueeze(2)
    with blocks_of(limit):
        found = plain.window_moments(x.detach(), *given.window)
        grad_x, more = (
            plain.window_moments_backward(x.detach(), slope, constant, grad, *given.window)
            for grad in (None, x.detach())
        )
    assert relative_error(more, grad_x + x.detach(), 1.0) < 1e-12
    for f, e in zip(found, (mean, covariance), strict=True):
        assert relative_error(f, e.detach(), 1.0) < 1e-9
    check([grad_x], torch.autograd.grad(seen, x, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gates", [None, "channel_gates", "row_gates"])
@pytest.mark.parametrize("limit", [3000, MIB])
def test_precision(dtype, groups, gates, limit):
    # No ReLU, because rounding could move values across its kink.
    case = Case(channels=8, out_channels=6, size=(13, 11), groups=groups, act=None)
    given = Arguments(case)
    with blocks_of(limit):
        compare_conv(given, dtype, gates and getattr(given, gates))


@pytest.mark.parametrize("needs", [(False, True), (True, False), (False, False)])
def test_unneeded_gradients_are_empty(needs):
    case = Case(channels=4, out_channels=6)
    given = Arguments(case)
    inputs = (given.x, given.attention, given.feature, given.shift, True, given.weight)
    y = given.upstream((2, 6, 7, 5), dtype=torch.float64)
    backward = partial(plain.rfa_conv_backward, y, *inputs)
    everything = backward((True,) * 4, *given.window, 1)
    found = backward((*needs, *needs), *given.window, 1)
    needed = [needs[0], *[needs[1]] * 3, *needs]
    for f, e, need in zip(found, everything, needed, strict=True):
        assert torch.equal(f, e) if need else f.shape == (0,)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_layouts_and_views(layout):
    given = Arguments(Case(batch=3, channels=4, out_channels=6, size=(9, 8)))
    wide = given.upstream((3, 4, 9, 16), dtype=torch.float64)
    given.x = wide.contiguous(memory_format=layout)[..., ::2]
    with blocks_of(3000):
        compare_conv(given, torch.float64)


def test_empty_batch():
    given = Arguments(Case(channels=4, out_channels=6, bias=False))
    x = given.x[:0]
    inputs = (x, given.attention, given.feature, given.shift, True, given.weight)
    y = plain.rfa_conv(*inputs, None, *given.window, 1)
    assert y.shape == (0, 6, 7, 5)
    needs = (True, True, True, True)
    grad_x, *others = plain.rfa_conv_backward(y, *inputs, needs, *given.window, 1)
    assert grad_x.shape == x.shape
    assert all(not t.any() for t in others)


def test_products_as_convolutions():
    a, b = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double().mT
    torch.testing.assert_close(plain.as_convolution(a, b), a @ b)


def test_every_operator_is_implemented():
    assert {kernel.__name__ for kernel in plain.KERNELS} == set(OPERATORS)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((1, 64, 100, 168), 1), ((1, 128, 100, 168), 2), ((2, 256, 32, 32), 1), ((1, 512, 25, 42), 1)],
    ids=str,
)
@pytest.mark.parametrize("gates", [None, "channel_gates", "row_gates"])
def test_memory_is_about_that_of_a_plain_convolution(shape, stride, gates):
    batch, channels, *size = shape
    given = Arguments(
        Case(batch, channels, channels, tuple(size), stride=(stride, stride), bias=False)
    )
    x, weight, *parameters = (
        t.float() for t in (given.x, given.weight, given.attention, given.feature, given.shift)
    )
    features, needs = (*parameters[1:], True), (True, True, True, False)
    if gates is None:
        inputs = (x, parameters[0], *features)
        forward, backward = plain.rfa_conv, plain.rfa_conv_backward
    else:
        inputs = (x, *features, *(gate.float() for gate in getattr(given, gates)))
        forward, backward = plain.gated_conv, plain.gated_conv_backward

    def lean() -> None:
        y = forward(*inputs, weight, None, *given.window, 1)
        backward(y, *inputs, weight, needs, *given.window, 1)

    def convolution() -> None:
        learnt = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = F.conv2d(*learnt, None, stride, 1)
        torch.autograd.grad(y, learnt, torch.ones_like(y))

    cpu = torch.device("cpu")
    assert peak_bytes(lean, cpu) <= 1.5 * peak_bytes(convolution, cpu)


def test_temporary_memory_does_not_grow_with_the_map():
    def temporary(height: int) -> int:
        given = Arguments(Case(1, 16, 16, (height, 64), bias=False))
        inputs = (given.x, given.attention, given.feature, given.shift, True, given.weight)
        y = torch.ones(1, 16, height, 64, dtype=torch.float64)
        kept = y.nbytes + 2 * given.x.nbytes  # the gradient, and padded x

        def run() -> None:
            plain.rfa_conv(*inputs, None, *given.window, 1)
            plain.rfa_conv_backward(y, *inputs, (True,) * 4, *given.window, 1)

        return peak_bytes(run, torch.device("cpu")) - kept

    assert temporary(1000) <= 1.2 * temporary(250)


def test_moments_of_no_windows_are_zero():
    """A rank without data must not spoil the statistics of the others."""
    found = plain.window_moments(torch.empty(0, 4, 5, 5), (3, 2), (1, 1), (1, 1), (1, 1))
    assert [t.shape for t in found] == [(4, 6), (4, 6, 6)]
    assert not any(t.any() for t in found)
