"""Convolutions inside a parent: its initialisation, and mmdet's ResNet."""

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import ResNet
from mmdet.models.dense_heads import RetinaHead
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from rfa_mmdet.layers import RFAConv
from tests.helpers.registered import CONVS, assert_gradients, conv, ones_in_last_norm


def stds(layer: nn.Module) -> dict[str, float]:
    return {k: float(p.detach().std()) for k, p in layer.named_parameters() if p.ndim == 4}


def assert_sane(layer: nn.Module) -> None:
    """Check that each convolution keeps the variance of its input within a factor of 4."""
    for key, module in layer.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            fan_in = module.weight[0].numel()
            std = float(module.weight.detach().std()) * fan_in**0.5
            assert 0.25 < std < 4, f"{key}: std times sqrt(fan in) is {std}"


@pytest.mark.parametrize("layer_name", CONVS)
def test_parents_kaiming_init_does_not_shrink_the_layer(layer_name):
    class Parent(BaseModule):
        def __init__(self):
            super().__init__(init_cfg=dict(type="Kaiming", layer="Conv2d"))
            self.conv = conv(layer_name, 64, 64, 3, padding=1)

    torch.manual_seed(0)
    parent = Parent()
    parent.init_weights()
    assert_sane(parent.conv)
    assert_sane(ConvModule(64, 64, 3, padding=1, conv_cfg=dict(type=layer_name)).conv)


@pytest.mark.parametrize("layer_name", CONVS)
def test_a_heads_init_reaches_the_final_convolution_only(layer_name):
    """Between head and convolution is an nn.ModuleList, so init_weights is not called."""
    torch.manual_seed(0)
    cfg = dict(num_classes=2, in_channels=64, feat_channels=64, stacked_convs=1)
    with DefaultScope.overwrite_default_scope("mmdet"):
        head = RetinaHead(**cfg, conv_cfg=dict(type=layer_name))
    fresh, own = stds(conv(layer_name, 64, 64, 3, padding=1)), head.cls_convs[0].conv
    head.init_weights()
    for key, std in stds(own).items():
        expected = 0.01 if key == "conv.weight" else fresh[key]
        assert std == pytest.approx(expected, rel=0.2), key
    # Other functions are applied to everything.
    own.apply(lambda module: [p.data.fill_(2) for p in module.parameters()])
    assert all((p == 2).all() for p in own.parameters())


def test_rfa_conv_is_initialised_like_the_paper_and_resnet():
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


@pytest.mark.parametrize("layer_name", CONVS)
def test_resnet_accepts_a_conv_as_dcn(layer_name):
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
            # As in mmdet's ResLayer: stride in the first block of a stage, dilation in all.
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


def test_conv_cfg_of_a_whole_resnet_leaves_the_1x1s_plain():
    torch.manual_seed(0)
    kwargs = dict(base_channels=8, zero_init_residual=False)
    net, plain = ResNet(50, conv_cfg=dict(type="RFAConv"), **kwargs), ResNet(50, **kwargs)
    for name, old in plain.named_modules():
        if isinstance(old, nn.Conv2d):
            expected = nn.Conv2d if old.kernel_size == (1, 1) else RFAConv
            assert type(net.get_submodule(name)) is expected, name
    # Its checkpoint loads directly, and warm-starts the others.
    net.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(net.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)
    net.eval()
    plain.eval()
    maps = plain.maxpool(plain.relu(plain.bn1(plain.conv1(torch.randn(1, 3, 64, 64)))))
    for layer in ("layer1", "layer2", "layer3", "layer4"):  # after the stem, nothing is below 0
        torch.testing.assert_close(
            getattr(net, layer)(maps), getattr(plain, layer)(maps), rtol=1e-3, atol=1e-4
        )
        maps = getattr(plain, layer)(maps)
