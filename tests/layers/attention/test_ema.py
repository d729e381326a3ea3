"""Compare EMA with an independent implementation of the paper's formula, group by group."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.layers import EMA
from tests.helpers.tolerances import TOLERANCES
from tests.helpers.torch_features import AUTOCAST_TYPES


def formula(x: Tensor, weights: dict[str, Tensor], factor: int) -> Tensor:
    """Equations of arXiv 2305.13563, in x's precision."""
    batch, channels, height, width = x.shape
    c = channels // factor
    images = []
    for b in range(batch):
        outs = []
        for g in range(factor):
            group = x[b, g * c : (g + 1) * c]  # (c, H, W)
            over_width = sum(group[:, :, j] for j in range(width)) / width  # (c, H)
            over_height = sum(group[:, i, :] for i in range(height)) / height  # (c, W)
            # The shared 1x1 convolution is a matrix over channels.
            matrix, bias = weights["conv1x1.weight"][:, :, 0, 0], weights["conv1x1.bias"][:, None]
            gate_h = 1 / (1 + torch.exp(-(matrix @ over_width + bias)))
            gate_w = 1 / (1 + torch.exp(-(matrix @ over_height + bias)))
            x1 = group * gate_h[:, :, None] * gate_w[:, None, :]
            # GroupNorm with one channel per group
            mean = x1.mean((1, 2), keepdim=True)
            var = ((x1 - mean) ** 2).mean((1, 2), keepdim=True)
            x1 = (x1 - mean) / (var + 1e-5).sqrt()
            x1 = x1 * weights["gn.weight"][:, None, None] + weights["gn.bias"][:, None, None]
            padded = F.pad(group, (1, 1, 1, 1))
            x2 = weights["conv3x3.bias"][:, None, None].expand(c, height, width)
            for i in range(3):
                for j in range(3):
                    cells = padded[:, i : i + height, j : j + width]
                    matrix = weights["conv3x3.weight"][:, :, i, j]
                    x2 = x2 + torch.einsum("oc,chw->ohw", matrix, cells)
            p1, p2 = x1.mean((1, 2)).exp(), x2.mean((1, 2)).exp()
            score = (p1 / p1.sum())[:, None, None] * x2 + (p2 / p2.sum())[:, None, None] * x1
            outs.append(group / (1 + torch.exp(-score.sum(0))))
        images.append(torch.cat(outs))
    return torch.stack(images)


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) / max(scale, 1e-30)


def layer_and_input(factor: int, c: int, batch: int, size: tuple[int, int], seed: int):
    torch.manual_seed(seed)
    layer = EMA(factor * c, factor)
    layer.gn.weight.data.uniform_(0.5, 1.5)
    layer.gn.bias.data.normal_()
    return layer, torch.randn(batch, factor * c, *size) + 0.5


@given(
    factor=st.integers(1, 5),
    c=st.integers(1, 5),
    batch=st.integers(1, 2),
    # GroupNorm of a single position is always 0 / sqrt(eps).
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)).filter(lambda s: s[0] * s[1] >= 4),
    seed=st.integers(0, 2**20),
)
def test_forward_and_gradients_match_the_formula(factor, c, batch, size, seed):
    layer, x = layer_and_input(factor, c, batch, size, seed)
    weights = {k: v.double().requires_grad_() for k, v in layer.state_dict().items()}
    exact = x.double().requires_grad_()
    expected = formula(exact, weights, factor)
    upstream = torch.randn_like(expected)
    names = [name for name, _ in layer.named_parameters()]
    inputs = [exact, *(weights[name] for name in names)]
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    # All parameters on one scale: e.g. that of conv3x3.bias is exactly 0 for c = 1.
    scale = max(float(g.abs().max()) for g in expected_gradients[1:])
    for dtype in (torch.float32, torch.float64):
        tolerance = TOLERANCES[dtype]
        copied = copy.deepcopy(layer).to(dtype)
        given_x = x.to(dtype).requires_grad_()
        out = copied(given_x)
        assert relative_error(out.detach(), expected.detach()) <= tolerance.output
        found = torch.autograd.grad(out, [given_x, *copied.parameters()], upstream.to(dtype))
        assert relative_error(found[0], expected_gradients[0]) <= tolerance.gradient
        for name, f, e in zip(names, found[1:], expected_gradients[1:], strict=True):
            assert float((f.double() - e).abs().max()) <= tolerance.gradient * scale, name


def test_gradcheck():
    layer, x = layer_and_input(2, 2, 1, (3, 2), 0)
    layer = layer.double()
    names = [name for name, _ in layer.named_parameters()]
    inputs = [x.double(), *(p.detach() for p in layer.parameters())]

    def run(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs])


def test_channel_groups_and_images_are_independent():
    layer, x = layer_and_input(4, 2, 3, (5, 4), 1)
    changed = x.clone()
    changed[1, 2:4] += torch.randn(2, 5, 4)
    before, after = layer(x), layer(changed)
    differs = (before != after).flatten(2).any(2)
    assert differs[1, 2:4].all()
    differs[1, 2:4] = False
    assert not differs.any()


@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
def test_autocast_is_finite_and_close_to_float32(dtype):
    layer, x = layer_and_input(4, 8, 2, (9, 7), 2)
    expected = layer(x).detach()
    given_x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(given_x)
    gradients = torch.autograd.grad(out, [given_x, *layer.parameters()], torch.randn_like(out))
    assert all(g.isfinite().all() for g in gradients)
    assert relative_error(out.detach(), expected) < TOLERANCES[dtype].output


@pytest.mark.skipif(torch.float16 not in AUTOCAST_TYPES, reason="needs torch 2.2")
def test_large_scores_do_not_overflow_in_float16():
    layer, x = layer_and_input(1, 4, 1, (6, 5), 3)
    layer.gn.weight.data.fill_(6e4)  # x1 beyond float16's 65504, its products beyond that
    with torch.autocast("cpu", dtype=torch.float16):
        out = layer(x)
    assert out.isfinite().all()
    assert relative_error(out.detach(), layer(x).detach()) < TOLERANCES[torch.float16].output


def test_float32_and_half_modules_keep_their_dtype():
    layer, x = layer_and_input(2, 3, 2, (4, 5), 4)
    assert layer(x).dtype == torch.float32
    assert layer.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_parameters_have_the_published_names():
    shapes = {k: tuple(v.shape) for k, v in EMA(64).state_dict().items()}
    assert shapes == {
        "conv1x1.weight": (2, 2, 1, 1),
        "conv1x1.bias": (2,),
        "conv3x3.weight": (2, 2, 3, 3),
        "conv3x3.bias": (2,),
        "gn.weight": (2,),
        "gn.bias": (2,),
    }


def test_invalid_factor_lists_valid_ones():
    message = r"^factor=5: must divide in_channels=12; valid: 1, 2, 3, 4, 6, 12$"
    with pytest.raises(ValueError, match=message):
        EMA(12, 5)
    with pytest.raises(ValueError, match=r"factor=32.*in_channels=48"):
        EMA(48)
    for factor in (1, 2, 3, 4, 6, 12):
        assert EMA(12, factor)(torch.randn(1, 12, 3, 4)).shape == (1, 12, 3, 4)


@pytest.mark.parametrize("argument", ["in_channels", "factor"])
@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0, ValueError, "0: must be at least 1"),
        (-4, ValueError, "-4: must be at least 1"),
        (4.0, TypeError, r"4\.0: must be an int, not float"),
        (True, TypeError, "True: must be an int, not bool"),
        ("4", TypeError, "'4': must be an int, not str"),
        (None, TypeError, "None: must be an int, not NoneType"),
        ((4, 4), TypeError, r"\(4, 4\): must be an int, not tuple"),
    ],
)
def test_arguments_must_be_positive_ints(argument, value, error, shown):
    with pytest.raises(error, match=f"^{argument}={shown}$"):
        EMA(**{"in_channels": 8, "factor": 4, argument: value})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(8, 4, 4), ValueError, r"EMA: input has shape \(8, 4, 4\)"),
        (torch.rand(1, 8, 4, 4, 1), ValueError, r"EMA: input has shape \(1, 8, 4, 4, 1\)"),
        (torch.rand(1, 6, 4, 4), ValueError, r"EMA: input has 6 channels .*in_channels=8"),
        (torch.rand(1, 8, 0, 4), ValueError, r"EMA: input has an empty map .*\(1, 8, 0, 4\)"),
        (torch.ones(1, 8, 4, 4, dtype=torch.int64), TypeError, r"EMA: .*torch\.int64"),
        (torch.ones(1, 8, 4, 4).numpy(), TypeError, "EMA: .*not ndarray"),
        ([torch.rand(1, 8, 4, 4)], TypeError, "EMA: .*not list"),
        (None, TypeError, "EMA: .*not NoneType"),
    ],
)
def test_invalid_inputs_raise(x, error, message):
    with pytest.raises(error, match=message):
        EMA(8, 4)(x)


def test_empty_batch():
    x = torch.empty(0, 8, 5, 4, requires_grad=True)
    out = EMA(8, 4)(x)
    assert out.shape == x.shape
    assert torch.autograd.grad(out, x, torch.empty_like(out))[0].shape == x.shape
