"""Bytes saved for the backward pass, counted with saved-tensor hooks, compared with the formulas.

The formulas are those of the benchmark, whose parity test compares them with the layers.
"""

import pytest
import torch

from benchmarks.baselines import Formula
from benchmarks.candidates import build, is_plugin
from benchmarks.measure import saved_bytes
from benchmarks.parity import make_input
from benchmarks.sizes import InputSize
from rfa_mmdet.layers import CoordAtt, RFCAConv, RFCBAMConv
from tests.helpers.backends import require

SHAPES = [
    InputSize(2, 64, 32, 40),
    InputSize(1, 128, 25, 21, 2),
    InputSize(4, 64, 7, 7),
    InputSize(1, 512, 13, 9),
    InputSize(1, 64, 96, 100),
]


def kept(module: torch.nn.Module, shape: InputSize) -> int:
    x = make_input(shape, torch.float32, torch.device("cpu")).requires_grad_()
    return saved_bytes(lambda: module(x), module)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", ["RFCBAMConv", "RFCAConv", "CBAM", "CoordAtt", "EMA"])
def test_saves_at_most_half_of_the_formula(op, shape, training):
    layer = build(op, shape).train(training)
    if hasattr(layer, "backend"):
        layer.backend = "reference"  # as where modules are called
    formula = Formula(op, layer).train(training)
    ours, theirs = kept(layer, shape), kept(formula, shape)
    assert ours <= 0.5 * theirs
    x = 4 * shape.batch * shape.channels * shape.height * shape.width
    assert ours >= x  # not hidden from the hooks: without the input there is no gradient
    if op in ("RFCBAMConv", "RFCAConv") and not training:
        assert ours <= 0.3 * theirs  # without the norm's input
    if is_plugin(op):
        assert ours < 1.3 * x  # row and column means on the smallest maps, 2 / 7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", ["RFCBAMConv", "RFCAConv"])
def test_kernels_save_an_eighth_of_the_formula(op, shape, training):
    require("cpu")
    layer = build(op, shape).train(training)
    ours, theirs = kept(layer, shape), kept(Formula(op, layer).train(training), shape)
    assert 4 * shape.batch * shape.channels * shape.height * shape.width <= ours <= theirs / 8


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conam_saves_the_same_as_its_formula(shape):
    # That is the input once, and little else: half of it would not suffice for a gradient.
    layer = build("ConAM", shape)
    x = 4 * shape.batch * shape.channels * shape.height * shape.width
    # In addition: the share of the map of each patch, a few numbers.
    assert x <= kept(layer, shape) <= 1.001 * kept(Formula("ConAM", layer), shape)


@pytest.mark.parametrize("kind", [CoordAtt, RFCAConv, RFCBAMConv])
@pytest.mark.parametrize("made", [True, False])
def test_statistics_are_counted_once(kind, made):
    layer = kind(8) if kind is CoordAtt else kind(8, 4, 3)
    if made:  # as where modules are called
        layer.backend = "reference"
    norms = [m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for step in (1, 2, 3):
        out = layer(torch.randn(2, 8, 6, 5, requires_grad=True))
        before = [norm.running_mean.clone() for norm in norms]
        out.sum().backward()
        for norm, mean in zip(norms, before, strict=True):
            assert int(norm.num_batches_tracked) == step
            assert torch.equal(norm.running_mean, mean)


@pytest.mark.parametrize("op", ["RFCBAMConv", "RFCAConv", "CBAM", "CoordAtt", "EMA", "ConAM"])
@pytest.mark.parametrize("recorded", [False, True])
def test_recorded_graph_gives_the_same_outputs(op, recorded, monkeypatch):
    shape = InputSize(2, 64, 9, 7)
    layer = build(op, shape).eval().double()
    x = make_input(shape, torch.float64, torch.device("cpu")).requires_grad_()
    inputs = [x, *layer.parameters()]
    upstream = torch.randn_like(layer(x))
    expected = torch.autograd.grad(layer(x), inputs, upstream)
    if recorded:
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    else:  # frozen parameters get no gradient, and the others the same
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        inputs, expected = inputs[:1], expected[:1]
    for found, value in zip(torch.autograd.grad(layer(x), inputs, upstream), expected, strict=True):
        torch.testing.assert_close(found, value)
