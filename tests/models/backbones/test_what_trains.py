"""Layers of RFAResNet that train with frozen_stages and norm_eval, also in a detector."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from rfa_mmdet.models import RFAResNet
from tests.helpers.resnet import EMA8, RFA, blocks, image, replaced_conv, thin


def is_new(name: str, depth: int) -> bool:
    """Return whether a parameter or module belongs to a replaced conv or a plug-in."""
    parts = name.split(".")
    return parts[0].startswith("layer") and (
        parts[2:3] == [replaced_conv(depth)] or any(p.startswith(("ema", "conam")) for p in parts)
    )


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("frozen", [-1, 0, 1, 4])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_frozen_stages_and_norm_eval_only_freeze_pretrained_layers(depth, frozen, norm_eval):
    plugins = [dict(cfg=EMA8, position="after_conv1")]
    net = RFAResNet(
        depth,
        rfa=RFA,
        plugins=plugins,
        frozen_stages=frozen,
        norm_eval=norm_eval,
        base_channels=8,
    )

    def in_frozen(name):
        stem = name.split(".")[0] in ("conv1", "bn1")
        return (stem and frozen >= 0) or any(
            name.startswith(f"layer{i}.") for i in range(1, frozen + 1)
        )

    norms = {n: m for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert any(is_new(n, depth) for n in norms)
    for step in ("built", "train", "eval", "train"):
        if step != "built":
            assert net.train(step == "train") is net
        for name, p in net.named_parameters():
            assert p.requires_grad == (is_new(name, depth) or not in_frozen(name)), (step, name)
        if step == "built":
            continue
        for name, norm in norms.items():
            pretrained = not is_new(name, depth)
            still = pretrained and (norm_eval or in_frozen(name))
            assert norm.training == (step == "train" and not still), (step, name)


def test_running_statistics_only_change_in_new_layers():
    net = thin(18, rfa=RFA, frozen_stages=4, stage_with_rfa=(0, 1, 0, 1)).train()
    before = {n: m.running_mean.clone() for n, m in norms_of(net)}
    net(image())
    moved = {n for n, m in norms_of(net) if not torch.equal(m.running_mean, before[n])}
    assert moved == {f"layer{s}.{i}.conv1.norm" for s in (2, 4) for i in (0, 1)}


def norms_of(net: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    return [(n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]


def test_only_new_layers_get_gradients_in_frozen_stages():
    net = thin(18, rfa=RFA, frozen_stages=2).train()
    out = net(image())
    torch.autograd.backward(out, [torch.randn_like(y) for y in out])
    for name, p in net.named_parameters():
        expected = is_new(name, 18) or name.startswith(("layer3", "layer4"))
        assert (p.grad is not None and bool(p.grad.any())) == expected, name


@pytest.mark.parametrize("frozen", [-1, 2])
def test_what_the_user_froze_stays_frozen(frozen):
    plugins = [dict(cfg=EMA8, position="after_conv1")]
    net = RFAResNet(18, rfa=RFA, plugins=plugins, frozen_stages=frozen, base_channels=8)
    net.requires_grad_(False)  # like the teacher of a distillation
    for mode in (True, False, True):
        net.train(mode)
        assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("frozen", [-1, 4])
def test_requires_grad_of_norm_cfg_is_respected(frozen):
    rfa = dict(RFA, norm_cfg=dict(type="BN", requires_grad=False))
    net = RFAResNet(18, rfa=rfa, frozen_stages=frozen, base_channels=8)
    for _ in range(2):
        for stage in range(1, 5):
            for block in blocks(net, stage):
                assert not any(p.requires_grad for p in block.conv1.norm.parameters())
                assert block.conv1.feature.weight.requires_grad
        net.train()


def test_new_layers_are_the_replaced_convs_and_the_plugins():
    plugins = [dict(cfg=EMA8, stages=(0, 0, 1, 0), position="after_conv3")]
    net = thin(50, rfa=RFA, plugins=plugins, stage_with_rfa=(0, 0, 1, 1))
    found = sorted(net.new_layers.layers)
    assert all(net.get_submodule(name) is m for name, m in net.new_layers.layers.items())
    expected = [f"layer{s}.{i}.conv2" for s, number in ((3, 6), (4, 3)) for i in range(number)]
    expected += [f"layer3.{i}.ema" for i in range(6)]
    assert found == sorted(expected)


def test_tiny_retinanet_from_a_config_trains_a_step():
    torch.manual_seed(0)
    init_default_scope("mmdet")  # for types without a scope
    detector = MODELS.build(
        dict(
            type="mmdet.RetinaNet",
            data_preprocessor=dict(
                type="mmdet.DetDataPreprocessor", mean=[128] * 3, std=[64] * 3, pad_size_divisor=32
            ),
            backbone=dict(
                type="mmdet.RFAResNet",
                depth=18,
                base_channels=8,
                frozen_stages=1,
                norm_eval=False,
                rfa=RFA,
                stage_with_rfa=(False, True, True, True),
                plugins=[dict(cfg=EMA8, stages=(0, 0, 1, 1), position="after_conv2")],
            ),
            neck=dict(
                type="mmdet.FPN",
                in_channels=[8, 16, 32, 64],
                out_channels=16,
                start_level=1,
                num_outs=4,
            ),
            bbox_head=dict(
                type="mmdet.RetinaHead",
                num_classes=3,
                in_channels=16,
                feat_channels=16,
                stacked_convs=1,
                anchor_generator=dict(
                    type="mmdet.AnchorGenerator",
                    octave_base_scale=4,
                    scales_per_octave=1,
                    ratios=[1.0],
                    strides=[8, 16, 32, 64],
                ),
                bbox_coder=dict(type="mmdet.DeltaXYWHBBoxCoder"),
                loss_cls=dict(type="mmdet.FocalLoss", use_sigmoid=True),
                loss_bbox=dict(type="mmdet.L1Loss"),
            ),
            train_cfg=dict(
                assigner=dict(
                    type="mmdet.MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0
                ),
                sampler=dict(type="mmdet.PseudoSampler"),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            test_cfg=ConfigDict(
                nms_pre=100, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=5
            ),
        )
    )
    detector.init_weights()
    detector.train()
    sample = DetDataSample(metainfo=dict(img_shape=(64, 96), scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1])
    )
    data = dict(inputs=[torch.randint(0, 256, (3, 64, 96))] * 2, data_samples=[sample] * 2)
    data = detector.data_preprocessor(data, training=True)
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=3e-3)
    totals = []
    for _ in range(12):
        losses = detector(**data, mode="loss")
        total = sum(sum(v) for v in losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.9 * totals[0], totals
    for name, p in detector.backbone.named_parameters():
        assert (p.grad is not None) == (not name.startswith(("conv1.", "bn1.", "layer1."))), name
    detector.eval()
    with torch.no_grad():
        results = detector(**data, mode="predict")
    assert all(len(r.pred_instances) == 5 for r in results)
    assert all(r.pred_instances.scores.isfinite().all() for r in results)
