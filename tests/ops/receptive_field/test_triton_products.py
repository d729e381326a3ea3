"""The weight's gradient is summed over chunks accurately, in little memory."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton import chunks as chunks_module
from rfa_mmdet.ops.receptive_field.triton.chunks import Products, chunks, maps_of


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 4, 24])
@pytest.mark.parametrize("much", [False, True])
def test_gradient_of_the_weight(count, dtype, channels_last, much, monkeypatch):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    torch.manual_seed(0)
    x = torch.empty(1, 8, count, 32, dtype=dtype).contiguous(memory_format=layout)
    maps = maps_of(x, Window((1, 3), padding=(0, 1)))
    weight = torch.empty(5, 8, 1, 3, dtype=dtype)
    monkeypatch.setattr(chunks_module, "PARTS_BYTES", 0 if much else 2**22)
    product, exact = Products(maps, weight), torch.zeros(weight.shape, dtype=torch.float64)
    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 1)
    all_chunks = [*chunks(maps)]
    assert len(all_chunks) == count
    for number, chunk in enumerate(all_chunks):
        units = torch.randn(24, chunk.pitch).to(dtype)
        grad = torch.randn(5, 32).to(dtype)
        part = grad.double() @ units[:, :32].double().T  # (O, C * K), or K * C
        if channels_last:
            exact += part.view(5, 1, 3, 8).permute(0, 3, 1, 2)
            units, grad = units.T.contiguous(), grad.T.contiguous()
        else:
            exact += part.view(weight.shape)
        product.add_weight_gradient(grad, units, chunk, number, count)
    sums = -(-count // chunks_module.ROUNDED)
    allowed = 4 * weight.numel() if much else sums * weight.nbytes
    assert product.grad_weight.nbytes <= max(weight.nbytes, allowed)
    found = product.weight_gradient(dtype)
    assert found.dtype == dtype
    error = (found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # Rounding to nearest has an RMS error of 0.29 ULP; an ULP is between half an eps and an eps.
    # Sums of a few parts, and the sum of these, double that.
    eps = torch.finfo(dtype).eps
    assert error <= (0.5 * eps if dtype == torch.bfloat16 else 4 * eps)
