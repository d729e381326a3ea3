"""The attention that is shown is the attention that acts."""

import pytest
import torch
from torch import nn

from rfa_mmdet.engine.attention_maps import attention_maps, focus
from rfa_mmdet.layers import RFAConv


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [RFAConv(3, 4, 3, stride=2), nn.ReLU(), RFAConv(4, 4, 1), RFAConv(4, 5, 3)]
    return nn.Sequential(*layers).eval()


def test_maps_are_what_weighs_the_features(model):
    x = torch.rand(1, 3, 9, 11)
    maps, result = attention_maps(model, lambda: model(x))
    assert list(maps) == ["0", "3"]  # the 1x1 has none
    assert torch.equal(result, model(x))
    first, attention = model[0], maps["0"]
    features = first.act(first.norm(first.feature(x)))
    weighed = features * attention.flatten(1, 2)
    expected = torch.einsum("bkhw,ok->bohw", weighed, first.conv.weight.flatten(1))
    expected = expected + first.conv.bias.reshape(1, -1, 1, 1)
    assert torch.allclose(first(x), expected, atol=1e-6)


def test_hooks_are_gone_afterwards_even_if_the_run_fails(model):
    def run():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        attention_maps(model, run)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_pattern_that_matches_nothing_names_the_layers(model):
    with pytest.raises(ValueError, match=r"pattern='stem' matches no RFAConv; the model has: 0, 3"):
        attention_maps(model, lambda: None, "stem")


def test_focus_is_one_where_one_position_has_all():
    attention = torch.zeros(1, 2, 9, 1, 2)
    attention[:, :, 4, :, 0] = 1
    attention[:, :, :, :, 1] = 1 / 9
    assert torch.allclose(focus(attention), torch.tensor([[[1.0, 0.0]]]), atol=1e-6)
