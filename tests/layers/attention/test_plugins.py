"""Compare SE, ECA, CBAM and CoordAtt with independent implementations of their formulas.

tests/layers/test_every_layer.py checks what mmcv and MMDetection require.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from rfa_mmdet.layers import (
    CBAM,
    ECA,
    SE,
    CAConv,
    CAMConv,
    CBAMConv,
    CoordAtt,
    RFCAConv,
    RFCBAMConv,
)
from rfa_mmdet.layers.attention.cbam import ChannelAttention
from tests.helpers import formulas
from tests.helpers.formulas import Exact, sigmoid
from tests.helpers.torch_features import AUTOCAST_TYPES

# --------------------------------------------------------------------------- the formulas


def mean(x: Tensor) -> Tensor:
    """Return the mean of each channel, (B, C)."""
    height, width = x.shape[2:]
    return sum(x[:, :, i, j] for i in range(height) for j in range(width)) / (height * width)


def se(exact: Exact, x: Tensor) -> Tensor:
    hidden = exact.relu(torch.einsum("bc,hc->bh", mean(x), exact["fc.0.weight"]))
    score = torch.einsum("bh,ch->bc", hidden, exact["fc.2.weight"])
    return torch.einsum("bcij,bc->bcij", x, sigmoid(score))


def eca(exact: Exact, x: Tensor) -> Tensor:
    kernel = exact["conv.weight"].flatten()
    means, channels, reach = mean(x), x.shape[1], len(kernel) // 2
    scores = []
    for c in range(channels):
        near = range(max(0, c - reach), min(channels, c + reach + 1))
        scores.append(sum(kernel[n - c + reach] * means[:, n] for n in near))
    return torch.einsum("bcij,bc->bcij", x, sigmoid(torch.stack(scores, 1)))


def cbam(exact: Exact, x: Tensor) -> Tensor:
    def mlp(vector: Tensor) -> Tensor:
        first, second = exact["channel.mlp.0.weight"], exact["channel.mlp.2.weight"]
        hidden = exact.relu(torch.einsum("bc,hc->bh", vector, first[:, :, 0, 0]))
        return torch.einsum("bh,ch->bc", hidden, second[:, :, 0, 0])

    batch, channels, height, width = x.shape
    score = mlp(exact.largest(x.reshape(batch, channels, -1), 2)) + mlp(mean(x))
    x = torch.einsum("bcij,bc->bcij", x, sigmoid(score))
    kernel = exact["spatial.weight"][0]  # (2, k, k)
    reach = kernel.shape[1] // 2
    both = [exact.largest(x, 1), sum(x[:, c] for c in range(channels)) / channels]
    score = x.new_zeros(batch, height, width)
    for z, weights in zip(both, kernel, strict=True):
        wide = x.new_zeros(batch, height + 2 * reach, width + 2 * reach)
        wide[:, reach : reach + height, reach : reach + width] = z
        for i in range(kernel.shape[1]):
            for j in range(kernel.shape[2]):
                score = score + weights[i, j] * wide[:, i : i + height, j : j + width]
    return x * sigmoid(score)[:, None]


def coord_att(exact: Exact, x: Tensor) -> Tensor:
    def conv(z: Tensor, name: str) -> Tensor:
        weight, bias = exact[f"{name}.weight"], exact[f"{name}.bias"]
        return torch.einsum("bcn,mc->bmn", z, weight[:, :, 0, 0]) + bias[:, None]

    height, width = x.shape[2:]
    of_rows = sum(x[:, :, :, j] for j in range(width)) / width
    of_columns = sum(x[:, :, i] for i in range(height)) / height
    hidden = conv(torch.cat([of_rows, of_columns], 2), "conv1")
    hidden = exact.hard_swish(exact.batch_norm(hidden, "bn1"))
    a_h = sigmoid(conv(hidden[:, :, :height], "conv_h"))
    a_w = sigmoid(conv(hidden[:, :, height:], "conv_w"))
    return torch.einsum("bcij,bci,bcj->bcij", x, a_h, a_w)


PLUGINS = {SE: se, ECA: eca, CBAM: cbam, CoordAtt: coord_att}
every_plugin = pytest.mark.parametrize("plugin", PLUGINS)

# --------------------------------------------------------------------------- comparison


def build(plugin: type, channels: int, training: bool, seed: int, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    layer = plugin(channels, **kwargs).train(training)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        elif hasattr(module, "weight"):
            # Scores of about 1, for different gates that do not saturate.
            module.weight.data.normal_(std=module.weight[0].numel() ** -0.5)
    return layer


def feature_map(batch: int, channels: int, size: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator) + 0.5


def compare(plugin, batch=2, channels=33, size=(5, 7), training=True, seed=0, **kwargs) -> float:
    layer = build(plugin, channels, training, seed, **kwargs)
    return formulas.compare(layer, PLUGINS[plugin], feature_map(batch, channels, size, seed))


side = st.one_of(st.sampled_from([1, 3, 5, 7, 9]), st.integers(1, 9))
# Statistics of few values divide by a variance that may be arbitrarily small.
cases = dict(
    batch=st.integers(1, 3),
    channels=st.integers(1, 65),
    size=st.tuples(side, side).filter(lambda size: sum(size) >= 8),
    training=st.booleans(),
    seed=st.integers(0, 2**20),
)
corners = [
    dict(batch=1, channels=1, size=(3, 5), training=True, seed=0),
    dict(batch=1, channels=65, size=(7, 1), training=False, seed=0),
]


@given(**cases)
@example(**corners[0])
@example(**corners[1])
def test_se_matches_the_formula(**case):
    compare(SE, **case)


@given(**cases)
@example(**corners[0])
@example(**corners[1])
def test_eca_matches_the_formula(**case):
    compare(ECA, **case)


@given(**cases)
@example(**corners[0])
@example(**corners[1])
def test_cbam_matches_the_formula(**case):
    compare(CBAM, **case)


@given(**cases)
@example(**corners[0])
@example(**corners[1])
def test_coord_att_matches_the_formula(**case):
    compare(CoordAtt, **case)


@every_plugin
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_float32_gradients_are_compared(plugin, training, batch):
    margin = compare(plugin, batch=batch, training=training, size=(9, 7), seed=1)
    assert margin > 1e-5, "choose another seed: a value lies on a corner"


@pytest.mark.parametrize(
    ("plugin", "kwargs"),
    [
        (SE, dict(reduction=3)),
        (SE, dict(hidden_channels=5)),
        (ECA, dict(kernel_size=1)),
        (ECA, dict(kernel_size=9)),
        (CBAM, dict(reduction=3)),
        (CBAM, dict(kernel_size=1)),
        (CBAM, dict(kernel_size=5)),
        (CoordAtt, dict(reduction=3)),
    ],
    ids=str,
)
def test_other_sizes_match_the_formula(plugin, kwargs):
    compare(plugin, **kwargs)


@every_plugin
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(plugin, training):
    layer = build(plugin, 4, training, seed=1)
    assert formulas.gradcheck(layer, feature_map(1, 4, (3, 5), 1))


def test_coord_att_gathers_its_statistics_from_rows_and_columns():
    layer = build(CoordAtt, 16, True, seed=0)
    x = feature_map(2, 16, (5, 3), 0)
    before = layer.bn1.running_mean.clone(), layer.bn1.running_var.clone()
    hidden = layer.conv1(torch.cat([x.mean(3), x.mean(2)], 2).unsqueeze(3))
    values = hidden.transpose(0, 1).flatten(1)
    layer(x)
    torch.testing.assert_close(layer.bn1.running_mean, 0.9 * before[0] + 0.1 * values.mean(1))
    torch.testing.assert_close(layer.bn1.running_var, 0.9 * before[1] + 0.1 * values.var(1))


# --------------------------------------------------------------------------- widths and names


def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


@pytest.mark.parametrize(
    ("channels", "kwargs", "hidden"),
    [
        (64, {}, 4),
        (47, {}, 2),
        (15, {}, 1),
        (64, dict(reduction=4), 16),
        (64, dict(hidden_channels=16), 16),
        (8, dict(hidden_channels=16), 16),
    ],
)
def test_se_has_two_matrices(channels, kwargs, hidden):
    layer = SE(channels, **kwargs)
    assert layer.hidden_channels == hidden
    assert shapes(layer) == {"fc.0.weight": (hidden, channels), "fc.2.weight": (channels, hidden)}


@pytest.mark.parametrize("reduction", [4, 16])
def test_se_has_one_hidden_width(reduction):
    with pytest.raises(ValueError, match=f"reduction={reduction} and hidden_channels=8 both set"):
        SE(64, reduction=reduction, hidden_channels=8)


@pytest.mark.parametrize(("channels", "hidden"), [(64, 4), (47, 2), (15, 1)])
def test_cbam_has_a_shared_mlp_and_a_7x7_convolution(channels, hidden):
    assert shapes(CBAM(channels)) == {
        "channel.mlp.0.weight": (hidden, channels, 1, 1),
        "channel.mlp.2.weight": (channels, hidden, 1, 1),
        "spatial.weight": (1, 2, 7, 7),
    }


@pytest.mark.parametrize(("channels", "hidden"), [(512, 16), (300, 9), (64, 8), (3, 8)])
def test_coord_att_has_three_convolutions_and_a_norm(channels, hidden):
    assert shapes(CoordAtt(channels)) == {
        "conv1.weight": (hidden, channels, 1, 1),
        "conv1.bias": (hidden,),
        "bn1.weight": (hidden,),
        "bn1.bias": (hidden,),
        "conv_h.weight": (channels, hidden, 1, 1),
        "conv_h.bias": (channels,),
        "conv_w.weight": (channels, hidden, 1, 1),
        "conv_w.bias": (channels,),
    }


def test_kernel_of_eca_follows_the_number_of_channels():
    for channels in range(1, 4097):
        # (log2(C) + 1) / 2, rounded down in integer arithmetic, then up to the next odd number.
        half = channels.bit_length() // 2
        expected = half if half % 2 else half + 1
        layer = ECA(channels)
        assert layer.kernel_size == expected, channels
        assert shapes(layer) == {"conv.weight": (1, 1, expected)}
    # Channels of the paper's ResNets.
    stages = {64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {channels: ECA(channels).kernel_size for channels in stages} == stages


def test_convolutions_use_the_plugins():
    assert type(CAMConv(16, 8, 3).attention) is ChannelAttention
    assert type(CBAM(16).channel) is ChannelAttention
    assert type(CBAMConv(16, 8, 3).attention) is CBAM
    assert type(CAConv(16, 8, 3).attention) is CoordAtt
    assert isinstance(RFCAConv(16, 8, 3).coordinate, CoordAtt)
    assert isinstance(RFCBAMConv(16, 8, 3).se, SE)


@pytest.mark.parametrize(
    ("conv", "plugin"), [(CAMConv, ChannelAttention), (CBAMConv, CBAM), (CAConv, CoordAtt)]
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_attended_convolution_equals_plugin_and_convolution(conv, plugin, kernel):
    attended = conv(16, 8, kernel).eval()
    alone = plugin(16).eval()
    alone.load_state_dict(attended.attention.state_dict())
    x = feature_map(2, 16, (5, 7), 0)
    assert torch.equal(attended(x), attended.conv(alone(x)))


# --------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("plugin", "kwargs", "error", "message"),
    [
        (SE, dict(reduction=0), ValueError, "^reduction=0: must be at least 1"),
        (SE, dict(reduction=2.0), TypeError, r"^reduction=2\.0: must be an int, not float"),
        (SE, dict(hidden_channels=0), ValueError, "^hidden_channels=0: must be at least 1"),
        (SE, dict(hidden_channels="8"), TypeError, "^hidden_channels='8': must be an int"),
        (SE, dict(reduction=4, hidden_channels=8), ValueError,
         "^reduction=4 and hidden_channels=8 both"),
        (ECA, dict(kernel_size=0), ValueError, "^kernel_size=0: must be at least 1"),
        (ECA, dict(kernel_size=4), ValueError, "^kernel_size=4: must be odd"),
        (ECA, dict(kernel_size=3.0), TypeError, r"^kernel_size=3\.0: must be an int, not float"),
        (CBAM, dict(reduction=-1), ValueError, "^reduction=-1: must be at least 1"),
        (CBAM, dict(kernel_size=6), ValueError, "^kernel_size=6: must be odd"),
        (CBAM, dict(kernel_size=0), ValueError, "^kernel_size=0: must be at least 1"),
        (CBAM, dict(kernel_size=(7, 7)), TypeError, r"^kernel_size=\(7, 7\): must be an int"),
        (CoordAtt, dict(reduction=0), ValueError, "^reduction=0: must be at least 1"),
        (CoordAtt, dict(reduction=True), TypeError, "^reduction=True: must be an int, not bool"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_arguments_give_clear_errors(plugin, kwargs, error, message):
    with pytest.raises(error, match=message):
        plugin(32, **kwargs)


@every_plugin
@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
def test_autocast_leaves_the_gates_in_float32(plugin, dtype):
    layer, x = build(plugin, 32, False, seed=0), feature_map(2, 32, (5, 7), 0)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(layer(x), expected)


@every_plugin
def test_empty_batch(plugin):
    layer = build(plugin, 8, False, seed=0)
    x = torch.empty(0, 8, 5, 4, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    assert torch.autograd.grad(out, x, torch.empty_like(out))[0].shape == x.shape


@every_plugin
def test_input_is_unchanged_and_may_be_a_view(plugin):
    layer = build(plugin, 8, False, seed=0)
    base = torch.randn(2, 9, 17, 3)
    view = base.permute(0, 2, 3, 1)[:, 1::2]  # not contiguous
    kept = view.clone()
    torch.testing.assert_close(layer(view), layer(kept))
    assert torch.equal(view, kept)
