"""With norms and activations that the operators do not support, only the input is saved."""

import copy

import pytest
import torch
from torch import nn

from rfa_mmdet.layers import RFAConv, RFCAConv, RFCBAMConv
from tests.helpers.backends import run
from tests.helpers.formulas import Case

LAYERS = (RFAConv, RFCBAMConv, RFCAConv)
FEATURES = [
    dict(norm_cfg=dict(type="GN", num_groups=4)),
    dict(norm_cfg=dict(type="IN")),
    dict(norm_cfg=dict(type="GN", num_groups=4), act_cfg=dict(type="SiLU")),
    dict(act_cfg=dict(type="GELU")),
]


def pair(kind: type[nn.Module], **kwargs) -> tuple[nn.Module, nn.Module]:
    """Return a layer, and the same layer with the plain formula."""
    layer = Case(channels=8, out_channels=6).build(kind, **kwargs)
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    return layer, reference


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_results_and_statistics_match_the_formula(kind, features, training):
    layer, reference = pair(kind, **features)
    x = torch.randn(2, 8, 9, 7)
    layer.train(training)
    reference.train(training)
    for found, expected in zip(run(layer, x), run(reference, x), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(layer.buffers(), reference.buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_saved_tensors(kind, features):
    layer, reference = pair(kind, **features)
    x = torch.randn(2, 8, 33, 31, requires_grad=True)
    assert saved_bytes(layer, x) <= x.nbytes
    assert saved_bytes(reference, x) > 9 * x.nbytes


def test_backward_recomputes_the_same_state():
    layer, reference = pair(RFAConv, act_cfg=dict(type="SiLU"))
    x, gradients = torch.randn(2, 8, 9, 7), []
    for module in (layer, reference):
        named = {name: p.detach() * 1.5 for name, p in module.named_parameters()}
        learnt = [p.requires_grad_() for p in named.values()]
        y = torch.func.functional_call(module, named, (x,))
        module.eval()
        gradients.append(torch.autograd.grad(y.square().sum(), learnt))
        assert not module.training
        assert not module.norm.training
        assert dict(module.named_parameters()).keys() == named.keys()
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_hooks_are_called_once():
    layer, _ = pair(RFAConv, act_cfg=dict(type="SiLU"))
    calls = []
    layer.norm.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 8, 9, 7)).sum().backward()
    assert len(calls) == 1
