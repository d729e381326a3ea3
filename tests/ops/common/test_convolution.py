"""Convolutions with few channels and their gradients, compared with torch."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from rfa_mmdet.ops.common.convolution import (
    conv_to_one,
    conv_to_one_gradients,
    same_conv_gradients,
)

assert_close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)


def problem(channels, kernel, size, batch=2):
    """Return x, weight and grad_y, and torch's results: y and the gradients."""
    x = torch.randn(batch, channels[0], *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(channels[1], channels[0], kernel, kernel).double().requires_grad_()
    y = F.conv2d(x, weight, padding=kernel // 2)
    grad_y = torch.randn_like(y)
    gradients = torch.autograd.grad(y, (x, weight), grad_y)
    return x.detach(), weight.detach(), grad_y, y.detach(), gradients


@pytest.mark.parametrize(("channels", "kernel", "size"), [((2, 1), 7, (9, 4)), ((3, 5), 3, (1, 6))])
def test_gradients_match_torch(channels, kernel, size):
    x, weight, grad_y, _, gradients = problem(channels, kernel, size)
    assert_close(same_conv_gradients(grad_y, x, weight), gradients)


@pytest.mark.parametrize("size", [(5, 6), (1, 4), (4, 1), (1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("batch", [0, 3])
def test_convolution_to_one_channel_matches_torch(size, batch):
    x, weight, grad_y, y, gradients = problem((4, 1), 3, size, batch)
    assert_close(conv_to_one(x, weight), y)
    assert_close(conv_to_one_gradients(grad_y, x, weight), gradients)
