"""RFAConv with its kernels, together with tools of torch and OpenMMLab."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn
from torch.utils.checkpoint import checkpoint

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.ops.common.torch_versions import TRACES_TO_ONNX
from rfa_mmdet.ops.receptive_field.backends import missing
from tests.helpers.backends import build, require, run
from tests.helpers.formulas import Case, relative_error
from tests.helpers.tolerances import TOLERANCES

CASE = Case(batch=2, channels=6, out_channels=5, size=(9, 11))


@pytest.fixture(autouse=True, scope="module")
def cpu_backend():
    require("cpu")


def pair(case=CASE, **kwargs):
    """Return the same layer with the CPU kernels and with the reference."""
    layer = build(case, backend="cpu", **kwargs)
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    return layer, reference


@pytest.fixture
def calls(monkeypatch):
    """Return a counter of the operator's calls."""
    from rfa_mmdet.ops.receptive_field import functional

    counts = []

    class Counted:
        def __getattr__(self, name):
            if name == "rfa_conv":
                counts.append(1)
            return getattr(torch.ops.rfa_mmdet, name)

    monkeypatch.setattr(functional, "_ops", Counted())
    return counts


# --------------------------------------------------------------------------- norm


@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0, 0.0, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_match_torch(momentum, tracked, affine, calls):
    cfg = dict(type="BN", momentum=momentum, track_running_stats=tracked, affine=affine)
    layer, reference = pair(norm_cfg=cfg)
    for step in range(3):
        x = torch.randn(2, 6, 9, 11) * (step + 1) + step
        for module in (layer, reference):
            module.train(step != 1)  # without tracking, batch statistics are also used in eval mode
        torch.testing.assert_close(layer(x), reference(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.state_dict(), reference.state_dict())
    assert len(calls) == 3


@pytest.mark.parametrize("layer_training", [True, False])
@pytest.mark.parametrize("norm_training", [True, False])
def test_norms_own_mode_counts(layer_training, norm_training):
    layer, reference = pair()
    for module in (layer, reference):
        module.train(layer_training)
        module.norm.train(norm_training)
    before, x = layer.norm.running_mean.clone(), CASE.input()
    for found, expected in zip(run(layer, x), run(reference, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(before, layer.norm.running_mean) != norm_training


def test_torch_handles_single_values_and_empty_batches():
    layer = RFAConv(2, 3, 3, padding=0, backend="cpu")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 2, 3, 3))
    assert layer.eval()(torch.randn(1, 2, 3, 3)).shape == (1, 3, 1, 1)
    assert layer(torch.randn(0, 2, 5, 5)).shape == (0, 3, 3, 3)


@pytest.mark.parametrize(
    "cfg",
    [
        dict(norm_cfg=dict(type="GN", num_groups=2)),
        dict(norm_cfg=dict(type="IN", affine=True)),
        dict(act_cfg=dict(type="SiLU")),
        dict(act_cfg=dict(type="LeakyReLU")),
    ],
    ids=str,
)
def test_other_norms_and_activations_use_the_reference(cfg, calls):
    assert RFAConv(4, 4, 3, **cfg)(torch.randn(2, 4, 5, 5)).shape == (2, 4, 5, 5)
    assert not calls
    with pytest.raises(ValueError, match=r"backend='cpu': does not support .*only batch norm"):
        RFAConv(4, 4, 3, backend="cpu", **cfg)


def test_hooks_are_called(calls):
    layer, seen = RFAConv(4, 4, 3), []
    layer(torch.randn(2, 4, 5, 5))
    assert len(calls) == 1
    layer.norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    layer(torch.randn(2, 4, 5, 5))
    assert (len(calls), seen) == (1, [(2, 36, 5, 5)])
    layer.backend = "cpu"
    with pytest.raises(ValueError, match="without hooks"):
        layer(torch.randn(2, 4, 5, 5))


# --------------------------------------------------------------------------- types, devices


def test_choices_are_checked_when_the_layer_is_built():
    with pytest.raises(ValueError, match="backend='fast': must be one of"):
        RFAConv(4, 4, 3, backend="fast")
    if missing("triton"):
        with pytest.raises(RuntimeError, match="backend='triton': "):
            RFAConv(4, 4, 3, backend="triton")
    with pytest.raises(TypeError, match=r"backend='cpu': .*not torch.float16"):
        RFAConv(4, 4, 3, backend="cpu").half()(torch.randn(2, 4, 5, 5).half())


@pytest.mark.parametrize("training", [True, False])
def test_autocast_uses_bfloat16_like_a_convolution(training, calls):
    layer, reference = pair(dataclasses.replace(CASE, training=training, act=None))
    x = CASE.input()
    exact = run(reference, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(layer, x)
        plain = nn.Conv2d(6, 5, 3)(x)
    assert found[0].dtype == plain.dtype == torch.bfloat16
    assert len(calls) == 1
    for f, e in zip(found, exact, strict=True):
        # Twice, because input, weight and upstream gradient are rounded, and the result.
        assert relative_error(f, e) < 2 * TOLERANCES[torch.bfloat16].output
    assert all(g.dtype == torch.float32 for g in found[1:])


def test_backward_under_autocast_is_the_same():
    layer, _ = pair()
    x = CASE.input().requires_grad_()
    y = layer(x)
    upstream = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(found, expected)


def test_float64_uses_the_reference_by_default(calls):
    layer, x = RFAConv(4, 4, 3).double(), torch.randn(2, 4, 5, 5).double()
    expected = layer(x)
    assert not calls
    layer.backend = "cpu"
    torch.testing.assert_close(layer(x), expected)
    assert len(calls) == 1


# --------------------------------------------------------------------------- tools


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    layer, _ = pair()
    x = CASE.input()
    expected = run(copy.deepcopy(layer), x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=use_reentrant)

    # The reentrant variant does not support autograd.grad.
    module, given = Checkpointed(), x.clone().requires_grad_()
    y = module(given)
    generator = torch.Generator().manual_seed(0)
    y.backward(torch.randn(y.shape, generator=generator))
    found = [y.detach(), given.grad, *(p.grad for p in module.parameters())]
    assert all(map(torch.equal, found, expected))


def test_traces_exports_and_counts_only_have_plain_operators():
    layer, x = RFAConv(4, 6, 3, backend="cpu").eval(), torch.randn(1, 4, 7, 6)
    expected = layer(x)
    traced = torch.jit.trace(layer, x)
    assert "rfa_mmdet::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    assert FlopAnalyzer(layer, (x,)).unsupported_ops_warnings(False).total() > 42 * 6 * 36
    exported = torch.export.export(layer, (x,))
    assert "rfa_mmdet" not in str(exported.graph)
    file = io.BytesIO()
    torch.onnx.export(layer, (x,), file, **TRACES_TO_ONNX)
    assert b"rfa_mmdet" not in file.getvalue()


def test_torch_func_transforms_use_the_reference(calls):
    layer, x = RFAConv(4, 6, 3).eval(), torch.randn(3, 4, 7, 6)
    reference = copy.deepcopy(layer)
    reference.backend = "reference"
    expected = torch.autograd.functional.jvp(reference, x, torch.ones_like(x))[1]
    state = dict(layer.named_parameters())
    gradient = torch.func.grad(
        lambda s, x: torch.func.functional_call(layer, s, (x,)).square().sum()
    )(state, x)
    assert gradient["conv.weight"].any()
    each = torch.func.vmap(lambda x: layer(x[None])[0])(x)
    torch.testing.assert_close(each, layer(x), rtol=1e-4, atol=1e-5)
    found = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1  # the plain call above


def test_copies_and_pickles():
    layer, x = RFAConv(4, 6, 3, backend="cpu").eval(), torch.randn(1, 4, 7, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.backend == "cpu"
        assert torch.equal(twin(x), layer(x))
    assert set(layer.state_dict()) == set(RFAConv(4, 6, 3).state_dict())
