"""Every layer through torch.compile, torch.export and ONNX."""

import copy
import io

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from rfa_mmdet.ops.common.torch_versions import TRACES_TO_ONNX
from tests.helpers.registered import (
    CHANNELS,
    CONVS,
    PLUGINS,
    build,
    conv,
    feature_map,
)
from tests.helpers.torch_features import exports


@pytest.fixture(params=CONVS + PLUGINS)
def name(request) -> str:
    return request.param


def multiplied(name: str) -> nn.Module:
    """Return a plug-in that started as the identity but has other weights now."""
    kwargs = dict(scale_by_patches=True) if name == "ConAM" else {}
    layer = build(name, start="identity", **kwargs)
    layer.load_state_dict(dict(build(name, **kwargs).state_dict()))
    assert layer.output_scale != 1
    return layer.eval()


@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(name, training):
    layer, x = build(name).train(training), feature_map().requires_grad_()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    y, z = layer(x), compiled(x)
    torch.testing.assert_close(z, y)
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    found = torch.autograd.grad(z, [x, *compiled.parameters()], upstream)
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("layer_name", PLUGINS)
def test_compiles_with_output_scale(layer_name):
    layer, x = multiplied(layer_name), feature_map()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


# Sizes of the exported map, and of those that the export is tested with.
SMALLEST, SIZES = 5, [(9, 7), (12, 11), (5, 16), (24, 24)]


def other_maps(batches: tuple[int, ...] = (1, 3, 2, 1)) -> list[Tensor]:
    return [torch.randn(b, CHANNELS, *size) for b, size in zip(batches, SIZES, strict=True)]


def assert_exports(layer: nn.Module) -> None:
    largest = 4096
    height = torch.export.Dim("height", min=SMALLEST, max=largest)
    width = torch.export.Dim("width", min=SMALLEST, max=largest)
    program = torch.export.export(layer, (feature_map(),), dynamic_shapes=({2: height, 3: width},))
    exported = program.module()
    for x in other_maps(batches=(2, 2, 2, 2)):
        torch.testing.assert_close(exported(x), layer(x))


def assert_exports_to_onnx(layer: nn.Module) -> None:
    """Use the TorchScript exporter, as MMDeploy does; the other one needs onnxscript."""
    axes = {0: "batch", 2: "height", 3: "width"}
    file = io.BytesIO()
    torch.onnx.export(
        layer,
        (feature_map(),),
        file,
        **TRACES_TO_ONNX,
        opset_version=17,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": axes, "y": axes},
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for x in other_maps():
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        # float32, with sums in another order
        torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)


# Different sides, so they cannot be mixed up.
UNEVEN = dict(stride=(1, 2), padding=(3, 2), dilation=(1, 2), groups=4)


@exports
@torch.no_grad()
def test_torch_export_with_dynamic_sizes(name):
    assert_exports(build(name).eval())


@exports
@torch.no_grad()
@pytest.mark.parametrize("layer_name", PLUGINS)
def test_torch_export_with_output_scale(layer_name):
    assert_exports(multiplied(layer_name))


@exports
@torch.no_grad()
@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_torch_export_of_a_conv_with_other_arguments(layer_name, mode):
    assert_exports(conv(layer_name, CHANNELS, 16, (4, 3), padding_mode=mode, **UNEVEN).eval())


OF_THE_TRACER = "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"


@torch.no_grad()
@pytest.mark.filterwarnings(*OF_THE_TRACER)
def test_onnx_with_dynamic_sizes(name):
    assert_exports_to_onnx(build(name).eval())


@torch.no_grad()
@pytest.mark.filterwarnings(*OF_THE_TRACER)
@pytest.mark.parametrize("layer_name", PLUGINS)
def test_onnx_with_output_scale(layer_name):
    assert_exports_to_onnx(multiplied(layer_name))


@torch.no_grad()
@pytest.mark.filterwarnings(*OF_THE_TRACER)
@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_onnx_of_a_conv_with_other_arguments(layer_name, mode):
    layer = conv(layer_name, CHANNELS, 16, (4, 3), padding_mode=mode, **UNEVEN)
    assert_exports_to_onnx(layer.eval())
