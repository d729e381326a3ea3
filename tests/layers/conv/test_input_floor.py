"""The argument input_floor, the lowest input for which a warm start is exact."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch._subclasses import FakeTensorMode

from rfa_mmdet.models import retrofit
from tests.helpers.registered import RECEPTIVE
from tests.helpers.torch_features import compiles_operators


@pytest.mark.parametrize("name", RECEPTIVE)
@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        (dict(input_floor="0"), TypeError, r"^input_floor='0': must be a number$"),
        (dict(input_floor=True), TypeError, r"^input_floor=True: must be a number$"),
        (dict(input_floor=None), TypeError, r"^input_floor=None: must be a number$"),
        (dict(input_floor=0.5), ValueError, r"^input_floor=0\.5: must be finite and at most 0$"),
        (dict(input_floor=float("-inf")), ValueError, r"^input_floor=-inf: must be finite"),
        (dict(input_floor=float("nan")), ValueError, r"^input_floor=nan: must be finite"),
        (
            dict(input_floor=-1, bias=False),
            ValueError,
            r"^input_floor=-1 with bias=False: .*; pass bias=True$",
        ),
        (
            dict(input_floor=-1, norm_cfg=None),
            ValueError,
            r"^input_floor=-1 with norm_cfg=None: .*; pass a norm, or act_cfg=None",
        ),
    ],
)
def test_input_floor_is_checked(name, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        MODELS.get(name)(4, 6, 3, **kwargs)


@pytest.mark.parametrize("name", RECEPTIVE)
def test_valid_input_floors(name):
    layer = MODELS.get(name)
    assert layer(4, 6, 3).input_floor == 0
    assert layer(4, 6, 3, bias=False, input_floor=0).input_floor == 0
    found = layer(4, 6, 3, input_floor=-2)
    assert (found.input_floor, type(found.input_floor)) == (-2.0, float)
    # Without an activation, there is no floor.
    bare = layer(4, 6, 3, input_floor=-2, norm_cfg=None, act_cfg=None).eval()
    plain = nn.Conv2d(4, 6, 3, padding=1)
    bare.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5) * 9
    torch.testing.assert_close(bare(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """Return what the layers log."""
    found: list[str] = []
    monkeypatch.setattr(
        "rfa_mmdet.layers.conv.receptive_field.print_log", lambda text, **_: found.append(text)
    )
    return found


def warm_started(name: str, **kwargs) -> nn.Module:
    layer = MODELS.get(name)(4, 6, 3, padding=1, **kwargs)
    layer.load_state_dict(nn.Conv2d(4, 6, 3, bias=layer.with_bias).state_dict())
    return layer


@pytest.mark.parametrize("name", RECEPTIVE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_cfg", [dict(type="BN"), None])
def test_warns_once_of_inputs_below_the_floor(name, training, norm_cfg, warnings):
    layer = warm_started(name, norm_cfg=norm_cfg).train(training)
    x = torch.rand(2, 4, 5, 5)
    x[1, 2, 3, 4] = -1.5
    layer(x[:0])  # tells nothing
    layer(x)
    layer(x - 1)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{name}(4, 6, kernel_size=(3, 3)")
    assert "with input_floor=0, but its input has values as low as -1.5. The ReLU" in warnings[0]
    assert ("input_floor, or act_cfg=None" in warnings[0]) is (norm_cfg is not None)


@pytest.mark.parametrize("name", RECEPTIVE)
def test_no_warning_where_the_start_is_exact_or_there_was_none(name, warnings):
    x = torch.rand(2, 4, 5, 5) - 1
    bare, lower = warm_started(name, act_cfg=None), warm_started(name, bias=True, input_floor=-1)
    for layer in (bare, lower, MODELS.get(name)(4, 6, 3)):
        layer.eval()(x)
    own = warm_started(name)
    own.load_state_dict(copy.deepcopy(own.state_dict()))  # a checkpoint of its own
    own(x)
    above = warm_started(name)
    above(x + 1)
    above.load_state_dict({"other.weight": x}, strict=False)
    above(x)  # trained by now
    again = warm_started(name)
    again.init_weights()
    again(x)
    assert warnings == []


@pytest.mark.parametrize("name", RECEPTIVE)
def test_inputs_without_values_are_not_checked(name, warnings):
    layer = warm_started(name, backend="reference").eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(torch.rand(2, 4, 5, 5) - 1)).shape == (2, 6, 5, 5)
    copy.deepcopy(layer).to("meta")(torch.rand(2, 4, 5, 5, device="meta"))
    layer._replicate_for_data_parallel()(torch.rand(2, 4, 5, 5) - 1)
    assert warnings == []
    layer(torch.rand(2, 4, 5, 5) - 1)
    assert len(warnings) == 1


def test_warning_names_the_layer(warnings):
    edits = [dict(where="stem.1", conv=dict(type="RFAConv"))]
    net = nn.Sequential()
    net.stem = nn.Sequential(nn.Identity(), nn.Conv2d(4, 6, 3))
    x = torch.rand(1, 4, 5, 5) - 1
    built = retrofit(copy.deepcopy(net), edits)
    built(x)
    changed = copy.deepcopy(net)
    changed.stem[1] = MODELS.get("RFAConv")(4, 6, 3, bias=True)
    changed.load_state_dict(net.state_dict())
    changed(x)
    assert len(warnings) == 2
    assert all(text.startswith("stem.1: RFAConv was warm-started") for text in warnings)


@compiles_operators
def test_compiled_training_warns_too(warnings):
    torch._dynamo.reset()
    layer = warm_started("RFAConv").train()
    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        compiled(torch.rand(2, 4, 5, 5) - 1)
    assert len(warnings) == 1
    torch._dynamo.reset()
