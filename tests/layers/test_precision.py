"""Every layer with autocast, converted to another dtype, and with synchronised norms."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.registered import (
    CHANNELS,
    CONVS,
    PLUGINS,
    build,
    feature_map,
)
from tests.helpers.tolerances import TOLERANCES
from tests.helpers.torch_features import AUTOCAST_TYPES, CONV_TYPES


@pytest.fixture(params=CONVS + PLUGINS)
def name(request) -> str:
    return request.param


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# Gates that depend on convolved features, which autocast rounds: for features of 1e4, the rounding
# error is many units of the score, which changes the sigmoid completely. Observed: 7.4 eps.
FACTOR_OF_LARGE_INPUTS = {"EMA": 16, "RFCAConv": 16, "RFCBAMConv": 16}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
@pytest.mark.parametrize("magnitude", [1, 1e4])
def test_autocast_is_close_to_float32(name, dtype, magnitude, training):
    layer = build(name).train(training)
    # Values representable in the dtype, so only the layer's own rounding is measured.
    x = (2 * torch.rand(2, CHANNELS, 9, 7) - 1).mul(magnitude).to(dtype).float().requires_grad_()
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    # Rounding errors of weights, features and result, at most half an eps each, add up as squares.
    factor = FACTOR_OF_LARGE_INPUTS.get(name, 1) if magnitude > 1 else 1
    assert relative_error(out, expected) < factor * TOLERANCES[dtype].output
    if magnitude > 1:  # gradients beyond float16 are left to a loss scaler
        return
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], upstream)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [*CONV_TYPES, torch.float64])
def test_converted_layer_runs_in_its_dtype(name, dtype):
    layer = build(name).eval()
    x = feature_map().to(dtype)
    expected = layer(x.float())
    layer = layer.to(dtype)
    # Half an eps each of weights, features and result; against float64, the error of float32.
    tolerance = max(TOLERANCES[dtype].output, 1e-6)
    out = layer(x)
    assert out.dtype == dtype
    assert relative_error(out, expected) < tolerance
    x.requires_grad_()
    out = layer.train()(x)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], torch.randn_like(out))
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)


WITH_BN = [n for n in CONVS + PLUGINS if any(type(m) is nn.BatchNorm2d for m in build(n).modules())]


@pytest.mark.parametrize("name", WITH_BN)
def test_conversion_to_sync_bn(name):
    layer, x = build(name), feature_map()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert not any(type(m) is nn.BatchNorm2d for m in synced.modules())
    assert list(synced.state_dict()) == list(layer.state_dict())
    # Without a process group, the statistics are those of this process.
    torch.testing.assert_close(synced(x), layer(x))
    torch.testing.assert_close(synced.eval()(x), layer.eval()(x))
