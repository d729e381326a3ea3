"""What mmcv and MMDetection expect of every layer that this package registers.

The layers are found in MMEngine's registry: one added later is swept as well.
"""

import copy
import inspect
import io
import pickle

import onnxruntime
import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer, build_plugin_layer, fuse_conv_bn
from mmdet.models.backbones.resnet import Bottleneck, ResNet
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

import rfa_mmdet.layers
from tests.helpers.tolerances import TOLERANCES

CHANNELS = 32
# For arguments without a default, by their name.
REQUIRED = {"patch_size": 3, "hidden_channels": 8}


def registered(package: str) -> list[str]:
    """Names under which the modules of a package of layers have registered themselves."""
    prefix = f"{rfa_mmdet.layers.__name__}.{package}."
    return sorted(n for n, c in MODELS.module_dict.items() if c.__module__.startswith(prefix))


CONVS, PLUGINS = registered("conv"), registered("attention")


def accepts(name: str, argument: str) -> bool:
    return argument in inspect.signature(MODELS.get(name)).parameters


def required(name: str) -> dict:
    parameters = inspect.signature(MODELS.get(name)).parameters
    return {k: v for k, v in REQUIRED.items() if k in parameters}


def conv(name: str, *args, seed: int = 0, **kwargs) -> nn.Module:
    """A convolution built as mmcv does, with norms that are not at their defaults."""
    torch.manual_seed(seed)
    layer = build_conv_layer(dict(type=name), *args, **kwargs)
    return disturb(layer)


def plugin(name: str, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    cfg = dict(type=name, **required(name), **kwargs)
    return disturb(build_plugin_layer(cfg, in_channels=CHANNELS)[1])


def disturb(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return layer


def build(name: str, **kwargs) -> nn.Module:
    if name in CONVS:
        return conv(name, CHANNELS, 16, 3, stride=2, padding=1, **kwargs)
    return plugin(name, **kwargs)


def feature_map(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, CHANNELS, 9, 7, generator=generator)


def changes(a: nn.Module, b: nn.Module, x: Tensor | None = None) -> bool:
    """Whether two layers with the same weights, where both have them, compute other things."""
    x = feature_map() if x is None else x
    same = {k: v for k, v in a.state_dict().items() if v.shape == b.state_dict().get(k, x).shape}
    b.load_state_dict(same, strict=False)
    ya, yb = a.eval()(x), b.eval()(x)
    return ya.shape != yb.shape or not torch.allclose(ya, yb, rtol=1e-3, atol=1e-4)


def test_the_papers_names_are_registered_in_the_root():
    convs = {"RFAConv", "RFCBAMConv", "RFCAConv", "CAMConv", "CBAMConv", "CAConv"}
    assert set(CONVS) >= convs
    assert set(PLUGINS) >= {"EMA", "ConAM", "CBAM", "CoordAtt", "SE", "ECA"}
    assert MODELS.name == "model"
    assert MODELS.parent is None


# --------------------------------------------------------------------------- every layer


@pytest.fixture(params=CONVS + PLUGINS)
def name(request) -> str:
    return request.param


def test_shape(name):
    expected = (2, 16, 5, 4) if name in CONVS else (2, CHANNELS, 9, 7)
    assert build(name)(feature_map()).shape == expected


def test_state_dict_round_trip(name):
    a, b = build(name, seed=0).eval(), build(name, seed=1).eval()
    x = feature_map()
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict(), strict=True)
    assert torch.equal(a(x), b(x))


def test_mmcvs_fusion_of_batch_norm_changes_nothing(name):
    layer = build(name).eval()
    fused = fuse_conv_bn(copy.deepcopy(layer))
    torch.testing.assert_close(fused(feature_map()), layer(feature_map()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deep", "pkl"]
)
def test_copies_compute_the_same_and_share_nothing(name, copied, training):
    layer, x = build(name).train(training), feature_map()
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    before = layer.eval()(x)
    for p in twin.parameters():
        p.data.add_(1)
    assert torch.equal(layer(x), before)


def test_repr_shows_the_arguments(name):
    text = repr(build(name))
    assert text.startswith(MODELS.get(name).__name__ + "(")
    if name in CONVS:
        wide = conv(name, 8, 12, 3, stride=2, padding=4, dilation=3, groups=4)
        for part in (
            "8, 12, kernel_size=(3, 3)",
            "stride=(2, 2)",
            "padding=(4, 4)",
            "dilation=(3, 3)",
            "groups=4",
        ):
            assert part in repr(wide).split("\n")[1], part
        circular = conv(name, 8, 12, 3, padding_mode="circular")
        assert "padding_mode='circular'" in repr(circular)
    else:
        for argument, value in required(name).items():
            assert f"{argument}={value}" in text or f"={value}" in text


def test_channels_last_gives_the_same(name):
    layer, x = build(name), feature_map()
    fast = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = layer(a), fast(b.to(memory_format=torch.channels_last))
    torch.testing.assert_close(ya, yb)
    upstream = torch.randn_like(ya)
    ga = torch.autograd.grad(ya, [a, *layer.parameters()], upstream)
    gb = torch.autograd.grad(yb, [b, *fast.parameters()], upstream)
    for p, q in zip(ga, gb, strict=True):
        torch.testing.assert_close(p, q.contiguous(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_and_the_input_get_a_gradient(name, training):
    layer, x = build(name).train(training), feature_map().requires_grad_()
    out = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(out, [x, *parameters], torch.randn_like(out), allow_unused=True)
    for key, gradient in zip(["input", *names], gradients, strict=True):
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


def test_eval_is_deterministic_and_leaves_input_and_state_alone(name):
    layer, x = build(name).eval(), feature_map()
    state = copy.deepcopy(layer.state_dict())
    kept = x.clone()
    first = layer(x)
    assert torch.equal(first, layer(x))
    assert torch.equal(x, kept)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    # An image does not depend on the others of its batch.
    torch.testing.assert_close(layer(x[1:]), first[1:])


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


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# Gates that depend on convolved features, which autocast rounds: of features of 1e4 the rounding is
# many units of the score, and a sigmoid near its middle becomes another one. 7.4 eps were seen.
FACTOR_OF_LARGE_INPUTS = {"EMA": 16, "RFCAConv": 16, "RFCBAMConv": 16}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1, 1e4])
def test_autocast_is_near_float32(name, dtype, magnitude, training):
    layer = build(name).train(training)
    # Values that the dtype can hold, so that only the layer's own rounding is measured.
    x = (2 * torch.rand(2, CHANNELS, 9, 7) - 1).mul(magnitude).to(dtype).float().requires_grad_()
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
    # The rounding of weights, features and result, half an eps at most each, adds up as squares.
    factor = FACTOR_OF_LARGE_INPUTS.get(name, 1) if magnitude > 1 else 1
    assert relative_error(out, expected) < factor * TOLERANCES[dtype].output
    if magnitude > 1:  # gradients beyond float16 are a loss scaler's to see
        return
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], upstream)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
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


# Of the map that is exported, and of those that the export is tried with.
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
    """By the TorchScript exporter: the other one needs onnxscript, and MMDeploy uses this one."""
    axes = {0: "batch", 2: "height", 3: "width"}
    file = io.BytesIO()
    torch.onnx.export(
        layer,
        (feature_map(),),
        file,
        dynamo=False,
        opset_version=17,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": axes, "y": axes},
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for x in other_maps():
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        # float32, its sums in another order
        torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)


# Sides unlike each other, so that nothing can take one for the other.
UNEVEN = dict(stride=(1, 2), padding=(3, 2), dilation=(1, 2), groups=4)


@torch.no_grad()
def test_torch_export_with_dynamic_sizes(name):
    assert_exports(build(name).eval())


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
@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_onnx_of_a_conv_with_other_arguments(layer_name, mode):
    layer = conv(layer_name, CHANNELS, 16, (4, 3), padding_mode=mode, **UNEVEN)
    assert_exports_to_onnx(layer.eval())


def test_unknown_argument_is_a_type_error_that_names_it(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        build(name, no_such_argument=1)


def test_inputs_that_are_no_feature_map_are_refused(name):
    layer = build(name).eval()
    shown = MODELS.get(name).__name__
    x = feature_map()
    with pytest.raises(ValueError, match=rf"{shown}.*\(32, 9, 7\)"):
        layer(x[0])
    with pytest.raises(ValueError, match=rf"{shown}.* 31 channels .*in_channels=32"):
        layer(x[:, 1:])
    with pytest.raises(ValueError, match=rf"{shown}.* empty map .*\(2, 32, 0, 7\)"):
        layer(x[:, :, :0])
    with pytest.raises(TypeError, match=rf"{shown}.*torch\.int64"):
        layer(x.long())
    with pytest.raises(TypeError, match=rf"{shown}.*ndarray"):
        layer(x.numpy())


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0, ValueError, "0: must be at least 1"),
        (-3, ValueError, "-3: must be at least 1"),
        (8.0, TypeError, r"8\.0: must be an int, not float"),
        (True, TypeError, "True: must be an int, not bool"),
        ("8", TypeError, "'8': must be an int, not str"),
    ],
)
def test_integer_arguments_are_checked_when_the_layer_is_built(name, value, error, shown):
    numbers = ["in_channels", *required(name)]
    numbers += ["out_channels", "kernel_size", "stride", "dilation", "groups"] * (name in CONVS)
    good = {"in_channels": CHANNELS, **required(name)}
    if name in CONVS:
        good |= dict(out_channels=8, kernel_size=3, padding=1)
    for argument in numbers:
        with pytest.raises(error, match=f"^{argument}={shown}"):
            MODELS.get(name)(**{**good, argument: value})


@pytest.mark.parametrize("name", [n for n in CONVS + PLUGINS if accepts(n, "norm_cfg")])
@pytest.mark.parametrize("training", [True, False])
def test_norm_of_the_layer(name, training):
    x, outs = feature_map(), {}
    kinds = (nn.BatchNorm2d, nn.GroupNorm)
    # An attention inside may have a norm of its own, which norm_cfg does not choose.
    bare = build(name, norm_cfg=None)
    fixed = {key for key, m in bare.named_modules() if isinstance(m, kinds)}
    for key, cfg in {
        "BN": dict(type="BN", eps=0.1),
        "GN": dict(type="GN", num_groups=8),
        "none": None,
    }.items():
        layer = build(name, norm_cfg=cfg).train(training)
        found = {k: m for k, m in layer.named_modules() if isinstance(m, kinds)}
        norms = [m for k, m in found.items() if k not in fixed]
        assert bool(norms) == (cfg is not None)
        assert all(m.eps == 0.1 for m in norms if key == "BN")
        outs[key] = layer(x)
        assert outs[key].isfinite().all()
    assert not torch.allclose(outs["BN"], outs["GN"], atol=1e-3)
    assert not torch.allclose(outs["GN"], outs["none"], atol=1e-3)
    frozen = build(name, norm_cfg=dict(type="BN", requires_grad=False))
    assert sum(not p.requires_grad for p in frozen.parameters()) >= 2
    synced = build(name, norm_cfg=dict(type="SyncBN"))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in synced.modules())


@pytest.mark.parametrize("name", [n for n in CONVS + PLUGINS if accepts(n, "act_cfg")])
def test_activation_of_the_layer(name):
    layers = [build(name, act_cfg=a and dict(type=a)) for a in ("ReLU", "SiLU", "Tanh", None)]
    for a, layer in enumerate(layers):
        assert all(changes(layer, other) for other in layers[a + 1 :])
    default = inspect.signature(MODELS.get(name)).parameters["act_cfg"].default
    kept = copy.deepcopy(default)
    assert not changes(build(name), build(name, act_cfg=default))
    assert default == kept


# --------------------------------------------------------------------------- convolutions

GRID = [
    dict(),
    dict(stride=2),
    dict(stride=(2, 3)),
    dict(padding=1),
    dict(padding=(0, 2)),
    dict(dilation=2),
    dict(padding=(2, 3), dilation=(2, 3), stride=(3, 1)),
    dict(padding=1, groups=4),
    dict(padding=1, bias=False),
    dict(padding=1, padding_mode="reflect"),
    dict(padding=2, padding_mode="circular", stride=2),
    dict(padding=2, padding_mode="replicate", dilation=2),
]


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 3), (4, 3), 5])
@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_conv_has_the_size_and_the_attributes_of_conv2d(layer_name, kernel, kwargs):
    kwargs = dict(dict(padding=0), **kwargs)
    x = torch.randn(1, 8, 14, 13)
    expected = nn.Conv2d(8, 12, kernel, **kwargs)
    layer = conv(layer_name, 8, 12, kernel, **kwargs).eval()
    assert layer(x).shape == expected(x).shape
    for attribute in (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "padding_mode", "transposed", "output_padding"),
    ):
        assert getattr(layer, attribute) == getattr(expected, attribute), attribute


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(stride=2),
        dict(stride=(1, 2)),
        dict(padding=2),
        dict(dilation=2, padding=2),  # the size stays
        dict(groups=4),
        dict(bias=False),
        dict(padding_mode="reflect"),
        dict(padding_mode="replicate"),
        dict(padding_mode="circular"),
        dict(kernel_size=5, padding=2),
        dict(kernel_size=(1, 3), padding=(0, 1)),
    ],
    ids=str,
)
def test_no_argument_is_ignored(layer_name, kwargs):
    base = dict(kernel_size=3, padding=1)
    a = conv(layer_name, CHANNELS, 16, **base)
    b = conv(layer_name, CHANNELS, 16, **{**base, **kwargs})
    for layer in (a, b):
        for key, parameter in layer.named_parameters():
            if key.endswith("bias"):
                parameter.data += 0.1
    assert changes(a, b)


@pytest.mark.parametrize("layer_name", CONVS)
def test_bias_is_added_to_every_output_channel(layer_name):
    with_bias = conv(layer_name, CHANNELS, 16, 3, padding=1).eval()
    without = conv(layer_name, CHANNELS, 16, 3, padding=1, bias=False).eval()
    extra = set(with_bias.state_dict()) - set(without.state_dict())
    assert len(extra) == 1, "bias is on by default, as in Conv2d, and adds one parameter"
    without.load_state_dict(with_bias.state_dict(), strict=False)
    bias = with_bias.state_dict()[extra.pop()].normal_()
    x = feature_map()
    found = with_bias(x) - without(x)
    torch.testing.assert_close(found, bias[None, :, None, None].expand_as(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(groups=3), ValueError, r"^groups=3: must divide in_channels=32 and out_channels=16"),
        (dict(padding=-1), ValueError, "^padding=-1: must be at least 0"),
        (dict(padding="same"), TypeError, "^padding='same': must be an int"),
        (dict(padding=1.0), TypeError, r"^padding=1\.0: must be an int"),
        (dict(padding=(1, 1, 1, 1)), TypeError, r"^padding=\(1, 1, 1, 1\): .*pair of ints"),
        (dict(stride=(1, 0)), ValueError, "^stride=0: must be at least 1"),
        (dict(stride=(1, "2")), TypeError, "^stride='2': must be an int"),
        (dict(dilation=(1,)), TypeError, r"^dilation=\(1,\): must be an int or a pair"),
        (dict(kernel_size=None), TypeError, "^kernel_size=None: must be an int"),
        (dict(kernel_size=4), ValueError, r"^padding=None with the even kernel_size=\(4, 4\)"),
        (dict(kernel_size=(3, 2)), ValueError, r"^padding=None with the even kernel_size=\(3, 2\)"),
        (dict(padding_mode="mirror"), ValueError, "^padding_mode='mirror': must be one of .*zeros"),
        (dict(padding_mode=None), ValueError, "^padding_mode=None: must be one of .*reflect"),
    ],
    ids=str,
)
def test_conv_arguments_are_checked_when_the_layer_is_built(layer_name, kwargs, error, message):
    with pytest.raises(error, match=message):
        conv(layer_name, **{"in_channels": 32, "out_channels": 16, "kernel_size": 3, **kwargs})


@pytest.mark.parametrize("layer_name", CONVS)
def test_maps_smaller_than_the_window_are_refused_in_words(layer_name):
    x = torch.randn(1, CHANNELS, 4, 9)
    layer = conv(layer_name, CHANNELS, 16, 3, padding=1, dilation=3).eval()
    message = r"\(1, 32, 4, 9\).*padding=\(1, 1\).*kernel_size=\(3, 3\).*dilation=\(3, 3\)"
    with pytest.raises(ValueError, match=message):
        layer(x)
    assert layer(torch.randn(1, CHANNELS, 5, 9)).shape == (1, 16, 1, 5)
    for mode, widest in (("reflect", 3), ("circular", 4)):
        good = conv(layer_name, CHANNELS, 16, 3, padding=widest, padding_mode=mode).eval()
        assert good(x).shape == (1, 16, 2 + 2 * widest, 7 + 2 * widest)
        wide = conv(layer_name, CHANNELS, 16, 3, padding=widest + 1, padding_mode=mode).eval()
        with pytest.raises(ValueError, match=rf"padding_mode='{mode}'.*\(1, 32, 4, 9\)"):
            wide(x)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("norm", [None, "BN", "GN"])
@pytest.mark.parametrize("act", [None, "ReLU", "LeakyReLU"])
def test_conv_module(layer_name, norm, act):
    torch.manual_seed(0)
    norm_cfg = {"BN": dict(type="BN"), "GN": dict(type="GN", num_groups=4), None: None}[norm]
    block = ConvModule(
        CHANNELS,
        16,
        (3, 5),
        stride=(2, 1),
        padding=(1, 3),
        dilation=(1, 2),
        groups=2,
        conv_cfg=dict(type=layer_name),
        norm_cfg=norm_cfg,
        act_cfg=act and dict(type=act),
    ).eval()
    assert type(block.conv) is MODELS.get(layer_name)
    assert block.in_channels == CHANNELS
    assert block.out_channels == 16
    assert block.kernel_size == (3, 5)
    assert block.stride == (2, 1)
    assert block.padding == block.conv.padding == (1, 3)
    assert block.dilation == (1, 2)
    assert block.groups == 2
    assert block.transposed is False
    assert block.output_padding == (0, 0)
    # Bias where no norm follows, and only there.
    shapes = [v.shape for v in block.conv.state_dict().values()]
    twin = conv(layer_name, CHANNELS, 16, (3, 5), padding=0, groups=2, bias=norm is None)
    assert shapes == [v.shape for v in twin.state_dict().values()]
    x = feature_map()
    expected = block.conv(x)
    if norm == "BN":
        expected = expected / (1 + 1e-5) ** 0.5
    elif norm == "GN":
        expected = F.group_norm(expected, 4)
    if act:
        expected = F.relu(expected) if act == "ReLU" else F.leaky_relu(expected)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize(
    ("mode", "own"),
    [
        ("zeros", "zeros"),
        ("zero", "zeros"),
        ("reflect", "reflect"),
        ("replicate", "replicate"),
        # mmcv 2.1 passes no padding_mode on, so that this is zeros for Conv2d as well.
        ("circular", "zeros"),
    ],
)
def test_conv_module_pads_as_the_layer_does_itself(layer_name, mode, own):
    block = ConvModule(
        CHANNELS,
        16,
        3,
        padding=2,
        conv_cfg=dict(type=layer_name),
        act_cfg=None,
        padding_mode=mode,
    ).eval()
    layer = conv(layer_name, CHANNELS, 16, 3, padding=2, padding_mode=own).eval()
    layer.load_state_dict(block.conv.state_dict())
    x = feature_map()
    assert block.padding == 2
    if layer_name == "RFAConv":  # of attention over the whole map, border cells may be a part
        torch.testing.assert_close(block(x), layer(x))
    assert block(x).shape == layer(x).shape == (2, 16, 11, 9)


@pytest.mark.parametrize("layer_name", CONVS)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_mode_through_conv_cfg(layer_name, mode):
    kwargs = dict(kernel_size=3, padding=1, act_cfg=None)
    cfg = dict(type=layer_name, padding_mode=mode)
    block = ConvModule(CHANNELS, 16, conv_cfg=cfg, **kwargs).eval()
    assert block.conv.padding_mode == mode
    layer = conv(layer_name, CHANNELS, 16, 3, padding=1, padding_mode=mode).eval()
    layer.load_state_dict(block.conv.state_dict())
    torch.testing.assert_close(block(feature_map()), layer(feature_map()))


def stds(layer: nn.Module) -> dict[str, float]:
    return {k: float(p.std()) for k, p in layer.named_parameters() if p.ndim == 4}


def assert_sane(layer: nn.Module) -> None:
    """Each convolution within a factor of 4 of the std that keeps the variance of its input."""
    for key, module in layer.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            fan_in = module.weight[0].numel()
            std = float(module.weight.detach().std()) * fan_in**0.5
            assert 0.25 < std < 4, f"{key}: std times sqrt(fan in) is {std}"


@pytest.mark.parametrize("layer_name", CONVS)
def test_a_parents_kaiming_does_not_shrink_the_layer(layer_name):
    class Parent(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type="Kaiming", layer="Conv2d"))
            self.conv = conv(layer_name, 64, 64, 3, padding=1)

    torch.manual_seed(0)
    parent = Parent()
    parent.init_weights()
    assert_sane(parent.conv)
    assert_sane(ConvModule(64, 64, 3, padding=1, conv_cfg=dict(type=layer_name)).conv)


def test_rfa_conv_starts_as_the_paper_and_resnet_do():
    layer = conv("RFAConv", 64, 128, 3)
    for p in layer.parameters():
        p.data.fill_(7)
    layer.init_weights()
    found = stds(layer)
    # torch's default, uniform in +-1 / sqrt(fan in); Kaiming over O * K, as for any conv there
    assert found["attention.weight"] == pytest.approx(1 / 3**0.5, rel=0.1)
    assert found["feature.weight"] == pytest.approx(1 / 27**0.5, rel=0.1)
    assert found["conv.weight"] == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.1)
    assert not layer.conv.bias.any()


@pytest.mark.parametrize("kwargs", GRID, ids=str)
def test_rfa_conv_of_1x1_is_conv2d(kwargs):
    kwargs = dict(dict(padding=0), **kwargs)
    plain, layer = nn.Conv2d(8, 12, 1, **kwargs), conv("RFAConv", 8, 12, 1, **kwargs)
    assert type(layer) is nn.Conv2d
    assert repr(layer) == repr(plain)
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 8, 7, 5)
    assert torch.equal(layer(x), plain(x))


def ones_in_last_norm(net: ResNet) -> None:
    """Undo what zero_init_residual does: with zeros, nothing in a block has a gradient."""
    for module in net.modules():
        if isinstance(module, Bottleneck):
            module.norm3.weight.data.fill_(1)


@pytest.mark.parametrize("layer_name", CONVS)
def test_resnet_takes_a_conv_as_dcn(layer_name):
    torch.manual_seed(0)
    net = ResNet(
        50,
        base_channels=16,
        strides=(1, 2, 1, 2),
        dilations=(1, 1, 2, 1),
        dcn=dict(type=layer_name),
        stage_with_dcn=(False, True, True, True),
    )
    kind = MODELS.get(layer_name)
    for stage in range(1, 5):
        for i, block in enumerate(getattr(net, f"layer{stage}")):
            assert isinstance(block.conv2, kind) == (stage > 1)
            assert not any(isinstance(m, kind) for m in (block.conv1, block.conv3))
            # As mmdet's ResLayer: the stride in the first block of a stage, dilation in all.
            assert block.conv2.stride == ((2, 2) if stage in (2, 4) and i == 0 else (1, 1))
            assert block.conv2.dilation == ((2, 2) if stage == 3 else (1, 1))
            assert getattr(block.conv2, "bias", None) is None
    net.init_weights()
    assert_sane(net.layer2)
    ones_in_last_norm(net)
    out = net(torch.randn(1, 3, 64, 64))
    assert [tuple(y.shape) for y in out] == [
        *((1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 8, 8), (1, 512, 4, 4)),
    ]
    upstream = [torch.randn_like(y) for y in out]
    convs = [b.conv2 for s in (2, 3, 4) for b in getattr(net, f"layer{s}")]
    assert_gradients(out, convs, upstream)


def assert_gradients(out: tuple[Tensor, ...], layers: list[nn.Module], upstream: list) -> None:
    """Finite in all; not zero for each name in one at least: a narrow ReLU may be dead."""
    named = [(key, p) for layer in layers for key, p in layer.named_parameters()]
    gradients = torch.autograd.grad(out, [p for _, p in named], upstream)
    assert all(g.isfinite().all() for g in gradients)
    alive = {key for (key, _), g in zip(named, gradients, strict=True) if g.any()}
    assert alive == {key for key, _ in named}


# --------------------------------------------------------------------------- plug-ins


@pytest.mark.parametrize("layer_name", PLUGINS)
def test_plugin_is_named_by_its_abbreviation(layer_name):
    cfg = dict(type=layer_name, **required(layer_name))
    built, layer = build_plugin_layer(cfg, postfix="_3", in_channels=CHANNELS)
    kind = MODELS.get(layer_name)
    assert "_abbr_" in vars(kind), "mmcv would make up a name, and checkpoints would carry it"
    assert built == f"{kind._abbr_}_3"
    assert kind._abbr_.isidentifier()
    assert type(layer) is kind
    abbreviations = [MODELS.get(other)._abbr_ for other in PLUGINS]
    assert len(set(abbreviations)) == len(abbreviations)
    assert cfg == dict(type=layer_name, **required(layer_name))


@pytest.mark.parametrize("layer_name", PLUGINS)
def test_resnet_takes_a_plugin(layer_name):
    kind = MODELS.get(layer_name)
    cfg = dict(type=layer_name, **{**required(layer_name), **small(layer_name)})
    torch.manual_seed(0)
    net = ResNet(
        50,
        base_channels=32,
        strides=(1, 2, 1, 1),
        plugins=[
            dict(cfg=cfg, stages=(False, True, True, False), position="after_conv2"),
            dict(cfg={**cfg, "postfix": "_b"}, stages=(False, True, True, False),
                 position="after_conv3"),
        ],
        norm_eval=False,
    )  # fmt: skip
    for stage in range(1, 5):
        for block in getattr(net, f"layer{stage}"):
            found = {k: m.in_channels for k, m in block.named_children() if isinstance(m, kind)}
            planes = 32 * 2 ** (stage - 1)
            abbr = kind._abbr_
            expected = {abbr: planes, f"{abbr}_b": 4 * planes} if stage in (2, 3) else {}
            assert found == expected
    net.init_weights()
    ones_in_last_norm(net)
    out = net(torch.randn(2, 3, 64, 64))
    plugins = [m for m in net.layer2.modules() if isinstance(m, kind)]
    assert_gradients(out, plugins, [torch.randn_like(y) for y in out])


def small(layer_name: str) -> dict:
    """Arguments for maps of 8 x 8."""
    return {k: v for k, v in {"patch_size": 4}.items() if accepts(layer_name, k)}
