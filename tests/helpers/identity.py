"""Plug-ins from the identity, for thin nets; and how far one net is from another."""

import copy

import torch
from torch import Tensor, nn

from tests.helpers.zoo import flat

# On a few channels, and on maps of 2 x 2; no ReLU so narrow that it could be dead.
IDENTITIES = {
    "EMA": dict(type="EMA", factor=4, start="identity"),
    "ConAM": dict(
        type="ConAM", patch_size=1, hidden_channels=16, scale_by_patches=True, start="identity"
    ),
    "CBAM": dict(type="CBAM", reduction=1, start="identity"),
    "CoordAtt": dict(type="CoordAtt", start="identity"),
    "SE": dict(type="SE", hidden_channels=16, start="identity"),
    "ECA": dict(type="ECA", start="identity"),
}


def run(net: nn.Module, inputs: tuple) -> dict[str, Tensor]:
    """Outputs, and gradients of inputs and parameters for one random upstream gradient, by name."""
    inputs = copy.deepcopy(inputs)
    net.zero_grad()
    outputs = flat(net(*inputs))
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, upstream)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"input {i}": x.grad for i, x in enumerate(flat(inputs))}
    return found | {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor], outputs: bool) -> float:
    """Largest difference of an output, or of a gradient, over the largest of its values."""
    assert expected.keys() <= found.keys()
    names = [name for name in expected if name.startswith("output") == outputs]
    assert any(expected[name].any() for name in names)
    return max(
        float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-30))
        for n in names
    )
