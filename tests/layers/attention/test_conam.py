"""Compare ConAM with an independent implementation of the paper's formula, patch by patch."""

import copy
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rfa_mmdet.layers import ConAM
from tests.helpers.tolerances import TOLERANCES
from tests.helpers.torch_features import AUTOCAST_TYPES


def patches(height: int, width: int, s: int) -> list[tuple[slice, slice]]:
    """Return rows and columns of each patch; patches at the border end with the map."""
    return [
        (slice(top, min(top + s, height)), slice(left, min(left + s, width)))
        for top in range(0, height, s)
        for left in range(0, width, s)
    ]


def mlp(vector: Tensor, weights: dict[str, Tensor]) -> Tensor:
    hidden = (weights["linear1.weight"] @ vector + weights["linear1.bias"]).clamp_min(0)
    return (weights["linear2.weight"] @ hidden + weights["linear2.bias"]).clamp_min(0)


def formula(x: Tensor, weights: dict[str, Tensor], s: int, scale: bool) -> tuple[Tensor, float]:
    """Apply confidence attention, arXiv 2110.14369; also return the largest dot product."""
    batch, _, height, width = x.shape
    cells = patches(height, width, s)
    images, largest = [], 0.0
    for b in range(batch):
        whole = mlp(x[b].flatten(1).mean(1), weights)
        local = [mlp(x[b][:, rows, columns].flatten(1).mean(1), weights) for rows, columns in cells]
        score = torch.stack([(vector * whole).sum() for vector in local])
        largest = max(largest, float(score.detach().max()))
        powers = (score - score.max().detach()).exp()
        confidence = powers / powers.sum()
        if scale:
            confidence = confidence * len(cells)
        gate = x.new_zeros(height, width)
        for (rows, columns), value in zip(cells, confidence, strict=True):
            gate[rows, columns] = value
        images.append(x[b] + x[b] * gate)
    return torch.stack(images), largest


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    return float((found.double() - expected.double()).abs().max()) / max(scale, 1e-30)


def gates(layer: ConAM, x: Tensor) -> Tensor:
    """Return the factor at each position of the map, (B, H, W)."""
    gate = layer(x) / x - 1
    torch.testing.assert_close(gate, gate[:, :1].expand_as(gate))  # the same for every channel
    return gate[:, 0]


@st.composite
def cases(draw):
    s = draw(st.integers(1, 5))
    return dict(
        channels=draw(st.integers(1, 17)),
        hidden=draw(st.integers(1, 9)),
        s=s,
        size=draw(st.tuples(st.integers(s, 9), st.integers(s, 9))),
        batch=draw(st.integers(1, 2)),
        scale=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def build(case: dict) -> tuple[ConAM, Tensor]:
    torch.manual_seed(case["seed"])
    layer = ConAM(case["channels"], case["s"], case["hidden"], scale_by_patches=case["scale"])
    # Large enough for different confidences, with hidden units on both sides of ReLU's kink.
    for linear in (layer.linear1, layer.linear2):
        linear.weight.data.normal_(std=linear.in_features**-0.5)
        linear.bias.data.normal_(mean=0.3, std=0.5)
    return layer, torch.randn(case["batch"], case["channels"], *case["size"]) + 0.5


@given(cases())
def test_forward_and_gradients_match_the_formula(case):
    layer, x = build(case)
    cells = patches(*case["size"], case["s"])
    weights = {k: v.double().requires_grad_() for k, v in layer.state_dict().items()}
    exact = x.double().requires_grad_()
    expected, score = formula(exact, weights, case["s"], case["scale"])
    upstream = torch.randn_like(expected)
    names = [name for name, _ in layer.named_parameters()]
    inputs = [exact, *(weights[name] for name in names)]
    expected_gradients = torch.autograd.grad(expected, inputs, upstream)
    # Softmax subtracts the weighted mean from each patch's gradient, which is everything with a
    # single patch. Rounding is measured relative to the minuend.
    of_gates = (upstream * exact.detach() * (len(cells) if case["scale"] else 1)).sum(1)
    terms = [float(of_gates[:, rows, columns].sum((1, 2)).abs().max()) for rows, columns in cells]
    scale = max(*terms, *(float(g.abs().max()) for g in expected_gradients[1:]))
    # Softmax turns a dot product's absolute rounding error into a relative one.
    steep = max(1, score / 10)
    for dtype in (torch.float32, torch.float64):
        tolerance = TOLERANCES[dtype]
        copied = copy.deepcopy(layer).to(dtype)
        given_x = x.to(dtype).requires_grad_()
        out = copied(given_x)
        assert relative_error(out.detach(), expected.detach()) <= tolerance.output * steep
        found = torch.autograd.grad(out, [given_x, *copied.parameters()], upstream.to(dtype))
        assert relative_error(found[0], expected_gradients[0]) <= tolerance.gradient * steep
        for name, f, e in zip(names, found[1:], expected_gradients[1:], strict=True):
            assert float((f.double() - e).abs().max()) <= tolerance.gradient * steep * scale, name


def test_gradcheck():
    layer, x = build(dict(channels=3, hidden=4, s=2, size=(3, 5), batch=1, scale=False, seed=5))
    layer = layer.double()
    names = [name for name, _ in layer.named_parameters()]
    inputs = [x.double(), *(p.detach() for p in layer.parameters())]

    def run(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs])


@given(cases())
def test_confidences_sum_to_one_or_average_to_one(case):
    layer, x = build(case)
    layer, x = layer.double(), x.double()
    s, (height, width) = case["s"], case["size"]
    gate = gates(layer, x)
    values = torch.stack(
        [gate[:, rows, columns].flatten(1)[:, 0] for rows, columns in patches(height, width, s)], 1
    )
    for i, (rows, columns) in enumerate(patches(height, width, s)):
        expected = values[:, i, None, None].expand_as(gate[:, rows, columns])
        torch.testing.assert_close(gate[:, rows, columns], expected)
    number = ceil(height / s) * ceil(width / s)
    assert values.shape[1] == number
    total = torch.full((case["batch"],), float(number if case["scale"] else 1), dtype=x.dtype)
    torch.testing.assert_close(values.sum(1), total)


def test_padding_does_not_dilute_a_border_patch():
    layer, _ = build(dict(channels=2, hidden=6, s=4, size=(6, 5), batch=1, scale=False, seed=3))
    # Constant map: each patch, with 4 x 4, 4 x 1, 2 x 4 or 2 x 1 real pixels, has the same mean.
    x = torch.tensor([1.5, -0.5])[None, :, None, None].expand(1, 2, 6, 5)
    torch.testing.assert_close(gates(layer, x), torch.full((1, 6, 5), 0.25))


def test_scaling_multiplies_confidences_by_the_number_of_patches():
    case = dict(channels=4, hidden=5, s=3, size=(7, 8), batch=2, scale=False, seed=7)
    plain, x = build(case)
    scaled, _ = build({**case, "scale": True})
    torch.testing.assert_close(scaled(x) - x, 9 * (plain(x) - x))
    assert not ConAM(4, 3, 5).scale_by_patches


@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
def test_autocast_keeps_the_confidences_of_float32(dtype):
    case = dict(channels=16, hidden=8, s=3, size=(11, 8), batch=2, scale=True, seed=8)
    layer, x = build(case)
    # Dot products beyond float16's 65504, and a few units apart.
    layer.linear2.bias.data.fill_(100)
    expected = layer(x).detach()
    given_x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(given_x)
    gradients = torch.autograd.grad(out, [given_x, *layer.parameters()], torch.randn_like(out))
    assert all(g.isfinite().all() for g in gradients)
    # x is float32, and so is everything else.
    assert relative_error(out.detach(), expected) < TOLERANCES[torch.float32].output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_module(dtype):
    case = dict(channels=16, hidden=8, s=3, size=(11, 8), batch=2, scale=True, seed=9)
    layer, x = build(case)
    layer, x = layer.to(dtype), x.to(dtype)
    expected, _ = formula(
        x.double(), {k: v.double() for k, v in layer.state_dict().items()}, 3, scale=True
    )
    out = layer(x)
    assert out.dtype == dtype
    # Only the rounding of gate and result, not of the sums before.
    assert relative_error(out.detach(), expected) < TOLERANCES[dtype].output


def test_parameters_have_the_published_names():
    shapes = {k: tuple(v.shape) for k, v in ConAM(6, 2, 4).state_dict().items()}
    assert shapes == {
        "linear1.weight": (4, 6),
        "linear1.bias": (4,),
        "linear2.weight": (6, 4),
        "linear2.bias": (6,),
    }


@pytest.mark.parametrize(("height", "width"), [(3, 9), (9, 3), (3, 3)])
def test_patch_larger_than_the_map_raises(height, width):
    message = (
        rf"ConAM: patch_size=4 is larger than the {height} x {width} map; "
        "must be from 1 to 3 here"
    )
    with pytest.raises(ValueError, match=message):
        ConAM(2, 4, 4)(torch.rand(1, 2, height, width))
    x = torch.rand(1, 2, height, width)
    assert ConAM(2, 3, 4)(x).shape == x.shape


@pytest.mark.parametrize("argument", ["in_channels", "patch_size", "hidden_channels"])
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
    arguments = {"in_channels": 8, "patch_size": 2, "hidden_channels": 4, argument: value}
    with pytest.raises(error, match=f"^{argument}={shown}$"):
        ConAM(**arguments)


@pytest.mark.parametrize("value", ["False", 0, 1, None, 2.0])
def test_scale_by_patches_must_be_a_bool(value):
    with pytest.raises(TypeError, match=f"^scale_by_patches={value!r}: must be a bool, not "):
        ConAM(8, 2, 4, scale_by_patches=value)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.rand(8, 4, 4), ValueError, r"ConAM: input has shape \(8, 4, 4\)"),
        (torch.rand(1, 8, 4, 4, 1), ValueError, r"ConAM: input has shape \(1, 8, 4, 4, 1\)"),
        (torch.rand(1, 6, 4, 4), ValueError, r"ConAM: input has 6 channels .*in_channels=8"),
        (torch.rand(1, 8, 4, 0), ValueError, r"ConAM: input has an empty map .*\(1, 8, 4, 0\)"),
        (torch.ones(1, 8, 4, 4, dtype=torch.uint8), TypeError, r"ConAM: .*torch\.uint8"),
        (torch.ones(1, 8, 4, 4).numpy(), TypeError, "ConAM: .*not ndarray"),
        ((torch.rand(1, 8, 4, 4),), TypeError, "ConAM: .*not tuple"),
        (None, TypeError, "ConAM: .*not NoneType"),
    ],
)
def test_invalid_inputs_raise(x, error, message):
    with pytest.raises(error, match=message):
        ConAM(8, 2, 4)(x)


def test_empty_batch():
    x = torch.empty(0, 8, 5, 4, requires_grad=True)
    out = ConAM(8, 2, 4)(x)
    assert out.shape == x.shape
    assert torch.autograd.grad(out, x, torch.empty_like(out))[0].shape == x.shape
