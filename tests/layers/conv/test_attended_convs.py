"""Compare CAMConv, CBAMConv and CAConv with the papers' formulas.

tests/layers/test_every_layer.py checks what mmcv and MMDetection require.
"""

import pytest
import torch
from hypothesis import example, given
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.layers import CAConv, CAMConv, CBAMConv
from tests.helpers import formulas
from tests.helpers.formulas import Case, Exact, sigmoid


def channel_attention(exact: Exact, x: Tensor, name: str) -> Tensor:
    """Apply CBAM's channel attention: a shared MLP on maxima and means."""

    def mlp(vector: Tensor) -> Tensor:
        first, second = exact[f"{name}.mlp.0.weight"], exact[f"{name}.mlp.2.weight"]
        return exact.relu(vector @ first[:, :, 0, 0].T) @ second[:, :, 0, 0].T

    cells = x.flatten(2)
    score = mlp(exact.largest(cells, 2)) + mlp(cells.sum(2) / cells.shape[2])
    return x * sigmoid(score)[:, :, None, None]


def cam(exact: Exact, x: Tensor) -> Tensor:
    return channel_attention(exact, x, "attention")


def cbam(exact: Exact, x: Tensor) -> Tensor:
    x = channel_attention(exact, x, "attention.channel")
    pooled = torch.stack([exact.largest(x, 1), x.sum(1) / x.shape[1]], 1)
    weight = exact["attention.spatial.weight"]
    return x * sigmoid(F.conv2d(pooled, weight, padding=weight.shape[2] // 2))


def ca(exact: Exact, x: Tensor) -> Tensor:
    return formulas.coordinate_attention(exact, x, "attention")


LAYERS = {CAMConv: cam, CBAMConv: cbam, CAConv: ca}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def compare(layer: type, case: Case, **kwargs) -> float:
    def formula(exact: Exact, x: Tensor) -> Tensor:
        # The convolution as a product with the unfolded input.
        seen = formulas.windows(case, LAYERS[layer](exact, x))  # (B, C, K, h, w)
        wide = formulas.side_by_side(seen, case.kernel)
        return formulas.step_over(exact, case, wide)

    return formulas.compare(case.build(layer, **kwargs), formula, case.input())


@given(formulas.cases())
@example(Case(kernel=(1, 1), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(Case(kernel=(2, 4), padding=(0, 3), channels=65, batch=1, size=(2, 9)))
def test_cam_conv_matches_the_formula(case):
    compare(CAMConv, case)


@given(formulas.cases())
@example(Case(kernel=(1, 1), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(Case(kernel=(2, 4), padding=(0, 3), channels=65, batch=1, size=(2, 9)))
def test_cbam_conv_matches_the_formula(case):
    compare(CBAMConv, case)


@given(formulas.cases())
@example(Case(kernel=(1, 1), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(Case(kernel=(2, 4), padding=(0, 3), channels=65, batch=1, size=(2, 9)))
def test_ca_conv_matches_the_formula(case):
    compare(CAConv, case)


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_float32_gradients_are_compared(layer, training, mode, dilation):
    window = dict(dilation=(dilation,) * 2, padding=(dilation,) * 2, stride=(2, 2))
    # 33 channels give a hidden width of 2.
    case = Case(mode=mode, training=training, size=(9, 11), channels=33, seed=1, **window)
    assert compare(layer, case) > 1e-5, "choose another seed: a value lies on a corner"


@pytest.mark.parametrize(
    ("layer", "kwargs"),
    [
        (CAMConv, dict(reduction=3)),
        (CBAMConv, dict(reduction=3)),
        (CBAMConv, dict(spatial_kernel_size=1)),
        (CBAMConv, dict(spatial_kernel_size=5)),
        (CAConv, dict(reduction=3)),
    ],
    ids=str,
)
def test_other_attention_sizes_match_the_formula(layer, kwargs):
    compare(layer, Case(channels=27), **kwargs)


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(layer, training):
    window = dict(size=(4, 3), kernel=(2, 3), padding=(1, 1))
    case = Case(batch=1, channels=2, out_channels=2, training=training, seed=1, **window)
    assert formulas.gradcheck(case.build(layer), case.input())


@every_layer
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_empty_batch_wherever_torch_accepts_one(layer, mode):
    formulas.check_empty_batch(layer(4, 6, 3, stride=2, padding=1, padding_mode=mode), mode)


@every_layer
def test_input_is_unchanged_and_may_be_a_view(layer):
    built = Case(training=False).build(layer)
    base = torch.randn(2, 9, 11, 3)
    view = base.permute(0, 3, 2, 1)[:, :, 1::2]  # not contiguous
    kept = view.clone()
    torch.testing.assert_close(built(view), built(kept))
    assert torch.equal(view, kept)


@pytest.mark.parametrize(
    ("layer", "channels", "kwargs", "attention"),
    [
        (CAMConv, 64, {}, {"mlp.0.weight": (4, 64, 1, 1), "mlp.2.weight": (64, 4, 1, 1)}),
        (CAMConv, 9, {}, {"mlp.0.weight": (1, 9, 1, 1), "mlp.2.weight": (9, 1, 1, 1)}),
        (
            CBAMConv,
            64,
            dict(reduction=4),
            {
                "channel.mlp.0.weight": (16, 64, 1, 1),
                "channel.mlp.2.weight": (64, 16, 1, 1),
                "spatial.weight": (1, 2, 7, 7),
            },
        ),
        (
            CAConv,
            320,
            {},
            {
                "conv1.weight": (10, 320, 1, 1),
                "conv1.bias": (10,),
                "bn1.weight": (10,),
                "bn1.bias": (10,),
                "conv_h.weight": (320, 10, 1, 1),
                "conv_h.bias": (320,),
                "conv_w.weight": (320, 10, 1, 1),
                "conv_w.bias": (320,),
            },
        ),
    ],
)
def test_parameters_match_the_paper(layer, channels, kwargs, attention):
    built = layer(channels, 6, 3, **kwargs)
    expected = {f"attention.{name}": shape for name, shape in attention.items()}
    expected |= {"conv.weight": (6, channels, 3, 3), "conv.bias": (6,)}
    assert {k: tuple(p.shape) for k, p in built.named_parameters()} == expected


@pytest.mark.parametrize(
    ("layer", "kwargs", "error", "message"),
    [
        *[
            (layer, dict(reduction=value), error, f"reduction={value!r}: must be {must}")
            for layer in LAYERS
            for value, error, must in [
                (0, ValueError, "at least 1"),
                ("x", TypeError, "an int, not str"),
                (None, TypeError, "an int, not NoneType"),
            ]
        ],
        (
            CBAMConv,
            dict(spatial_kernel_size=4),
            ValueError,
            "spatial_kernel_size=4: must be odd, to keep the size",
        ),
        (
            CBAMConv,
            dict(spatial_kernel_size=0),
            ValueError,
            "spatial_kernel_size=0: must be at least 1",
        ),
        (
            CBAMConv,
            dict(spatial_kernel_size=(7, 7)),
            TypeError,
            "spatial_kernel_size=(7, 7): must be an int, not tuple",
        ),
    ],
    ids=str,
)
def test_invalid_arguments_give_clear_errors(layer, kwargs, error, message):
    with pytest.raises(error) as raised:
        layer(8, 8, 3, **kwargs)
    assert str(raised.value) == message


@every_layer
def test_invalid_inputs_give_clear_errors(layer):
    formulas.check_refused_inputs(layer(8, 8, 3, padding=0, dilation=2))
