"""Requirements of mmcv and mmdet's ResNet for plug-ins."""

import pytest
import torch
from mmcv.cnn import build_plugin_layer
from mmdet.models.backbones.resnet import ResNet
from mmengine.registry import MODELS

from tests.helpers.registered import (
    CHANNELS,
    PLUGINS,
    accepts,
    assert_gradients,
    ones_in_last_norm,
    required,
)


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
def test_resnet_accepts_every_plugin(layer_name):
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
    """Return arguments for maps of 8 x 8."""
    return {k: v for k, v in {"patch_size": 4}.items() if accepts(layer_name, k)}
