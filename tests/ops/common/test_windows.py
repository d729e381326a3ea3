"""Laying out, taking apart and convolving windows, compared with loops over cells."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from rfa_mmdet.ops.common.windows import convolve_windows, lay_out, take_apart
from tests.helpers.torch_features import fills_memory

shapes = st.fixed_dictionaries(
    dict(
        batch=st.integers(0, 3),
        channels=st.integers(1, 5),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    )
)


def draw_windows(batch, channels, kernel, size):
    generator = torch.Generator().manual_seed(0)
    positions = kernel[0] * kernel[1]
    return torch.randn(batch, channels, positions, *size, generator=generator, dtype=torch.float64)


@fills_memory
def test_new_memory_is_nan():
    assert torch.empty(100).isnan().all()


@given(shapes)
def test_layout_has_every_cell_of_every_window(shape):
    windows, (kh, kw), (h, w) = draw_windows(**shape), shape["kernel"], shape["size"]
    laid_out = lay_out(windows, (kh, kw))
    assert laid_out.shape == (*windows.shape[:2], h * kh, w * kw)
    for row in range(h * kh):
        for column in range(w * kw):
            position = row % kh * kw + column % kw
            cell = windows[:, :, position, row // kh, column // kw]
            assert torch.equal(laid_out[:, :, row, column], cell)


@given(shapes)
def test_taking_apart_undoes_the_layout(shape):
    windows, kernel = draw_windows(**shape), shape["kernel"]
    assert torch.equal(take_apart(lay_out(windows, kernel), kernel), windows)
    view = windows.transpose(3, 4)  # no contiguous layout
    assert torch.equal(take_apart(lay_out(view, kernel), kernel), view)
    wide = lay_out(windows, kernel).transpose(2, 3)
    assert torch.equal(lay_out(take_apart(wide, kernel[::-1]), kernel[::-1]), wide)


@given(shapes, st.sampled_from([1, 2, 3]), st.integers(1, 3), st.booleans())
def test_convolving_windows_matches_convolving_the_layout(shape, groups, multiple, with_bias):
    shape["channels"] *= groups
    kernel, out_channels = shape["kernel"], groups * multiple
    windows = draw_windows(**shape).requires_grad_()
    weight = torch.randn(out_channels, shape["channels"] // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(out_channels, dtype=torch.float64) if with_bias else None
    inputs = [t.requires_grad_() for t in (windows, weight, bias) if t is not None]
    found = convolve_windows(windows, weight, bias, groups)
    # One window at a time.
    h, w = shape["size"]
    expected = found.new_zeros(shape["batch"], out_channels, h, w)
    for i in range(h):
        for j in range(w):
            window = windows[:, :, :, i, j].reshape(*windows.shape[:2], *kernel)
            expected[:, :, i : i + 1, j : j + 1] = F.conv2d(window, weight, bias, groups=groups)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, inputs, upstream)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("kernel", [(1, 2), (3, 2)])
def test_gradcheck_of_the_layout(kernel):
    windows = draw_windows(1, 2, kernel, (2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: lay_out(z, kernel), windows)
    laid_out = lay_out(windows.detach(), kernel).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: take_apart(z, kernel), laid_out)
