"""Compare RFCBAMConv, RFCAConv and RFAConv on unfolded windows with the papers' formulas.

RFAConv on learnt features is in tests/ops/receptive_field/test_reference.py;
tests/layers/test_every_layer.py checks what mmcv and MMDetection require.
"""

import pytest
import torch
from hypothesis import example, given
from mmengine.registry import MODELS
from torch import nn
from torch.nn import functional as F

from rfa_mmdet.layers import RFAConv, RFCAConv, RFCBAMConv
from tests.helpers import formulas
from tests.helpers.formulas import Case
from tests.helpers.receptive_field import LAYERS
from tests.helpers.torch_features import fills_memory

every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, case: Case, **kwargs) -> nn.Module:
    return case.build(LAYERS[name][0], act_cfg=case.act and dict(type=case.act), **kwargs)


def compare(name: str, case: Case, **kwargs) -> float:
    formula = LAYERS[name][1]
    layer = build(name, case, **kwargs)
    return formulas.compare(layer, lambda exact, x: formula(exact, case, x), case.input())


@fills_memory
def test_new_memory_is_nan():
    assert torch.empty(100).isnan().all()


@given(formulas.cases())
@example(Case(kernel=(1, 1), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(Case(kernel=(2, 4), padding=(0, 3), channels=1, batch=3))
@example(Case(kernel=(7, 7), padding=(3, 3), channels=65, batch=1, size=(4, 3)))
def test_rfcbam_conv_matches_the_formula(case):
    compare("RFCBAMConv", case)


@given(formulas.cases())
@example(Case(kernel=(1, 1), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(Case(kernel=(2, 4), padding=(0, 3), channels=1, batch=3))
@example(Case(kernel=(7, 7), padding=(3, 3), channels=65, batch=1, size=(4, 3)))
def test_rfca_conv_matches_the_formula(case):
    compare("RFCAConv", case)


@given(formulas.cases(pointwise=False))
@example(Case(kernel=(1, 2), padding=(0, 0), stride=(2, 1), groups=3, out_channels=6))
@example(Case(kernel=(2, 4), padding=(0, 3), channels=1, batch=3))
@example(Case(kernel=(7, 7), padding=(3, 3), channels=65, batch=1, size=(4, 3)))
def test_rfa_conv_on_unfolded_windows_matches_the_formula(case):
    compare("unfold", case)


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_float32_gradients_are_compared(name, training, mode, dilation):
    window = dict(dilation=(dilation,) * 2, padding=(dilation,) * 2, stride=(2, 2))
    case = Case(mode=mode, training=training, size=(9, 11), seed=1, **window)
    assert compare(name, case) > 1e-5, "choose another seed: a value lies on a corner"


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(name, training):
    window = dict(size=(4, 3), kernel=(2, 3), padding=(1, 1))
    case = Case(batch=1, channels=2, out_channels=2, act="SiLU", training=training, **window)
    assert formulas.gradcheck(build(name, case), case.input())


@every_layer
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_empty_batch_wherever_torch_accepts_one(name, mode):
    layer = LAYERS[name][0](4, 6, 3, stride=2, padding=1, padding_mode=mode)
    formulas.check_empty_batch(layer, mode)


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_input_is_unchanged_and_may_be_a_view(name, training):
    layer = build(name, Case(training=training))
    base = torch.randn(2, 9, 11, 3)
    view = base.permute(0, 3, 2, 1)[:, :, 1::2]  # not contiguous
    kept = view.clone()
    torch.testing.assert_close(layer(view), layer(kept))
    assert torch.equal(view, kept)


@pytest.mark.parametrize("name", ["RFCBAMConv", "RFCAConv"])
@pytest.mark.parametrize("watched", ["feature", "norm", "act"])
@torch.no_grad()
def test_hooks_see_the_same_in_inference_and_training(name, watched):
    layer = build(name, Case(training=False))
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    x, seen = Case().input(), []
    expected = layer(x)
    handle = getattr(layer, watched).register_forward_hook(lambda *call: seen.append(call[-1]))
    found = layer(x)
    handle.remove()
    torch.testing.assert_close(found, expected)
    value = layer.feature(x)
    if watched != "feature":
        value = layer.norm(value)
    if watched == "act":
        value = layer.act(value)
    (out,) = seen
    torch.testing.assert_close(out, value)


@pytest.mark.parametrize("name", ["RFCBAMConv", "RFCAConv"])
def test_hooks_see_every_module_in_inference(name):
    layer, x = build(name, Case(training=False)), Case().input()
    layer.norm.running_var.uniform_(0.5, 2)
    with torch.inference_mode():
        expected = layer(x)
    seen = {}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: seen.update({module: (out, out.clone())})
    )
    try:
        with torch.no_grad():
            found = layer(x)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected)
    for module in (layer.feature, layer.norm, layer.act):
        assert torch.equal(*seen[module])

    # A replaced forward or a bias is not ignored either.
    layer.norm.forward = lambda features: torch.zeros_like(features)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.conv.bias[:, None, None].expand_as(found))
    del layer.norm.forward
    layer.feature.bias = nn.Parameter(torch.randn(layer.feature.out_channels))
    with torch.no_grad():
        biased = layer(x)
    torch.testing.assert_close(biased, layer(x.requires_grad_()))
    assert not torch.equal(biased, found)


@pytest.mark.parametrize("name", ["RFCBAMConv", "RFCAConv"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_differentiation(name, training):
    layer = build(name, Case(training=training)).double()
    x = Case().input().double()
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        _, found = torch.autograd.forward_ad.unpack_dual(layer(dual))
    weights = torch.randn_like(found)
    x.requires_grad_()
    (slope,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    torch.testing.assert_close((found * weights).sum(), (slope * tangent).sum())


def shapes(layer: nn.Module, *without: str) -> dict[str, tuple[int, ...]]:
    parameters = layer.named_parameters()
    return {k: tuple(p.shape) for k, p in parameters if not k.startswith(without)}


def test_parameters_match_the_paper():
    inner = {"conv.weight": (6, 96, 3, 3), "conv.bias": (6,)}
    norm = {"norm.weight": (864,), "norm.bias": (864,)}
    feature = {"feature.weight": (864, 1, 3, 3), **norm}
    assert shapes(RFAConv(96, 6, 3, feature="unfold")) == {
        "attention.weight": (864, 1, 1, 1),
        **norm,
        **inner,
    }
    assert shapes(RFCBAMConv(96, 6, 3)) == {
        **feature,
        "se.fc.0.weight": (16, 96),  # a width, not a divisor
        "se.fc.2.weight": (96, 16),
        "spatial.weight": (1, 2, 3, 3),
        **inner,
    }
    for channels, reduction, hidden in ((96, 32, 8), (320, 32, 10), (96, 4, 24)):
        assert shapes(RFCAConv(channels, 6, 3, reduction=reduction), "feature", "norm", "conv") == {
            "coordinate.conv1.weight": (hidden, channels, 1, 1),
            "coordinate.conv1.bias": (hidden,),
            "coordinate.bn1.weight": (hidden,),
            "coordinate.bn1.bias": (hidden,),
            "coordinate.conv_h.weight": (channels, hidden, 1, 1),
            "coordinate.conv_h.bias": (channels,),
            "coordinate.conv_w.weight": (channels, hidden, 1, 1),
            "coordinate.conv_w.bias": (channels,),
        }
    assert shapes(RFCAConv(96, 6, 3), "coordinate") == {**feature, **inner}


@pytest.mark.parametrize(
    ("name", "width"), [("RFCBAMConv", "hidden_channels"), ("RFCAConv", "reduction")]
)
def test_other_attention_widths_match_the_formula(name, width):
    compare(name, Case(channels=27), **{width: 3})


@pytest.mark.parametrize("name", ["RFAConv", "RFCBAMConv", "RFCAConv"])
def test_repr_shows_floor_and_backend_unless_default(name):
    layer = MODELS.get(name)
    changed = layer(4, 6, 3, bias=True, input_floor=-2.0, backend="reference")
    assert "input_floor=-2.0, backend='reference'\n" in repr(changed)
    assert not any(argument in repr(layer(4, 6, 3)) for argument in ("input_floor", "backend"))


@pytest.mark.parametrize("feature", ["conv", "unfold"])
@pytest.mark.parametrize("kernel_size", [1, (1, 1), [1, 1]])
def test_1x1_window_gives_a_plain_convolution(feature, kernel_size):
    class Derived(RFAConv):
        pass

    for kind in (RFAConv, Derived):
        for layer in (
            kind(4, 6, kernel_size, 2, feature=feature),
            kind(in_channels=4, out_channels=6, kernel_size=kernel_size, stride=2, feature=feature),
        ):
            assert type(layer) is nn.Conv2d
            assert shapes(layer) == {"weight": (6, 4, 1, 1), "bias": (6,)}
            x = torch.randn(2, 4, 7, 5)
            expected = F.conv2d(x, layer.weight, layer.bias, 2)
            torch.testing.assert_close(layer(x), expected)
    # Only if both sides are 1, and only for this method: the others still weight the channels.
    assert type(RFAConv(4, 6, (1, 3), feature=feature)) is RFAConv
    assert type(RFCAConv(4, 6, 1)) is RFCAConv


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(feature="other"), ValueError, "feature='other': must be 'conv' or 'unfold'"),
        (dict(groups=5), ValueError, "groups=5: must divide in_channels=4 and out_channels=6"),
        (dict(bias=1), TypeError, "bias=1: must be a bool, not int"),
        (dict(input_floor=1), ValueError, "input_floor=1: must be finite and at most 0"),
        (dict(kernel_size=True), TypeError, "kernel_size=True: must be an int, not bool"),
        (
            dict(kernel_size=torch.ones(2)),
            TypeError,
            r"kernel_size=tensor\(\[1\., 1\.\]\): must be an int, not Tensor",
        ),
    ],
)
def test_arguments_of_a_1x1_window_are_checked(kwargs, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        RFAConv(**{**dict(in_channels=4, out_channels=6, kernel_size=1), **kwargs})
    with pytest.raises(ValueError, match=r"^backend='x': must be one of"):
        RFAConv(4, 6, 1, backend="x")
    with pytest.raises(TypeError, match="no_such_argument"):
        RFAConv(4, 6, 1, no_such_argument=1)


def test_raw_windows_with_uniform_attention_equal_a_convolution():
    layer = RFAConv(4, 6, 3, stride=2, norm_cfg=None, act_cfg=None, feature="unfold").eval()
    layer.attention.weight.data.zero_()  # S = 1 / 9
    x = torch.randn(2, 4, 7, 6)
    expected = F.conv2d(x, layer.conv.weight / 9, layer.conv.bias, 2, 1)
    torch.testing.assert_close(layer(x), expected)


def test_attention_map_matches_that_of_learnt_features():
    case = Case(dilation=(2, 1), stride=(1, 2))
    learnt, unfold = case.build(RFAConv), build("unfold", case)
    unfold.attention.load_state_dict(learnt.attention.state_dict())
    assert torch.equal(unfold.attention_map(case.input()), learnt.attention_map(case.input()))


@pytest.mark.parametrize(
    ("layer", "kwargs", "error", "message"),
    [
        (RFAConv, dict(feature="other"), ValueError, "feature='other': must be 'conv' or 'unfold'"),
        (RFAConv, dict(feature=None), ValueError, "feature=None: must be 'conv' or 'unfold'"),
        (RFCAConv, dict(reduction=0), ValueError, "reduction=0: must be at least 1"),
        (RFCAConv, dict(reduction=8.0), TypeError, "reduction=8.0: must be an int, not float"),
        (
            RFCBAMConv,
            dict(hidden_channels="x"),
            TypeError,
            "hidden_channels='x': must be an int, not str",
        ),
        (RFCBAMConv, dict(hidden_channels=0), ValueError, "hidden_channels=0: must be at least 1"),
        (
            RFCBAMConv,
            dict(hidden_channels=None),
            TypeError,
            "hidden_channels=None: must be an int, not NoneType",
        ),
    ],
)
def test_invalid_arguments_give_clear_errors(layer, kwargs, error, message):
    with pytest.raises(error) as raised:
        layer(8, 8, 3, **kwargs)
    assert str(raised.value) == message


@every_layer
def test_invalid_inputs_give_clear_errors(name):
    formulas.check_refused_inputs(LAYERS[name][0](8, 8, 3, padding=0, dilation=2))
