"""Maximum and mean, compared with torch's own and their autograd gradients."""

import pytest
import torch

from rfa_mmdet.layers import CBAM
from rfa_mmdet.ops.common.reductions import max_and_mean, mean


def coarse(*shape, dtype=torch.float64):
    """Return a map with few distinct values, and with a channel and a cell of zeros."""
    x = torch.randint(0, 3, shape).to(dtype)
    x[:, 0], x[:, :, 0, 0] = 0, 0
    return x.requires_grad_()


@pytest.mark.parametrize("dim", [1, (2, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equal_maxima_share_the_gradient(dim, channels_last):
    x = coarse(2, 5, 4, 7)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = x.amax(dim, keepdim=True), x.mean(dim, keepdim=True)
    found = max_and_mean(x, dim, torch.float64)
    upstream = [torch.randn_like(value) for value in expected]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    (a,), (b,) = (torch.autograd.grad(out, x, upstream) for out in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_half_precision_counts_many_ties_exactly():
    x = torch.ones(1, 1, 60, 50, dtype=torch.bfloat16, requires_grad=True)
    maxima, _ = max_and_mean(x, (2, 3), torch.float32)
    (gradient,) = torch.autograd.grad(maxima, x, torch.full_like(maxima, 3000))
    assert gradient.dtype == torch.bfloat16
    assert gradient.unique().tolist() == [1.0]


def test_second_derivative_raises():
    x = coarse(1, 2, 3, 4)
    maxima, _ = max_and_mean(x, 1, x.dtype)
    (gradient,) = torch.autograd.grad((maxima**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dim", [3, (2, 3)])
def test_mean_matches_torch(dim):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    found, expected = mean(x, dim, x.dtype), x.mean(dim)
    upstream = torch.randn_like(expected)
    (a,), (b,) = (torch.autograd.grad(out, x, upstream) for out in (found, expected))
    torch.testing.assert_close((found, a), (expected, b), rtol=1e-13, atol=1e-15)


def test_mean_of_a_row_whose_sum_overflows_float16():
    x = torch.full((2, 100), 6e4, dtype=torch.float16, requires_grad=True)
    assert mean(x, 1, torch.float16).tolist() == [x[0, 0].item()] * 2


@pytest.mark.parametrize("frozen", [(), ("spatial",), ("channel",), ("spatial", "channel")])
def test_gradients_of_cbam_with_ties_match_autograd(frozen, monkeypatch):
    layer, x = CBAM(16).double(), coarse(3, 16, 9, 8)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    upstream = torch.randn_like(x)
    found = torch.autograd.grad(layer(x), inputs, upstream)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)  # plain formulas
    expected = torch.autograd.grad(layer(x), inputs, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
