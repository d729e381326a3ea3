"""Attention maps and heat maps show the attention that the layers apply."""

import pytest
import torch
from mmengine.registry import MODELS as LAYERS
from torch import nn

from rfa_mmdet.analysis.attention_maps import (
    attention_layers,
    attention_maps,
    focus,
    heat_maps,
    passed,
)
from rfa_mmdet.analysis.complexity import CONVS, PLUGINS
from rfa_mmdet.analysis.pictures import over_image
from rfa_mmdet.layers import SE, RFAConv


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [RFAConv(3, 4, 3, stride=2), nn.ReLU(), RFAConv(4, 4, 1), RFAConv(4, 5, 3)]
    return nn.Sequential(*layers).eval()


def test_maps_are_the_attention_weights_of_the_features(model):
    x = torch.rand(1, 3, 9, 11)
    maps, result = attention_maps(model, lambda: model(x))
    assert list(maps) == ["0", "3"]  # the 1x1 convolution has none
    assert torch.equal(result, model(x))
    first, attention = model[0], maps["0"]
    features = first.act(first.norm(first.feature(x)))
    weighted = features * attention.flatten(1, 2)
    expected = torch.einsum("bkhw,ok->bohw", weighted, first.conv.weight.flatten(1))
    expected = expected + first.conv.bias.reshape(1, -1, 1, 1)
    assert torch.allclose(first(x), expected, atol=1e-6)


@pytest.mark.parametrize("regions", [1, 3])
def test_layers_of_region_heads_give_no_heat_maps(regions):
    """A single region looks like a single image."""

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = SE(4, start="paper")
            self.roi_head = nn.ModuleDict({"mask_head": SE(4, start="paper")})

        def forward(self, x):
            self.backbone(x)
            return self.roi_head["mask_head"](x[..., :5, :5].expand(regions, -1, -1, -1))

    net = Detector().eval()
    heats, _ = heat_maps(net, lambda: net(torch.rand(1, 4, 9, 9)))
    assert [heat.layer for heat in heats] == ["backbone"]


def test_hooks_are_removed_even_if_the_run_fails(model):
    def run():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        attention_maps(model, run)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_pattern_without_a_match_lists_the_layers(model):
    with pytest.raises(ValueError, match=r"pattern='stem' matches no RFAConv; the model has: 0, 3"):
        attention_maps(model, lambda: None, "stem")


def test_focus_is_one_if_one_position_has_all_the_weight():
    attention = torch.zeros(1, 2, 9, 1, 2)
    attention[:, :, 4, :, 0] = 1
    attention[:, :, :, :, 1] = 1 / 9
    assert torch.allclose(focus(attention), torch.tensor([[[1.0, 0.0]]]), atol=1e-6)


def randomised(layer):
    """Randomise every parameter, because gates start with equal values."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


@pytest.mark.parametrize("name", PLUGINS)
def test_map_of_a_plugin_is_its_attention_weights(name):
    torch.manual_seed(0)
    arguments = {**PLUGINS[name], **(dict(factor=4) if name == "EMA" else {})}
    layer = randomised(LAYERS.get(name)(16, **arguments))
    x = torch.randn(2, 16, 9, 11)
    weights = layer.attention_map(x)
    expected = x * weights + (x if name == "ConAM" else 0)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert weights.std() > 1e-3
    assert layer(x).requires_grad  # the same in training, with the other implementation
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("name", CONVS)
def test_map_of_a_convolution_is_its_attention_weights(name):
    torch.manual_seed(0)
    layer = randomised(LAYERS.get(name)(4, 6, 3, stride=2))
    x = torch.randn(2, 4, 9, 11)
    weights = layer.attention_map(x)
    assert weights.std() > 1e-3
    if weights.dim() == 5:
        features = layer.act(layer.norm(layer.feature(x))).reshape(weights.shape)
        kernel = layer.conv.weight.flatten(2)
        expected = torch.einsum("bckhw,ock->bohw", features * weights, kernel)
        expected = expected + layer.conv.bias.reshape(1, -1, 1, 1)
    else:
        expected = layer.conv(x * weights)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("name", [*CONVS, *PLUGINS])
def test_every_layer_has_one_heat_map(name):
    arguments = {**PLUGINS.get(name, {}), **(dict(factor=4) if name == "EMA" else {})}
    if name in CONVS:
        arguments = dict(out_channels=16, kernel_size=3)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), LAYERS.get(name)(16, **arguments)).eval()
    # Nested attention, such as CBAMConv's, is drawn once.
    assert list(attention_layers(model)) == ["1"]
    (heat,), result = heat_maps(model, lambda: model(torch.rand(1, 3, 12, 13)))
    assert (heat.layer, heat.kind, tuple(heat.values.shape)) == ("1", name, (10, 11))
    assert heat.meaning == ("focus" if name == "RFAConv" else "weight")
    assert heat.values.min() >= 0
    assert heat.values.isfinite().all()
    assert result.shape[0] == 1


def test_layers_are_drawn_once_per_run_but_not_on_regions():
    layer = LAYERS.get("SE")(8).eval()
    model = nn.ModuleDict(dict(head=layer))

    def run():
        for size in (8, 4):
            layer(torch.rand(1, 8, size, size))
        layer(torch.rand(5, 8, 7, 7))

    heats, _ = heat_maps(model, run)
    assert [tuple(heat.values.shape) for heat in heats] == [(8, 8), (4, 4)]


def test_passed_attention_is_weighted_by_magnitude():
    torch.manual_seed(0)
    x, weights = torch.randn(1, 5, 3, 4), torch.rand(1, 5, 1, 1)
    x[..., 0, 0] = 0
    found = passed(weights, x)
    for i in range(3):
        for j in range(4):
            size = x[0, :, i, j].abs().double()
            share = size / size.sum() if size.sum() > 0 else torch.full((5,), 0.2)
            expected = (share * weights[0, :, 0, 0].double()).sum()
            assert found[0, i, j].item() == pytest.approx(expected.item(), rel=1e-5)


def test_patterns_of_heat_maps(model):
    with pytest.raises(ValueError, match=r"pattern='stem' matches no layer with attention.*0, 3"):
        heat_maps(model, lambda: None, "stem")
    with pytest.raises(ValueError, match=r"pattern='\(' is not a regular expression"):
        heat_maps(model, lambda: None, "(")
    with pytest.raises(ValueError, match=r"^the model has no layer with attention$"):
        heat_maps(nn.Conv2d(3, 3, 3), lambda: None)


def test_heat_maps_cover_the_image_without_padding():
    values = torch.zeros(8, 8)
    values[:2, 4:6] = 1
    values[6:] = 5  # 8 rows cover 80 pixels, 60 of them in the image
    over = over_image(values, (60, 80), (0.75, 1.0))
    assert over.shape == (60, 80)
    assert over[4:16, 44:56].min() > 0.5
    # The padding shows from half a cell away.
    assert over[:54, :34].max() == 0
    assert over[26:54].max() == 0
