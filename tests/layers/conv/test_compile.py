"""torch.compile turns receptive-field convolutions into one graph with the operators in it."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from rfa_mmdet import layers
from rfa_mmdet.layers import untouched
from rfa_mmdet.ops.receptive_field import backends
from tests.helpers.backends import require, run
from tests.helpers.formulas import Case
from tests.helpers.torch_features import compiles_operators

CASE = Case(batch=2, channels=6, out_channels=5, size=(9, 11))
OPERATORS = {
    "RFAConv": {"rfa_conv"},
    "RFCBAMConv": {"pool_channels", "gated_conv"},
    "RFCAConv": {"pool_coordinates", "gated_conv"},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    require("cpu")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiles_operators
# Every pair of name, training and dynamic; compiling takes seconds.
@pytest.mark.parametrize(
    ("name", "training", "dynamic"),
    [(name, training, training) for name in ("RFAConv", "RFCAConv") for training in (True, False)]
    + [("RFCBAMConv", training, not training) for training in (True, False)],
)
def test_compiles_as_one_graph_with_the_kernels(name, training, dynamic):
    layer = dataclasses.replace(CASE, training=training).build(getattr(layers, name), backend="cpu")
    eager, called = copy.deepcopy(layer), set()

    def backend(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in ((9, 11), (12, 7)):
        x = torch.randn(2, 6, *size)
        for found, expected in zip(run(compiled, x), run(eager, x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    expected = OPERATORS[name] | ({"fold_batch_norm"} if training else set())
    assert called >= {f"rfa_mmdet.{operator}" for operator in expected}


@compiles_operators
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "training"), [("RFAConv", True), ("RFCBAMConv", False), ("RFCAConv", True)]
)
def test_inductor_accepts_channels_last(name, training):
    """Its code asserts the strides that fake tensors promise."""
    layer = dataclasses.replace(CASE, training=training).build(getattr(layers, name), backend="cpu")
    layer.to(memory_format=torch.channels_last)
    eager = copy.deepcopy(layer)
    x = torch.randn(2, 6, 9, 11).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(layer, fullgraph=True)
    for found, expected in zip(run(compiled, x), run(eager, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_plain_torch_is_compiled_with_one_notice_without_kernels(name, monkeypatch):
    monkeypatch.setattr(backends, "COMPILES_OPERATORS", False)
    monkeypatch.setattr(untouched, "COMPILES_OPERATORS", False)
    backends._warn_once.cache_clear()
    layer = CASE.build(getattr(layers, name))
    eager, x = copy.deepcopy(layer), torch.randn(2, 6, 9, 11)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="in plain torch.*requires torch 2.4"):
        found = run(compiled, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(compiled, x)
    for result, expected in zip(found, run(eager, x), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    backends._warn_once.cache_clear()
