"""Requirements of mmcv and MMDetection for every registered layer of this package."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.registry import MODELS
from torch import nn

from tests.helpers.registered import (
    ATTENDED,
    CHANNELS,
    CONVS,
    PLUGINS,
    RECEPTIVE,
    accepts,
    build,
    changes,
    conv,
    feature_map,
    required,
)

FAR = (20, 31, 61, 63, 100)  # powers of two beyond any sensible number


def test_paper_names_are_registered_in_the_root_registry():
    assert set(RECEPTIVE) == {"RFAConv", "RFCBAMConv", "RFCAConv"}
    assert set(ATTENDED) == {"CAMConv", "CBAMConv", "CAConv"}
    assert set(CONVS) == {*RECEPTIVE, *ATTENDED}
    assert set(PLUGINS) >= {"EMA", "ConAM", "CBAM", "CoordAtt", "SE", "ECA"}
    assert MODELS.name == "model"
    assert MODELS.parent is None


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


def test_mmcvs_batch_norm_fusion_keeps_the_outputs(name):
    layer = build(name).eval()
    fused = fuse_conv_bn(copy.deepcopy(layer))
    torch.testing.assert_close(fused(feature_map()), layer(feature_map()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deep", "pkl"]
)
def test_copies_give_the_same_outputs_and_share_nothing(name, copied, training):
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
        with pytest.raises(TypeError, match="padding='same': must be an int or a pair of ints"):
            conv(name, 8, 12, 3, padding="same")
    else:
        for argument, value in required(name).items():
            assert f"{argument}={value}" in text or f"={value}" in text


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    # Of a vision transformer: (B, H * W, C).
    "tokens": lambda x: x.flatten(2).mT.contiguous().mT.reshape(x.shape),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_give_the_same_outputs(name, layout, batch):
    layer, x = build(name), feature_map()[:batch]
    fast = copy.deepcopy(layer)
    if layout == "channels_last":
        fast.to(memory_format=torch.channels_last)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = layer(a), fast(LAYOUTS[layout](b))
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
    # Images do not depend on the others in the batch.
    torch.testing.assert_close(layer(x[1:]), first[1:])


def test_unknown_argument_is_a_type_error_that_names_it(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        build(name, no_such_argument=1)


def test_invalid_inputs_raise(name):
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
        ("8", TypeError, "'8': must be an int"),
        (np.float64(8), TypeError, r".*8\.0.*: must be an int, not float64"),
        (np.True_, TypeError, r".*True.*: must be an int, not bool"),
        *((2**n + 1, ValueError, f"{2**n + 1}: must be from 1 to ") for n in FAR),
    ],
)
def test_integer_arguments_are_checked_when_the_layer_is_built(name, value, error, shown):
    numbers = ["in_channels", *required(name)]
    numbers += ["out_channels", "kernel_size", "stride", "dilation", "groups"] * (name in CONVS)
    good = {"in_channels": CHANNELS, **required(name)}
    if name in CONVS:
        good |= dict(out_channels=8, kernel_size=3, padding=1)
    numbers += [n for n in ("reduction", "factor", "spatial_kernel_size") if accepts(name, n)]
    pairs = ("kernel_size", "stride", "dilation") if name in CONVS else ()
    for argument in numbers:
        for given in (value, (1, value), [value, 1]) if argument in pairs else (value,):
            with pytest.raises(error, match=f"^{argument}={shown}"):
                MODELS.get(name)(**{**good, argument: given})


def test_numpy_integers_are_accepted(name):
    good = {"in_channels": CHANNELS, **required(name)}
    if name in CONVS:
        good |= dict(out_channels=8, kernel_size=3, padding=1, stride=2, dilation=1, groups=4)
    for kind in (np.int64, np.uint8):
        theirs = {key: kind(value) for key, value in good.items()}
        if name in CONVS:
            theirs["kernel_size"] = [kind(3), 3]
        torch.manual_seed(0)
        layer = MODELS.get(name)(**theirs)
        torch.manual_seed(0)
        twin = MODELS.get(name)(**good)
        assert repr(layer) == repr(twin)
        torch.testing.assert_close(layer(feature_map()), twin(feature_map()))
        for module in layer.modules():
            assert not any(isinstance(value, np.generic) for value in vars(module).values())


@pytest.mark.parametrize("name", CONVS)
def test_window_and_padding_are_bounded(name):
    with pytest.raises(ValueError, match=r"^kernel_size=\(183, 183\): must have at most 32768"):
        MODELS.get(name)(4, 4, 183)
    with pytest.raises(ValueError, match=r"^padding=None, dilation \* .*=2097152: must be"):
        MODELS.get(name)(4, 4, 5, dilation=2**20)
    with pytest.raises(ValueError, match=f"^padding={2**61}: must be from 0 to"):
        MODELS.get(name)(4, 4, 3, padding=(1, 2**61))
    far = conv(name, CHANNELS, 8, 3, stride=2**20, padding=1)
    near = conv(name, CHANNELS, 8, 3, stride=9, padding=1)
    torch.testing.assert_close(far(feature_map()), near(feature_map()))


@pytest.mark.parametrize("name", [n for n in CONVS + PLUGINS if accepts(n, "norm_cfg")])
@pytest.mark.parametrize("training", [True, False])
def test_norm_of_the_layer(name, training):
    x, outs = feature_map(), {}
    kinds = (nn.BatchNorm2d, nn.GroupNorm)
    # A nested attention may have its own norm, independent of norm_cfg.
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
