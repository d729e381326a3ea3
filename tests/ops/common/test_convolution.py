"""The convolution with a gradient of its own against torch's."""

import pytest
import torch
from torch.nn import functional as F

from rfa_mmdet.ops.common.convolution import same_conv


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("channels", "kernel", "size"), [((2, 1), 7, (9, 4)), ((3, 5), 3, (1, 6))])
def test_gradients_are_torchs(channels, kernel, size, bias):
    given = dict(dtype=torch.float64, requires_grad=True)
    inputs = [
        torch.randn(2, channels[0], *size, **given),
        torch.randn(channels[1], channels[0], kernel, kernel, **given),
        *([torch.randn(channels[1], **given)] if bias else []),
    ]
    found, expected = same_conv(*inputs), F.conv2d(*inputs, padding=kernel // 2)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-13)


def test_autocast_converts_as_for_any_convolution():
    x, weight = torch.randn(2, 2, 5, 6, requires_grad=True), torch.randn(3, 2, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = same_conv(x, weight.requires_grad_())
        assert torch.equal(y, F.conv2d(x, weight, padding=1))
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_only_what_is_needed():
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(3, 2, 3, 3, requires_grad=True)
    same_conv(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
