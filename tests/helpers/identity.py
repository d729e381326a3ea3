"""Plug-ins that start as the identity, for thin nets, and the comparison of two nets."""

import copy

import torch
from torch import Tensor, nn

from tests.helpers.zoo import flat

# For few channels and maps of 2 x 2, with ReLUs wide enough not to be dead.
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
    """Return outputs and gradients of inputs and parameters by name, for a random gradient."""
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
    """Return the largest difference of an output or gradient, relative to its largest value."""
    assert expected.keys() <= found.keys()
    names = [name for name in expected if name.startswith("output") == outputs]
    assert any(expected[name].any() for name in names)
    return max(
        float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp_min(1e-30))
        for n in names
    )
