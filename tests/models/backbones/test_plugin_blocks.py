"""Plug-ins in the blocks of RFAResNet: their positions, and the outputs of blocks."""

import copy

import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from rfa_mmdet.layers import EMA, ConAM, RFAConv
from rfa_mmdet.models import RFAResNet
from rfa_mmdet.models.backbones.rfa_resnet import PluginBasicBlock
from tests.helpers.resnet import CONAM, EMA8, RFA, blocks, image, thin


@pytest.mark.parametrize("stride", [1, 2])
def test_basic_block_with_plugins_computes_in_the_right_order(stride):
    torch.manual_seed(0)
    downsample = nn.Conv2d(8, 16, 1, stride=stride)
    plugins = [
        dict(cfg=dict(EMA8, postfix="_a"), position="after_conv2"),
        dict(cfg=CONAM, position="after_conv1"),
        dict(cfg=dict(EMA8, postfix="_b"), position="after_conv1"),
    ]
    kept = copy.deepcopy(plugins)
    block = PluginBasicBlock(8, 16, plugins=plugins, stride=stride, downsample=downsample)
    assert plugins == kept
    assert block.after_conv1_plugin_names == ["conam", "ema_b"]
    assert block.after_conv2_plugin_names == ["ema_a"]
    for norm in (block.norm1, block.norm2):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    x = torch.randn(2, 8, 6, 6)
    for training in (True, False):
        block.train(training)
        twin = copy.deepcopy(block)
        out = torch.relu(twin.bn1(twin.conv1(x)))
        out = twin.ema_b(twin.conam(out))
        out = twin.ema_a(twin.bn2(twin.conv2(out)))
        expected = torch.relu(out + downsample(x))
        torch.testing.assert_close(block(x), expected)
        # With these values, each plug-in changes the result.
        for name in ("conam", "ema_a", "ema_b"):
            without = copy.deepcopy(block)
            setattr(without, name, nn.Identity())
            assert not torch.allclose(without(x), expected, rtol=1e-2, atol=1e-2), name


def test_basic_block_without_plugins_equals_mmdets():
    torch.manual_seed(0)
    block, plain = PluginBasicBlock(8, 8), BasicBlock(8, 8)
    plain.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), plain(x))


def test_plugins_are_in_the_chosen_stages():
    plugins = [
        dict(cfg=CONAM, stages=(False, True, False, True), position="after_conv1"),
        dict(cfg=EMA8, position="after_conv2"),
    ]
    net = thin(18, plugins=plugins)
    for stage in range(1, 5):
        for block in blocks(net, stage):
            kinds = {k: type(m) for k, m in block.named_children() if k in ("ema", "conam")}
            assert kinds == ({"ema": EMA, "conam": ConAM} if stage in (2, 4) else {"ema": EMA})
            assert block.ema.in_channels == 8 * 2 ** (stage - 1)
    # conv1 of the block above, also with rfa
    both = thin(18, plugins=plugins, rfa=RFA)
    block = both.layer2[1].eval()
    x = torch.randn(1, 16, 7, 5).relu()
    out = block.conam(torch.relu(block.bn1(block.conv1(x))))
    expected = torch.relu(block.ema(block.bn2(block.conv2(out))) + x)
    assert type(block.conv1) is RFAConv
    torch.testing.assert_close(block(x), expected)


def test_bottleneck_with_plugins_computes_in_the_right_order():
    plugins = [
        dict(cfg=CONAM, position="after_conv1"),
        dict(cfg=EMA8, position="after_conv2"),
        dict(cfg=dict(EMA8, postfix="_c"), position="after_conv3"),
    ]
    net = thin(50, plugins=plugins, rfa=RFA).eval()
    block = net.layer2[1]
    x = torch.randn(1, 64, 7, 5).relu()
    out = block.conam(torch.relu(block.bn1(block.conv1(x))))
    out = block.ema(torch.relu(block.bn2(block.conv2(out))))
    expected = torch.relu(block.ema_c(block.bn3(block.conv3(out))) + x)
    torch.testing.assert_close(block(x), expected)
    assert block.ema.in_channels == 16
    assert block.ema_c.in_channels == 64


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_checkpointing_keeps_outputs_and_gradients(depth, norm_eval):
    plugins = [dict(cfg=EMA8, position="after_conv2")]
    kwargs = dict(rfa=RFA, plugins=plugins, norm_eval=norm_eval)
    plain = thin(depth, **kwargs).double()
    cheap = thin(depth, with_cp=True, **kwargs).double()
    for net in (plain, cheap):  # both: what a checkpoint filled is held by norm_eval
        net.load_state_dict(plain.state_dict())
    assert all(b.with_cp for s in range(1, 5) for b in blocks(cheap, s))
    results = []
    for net in (plain, cheap):
        x = image().double().requires_grad_()
        out = net.train()(x)
        torch.manual_seed(1)
        # mmdet's Bottleneck uses reentrant checkpoints, which autograd.grad does not support.
        torch.autograd.backward(out, [torch.randn_like(y) for y in out])
        gradients = [x.grad, *(p.grad for p in net.parameters())]
        assert all(g is not None and g.any() for g in gradients)
        results.append((*out, *gradients))
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * float(a.abs().max())


def test_block_types_match_mmdet():
    assert issubclass(PluginBasicBlock, BasicBlock)
    for depth, (block, numbers) in RFAResNet.arch_settings.items():
        assert block is (Bottleneck if depth >= 50 else PluginBasicBlock)
        assert numbers == ResNet.arch_settings[depth][1]
