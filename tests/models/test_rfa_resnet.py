"""RFAResNet: what is replaced, what stays mmdet's, and what trains."""

import copy

import pytest
import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from rfa_mmdet.layers import EMA, ConAM, RFAConv
from rfa_mmdet.models import RFAResNet
from rfa_mmdet.models.backbones.rfa_resnet import PluginBasicBlock

RFA = dict(type="RFAConv")
EMA8 = dict(type="EMA", factor=8)
CONAM = dict(type="ConAM", patch_size=1, hidden_channels=4)
DEPTHS = (18, 34, 50, 101, 152)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def replaced_conv(depth: int) -> str:
    return "conv1" if depth < 50 else "conv2"


def blocks(net: ResNet, stage: int) -> nn.Module:
    return getattr(net, f"layer{stage}")


def thin(depth: int = 18, seed: int = 0, **kwargs) -> RFAResNet:
    """A net that runs in milliseconds, every norm at values of its own."""
    torch.manual_seed(seed)
    net = RFAResNet(depth, **{"base_channels": 8, **kwargs})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
    return net


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------- counts and places


@pytest.mark.parametrize(
    ("depth", "rfa", "stages", "more"),
    [
        (18, dict(RFA, bias=True), None, 160_896),
        (34, dict(RFA, bias=True), None, 363_200),
        (50, RFA, (False, True, True, True), 387_072),
        (50, RFA, None, 407_808),
    ],
)
def test_parameter_counts_of_the_paper(depth, rfa, stages, more):
    with torch.device("meta"):
        net = RFAResNet(depth, rfa=rfa, stage_with_rfa=stages)
        assert parameters(net) - parameters(ResNet(depth)) == more


@pytest.mark.parametrize(("depth", "total"), [(18, 11_689_512), (34, 21_797_672)])
def test_plain_counts_of_the_paper(depth, total):
    with torch.device("meta"):
        # The table is for classifiers of 1000 classes: 512 x 1000 weights and 1000 biases.
        assert parameters(RFAResNet(depth)) + 513_000 == total


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("stages", [None, (0, 1, 1, 1), (True, False, False, True), (0, 0, 0, 0)])
def test_exactly_the_first_3x3_of_each_block_is_replaced(depth, stages):
    with torch.device("meta"):
        net = RFAResNet(depth, rfa=RFA, stage_with_rfa=stages)
        plain = ResNet(depth)
    expected = {
        f"layer{stage}.{i}.{replaced_conv(depth)}"
        for stage in range(1, 5)
        for i in range(len(blocks(plain, stage)))
        if stages is None or stages[stage - 1]
    }
    found = {name for name, m in net.named_modules() if isinstance(m, RFAConv)}
    assert found == expected
    if stages is None:
        assert len(found) == {18: 8, 34: 16, 50: 16, 101: 33, 152: 50}[depth]

    def outside(state):
        return {
            k: v.shape for k, v in state.items() if not any(k.startswith(f + ".") for f in found)
        }

    assert outside(net.state_dict()) == outside(plain.state_dict())
    for name in found:
        new, old = net.get_submodule(name), plain.get_submodule(name)
        for attribute in ("in_channels", "out_channels", "kernel_size", "stride", "padding"):
            assert getattr(new, attribute) == getattr(old, attribute), (name, attribute)
        assert new.dilation == old.dilation
        assert new.conv.bias is None


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_stride_and_dilation_are_carried_over(depth, style):
    kwargs = dict(strides=(1, 2, 1, 2), dilations=(1, 1, 2, 3), style=style, base_channels=8)
    net, plain = RFAResNet(depth, rfa=RFA, **kwargs), ResNet(depth, **kwargs)
    strides = set()
    for stage in range(1, 5):
        for new, old in zip(blocks(net, stage), blocks(plain, stage), strict=True):
            a, b = getattr(new, replaced_conv(depth)), getattr(old, replaced_conv(depth))
            assert type(a) is RFAConv
            assert (a.stride, a.dilation, a.padding) == (b.stride, b.dilation, b.padding)
            strides.add(a.stride)
    # Only a Bottleneck of style caffe has the stride elsewhere, in its first 1x1.
    assert strides == ({(1, 1)} if depth == 50 and style == "caffe" else {(1, 1), (2, 2)})
    shapes = [y.shape for y in plain(image())]
    assert [y.shape for y in net(image())] == shapes


@pytest.mark.parametrize("depth", [18, 50])
def test_without_rfa_and_plugins_it_is_mmdets_resnet(depth):
    net, plain = thin(depth), ResNet(depth, base_channels=8)
    plain.load_state_dict(net.state_dict(), strict=True)
    for training in (True, False):
        for a, b in zip(net.train(training)(image()), run(plain, training), strict=True):
            assert torch.equal(a, b)


def run(net: ResNet, training: bool) -> tuple[Tensor, ...]:
    net.train(training)  # mmdet's returns None
    return net(image())


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("zero", [True, False])
def test_initialisation_is_mmdets(depth, zero):
    last = "norm2" if depth == 18 else "norm3"
    for net in (
        RFAResNet(depth, rfa=RFA, base_channels=8, zero_init_residual=zero),
        ResNet(depth, base_channels=8, zero_init_residual=zero),
    ):
        net.init_weights()
        norms = [getattr(b, last).weight for s in range(1, 5) for b in blocks(net, s)]
        assert [bool(w.any()) for w in norms] == [not zero] * len(norms)
    custom = RFAResNet(depth, base_channels=8, init_cfg=dict(type="Kaiming", layer="Conv2d"))
    custom.init_weights()
    assert getattr(custom.layer1[0], last).weight.all()


def test_init_weights_leaves_the_new_convs_at_scales_of_their_own():
    net = RFAResNet(18, rfa=RFA, base_channels=32)
    torch.manual_seed(0)
    net.init_weights()
    new = net.layer2[1].conv1
    assert float(new.attention.weight.std()) == pytest.approx(1 / 3**0.5, rel=0.1)
    assert float(new.feature.weight.std()) == pytest.approx(1 / 27**0.5, rel=0.1)
    expected = float(net.layer2[1].conv2.weight.std())
    assert float(new.conv.weight.std()) == pytest.approx(expected, rel=0.1)


# --------------------------------------------------------------------------- computation


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
        # At these numbers each plug-in matters: without it the result is another one.
        for name in ("conam", "ema_a", "ema_b"):
            without = copy.deepcopy(block)
            setattr(without, name, nn.Identity())
            assert not torch.allclose(without(x), expected, rtol=1e-2, atol=1e-2), name


def test_basic_block_without_plugins_is_mmdets():
    torch.manual_seed(0)
    block, plain = PluginBasicBlock(8, 8), BasicBlock(8, 8)
    plain.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), plain(x))


def test_plugins_stand_in_the_chosen_stages():
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
    # conv1 of the block above, with rfa as well
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
def test_checkpointing_changes_no_output_and_no_gradient(depth, norm_eval):
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
        # mmdet's Bottleneck checkpoints re-entrantly, which autograd.grad refuses.
        torch.autograd.backward(out, [torch.randn_like(y) for y in out])
        gradients = [x.grad, *(p.grad for p in net.parameters())]
        assert all(g is not None and g.any() for g in gradients)
        results.append((*out, *gradients))
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * float(a.abs().max())


# --------------------------------------------------------------------------- what trains


def is_new(name: str, depth: int) -> bool:
    """Whether a parameter or module belongs to a replaced conv or a plug-in."""
    parts = name.split(".")
    return parts[0].startswith("layer") and (
        parts[2:3] == [replaced_conv(depth)] or any(p.startswith(("ema", "conam")) for p in parts)
    )


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("frozen", [-1, 0, 1, 4])
@pytest.mark.parametrize("norm_eval", [True, False])
def test_frozen_stages_and_norm_eval_hold_for_pretrained_layers_only(depth, frozen, norm_eval):
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


def test_running_statistics_move_in_new_layers_only():
    net = thin(18, rfa=RFA, frozen_stages=4, stage_with_rfa=(0, 1, 0, 1)).train()
    before = {n: m.running_mean.clone() for n, m in norms_of(net)}
    net(image())
    moved = {n for n, m in norms_of(net) if not torch.equal(m.running_mean, before[n])}
    assert moved == {f"layer{s}.{i}.conv1.norm" for s in (2, 4) for i in (0, 1)}


def norms_of(net: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    return [(n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]


def test_gradients_reach_new_layers_in_frozen_stages_and_nothing_else_there():
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
    net.requires_grad_(False)  # as a distillation's teacher is
    for mode in (True, False, True):
        net.train(mode)
        assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("frozen", [-1, 4])
def test_requires_grad_of_norm_cfg_is_heeded(frozen):
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


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((20,), {}, r"^depth=20: must be one of \(18, 34, 50, 101, 152\)$"),
        (("18",), {}, "^depth='18': must be one of"),
        ((18, RFA, (0, 1, 1)), {}, r"^stage_with_rfa=\(0, 1, 1\): must have num_stages=4 entries"),
        (
            (18, RFA, (1, 1, 1, 1)),
            dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2)),
            r"^stage_with_rfa=\(1, 1, 1, 1\): must have num_stages=3 entries",
        ),
        ((18, None, (1, 1, 1, 1)), {}, r"^stage_with_rfa=\(1, 1, 1, 1\) without rfa"),
        (
            (50, RFA),
            dict(dcn=dict(type="DCNv2"), stage_with_dcn=(False, True, True, True)),
            r"^dcn=\{'type': 'DCNv2'\}: .*depth=50",
        ),
        ((18,), dict(dcn=dict(type="DCNv2")), r"^dcn=\{'type': 'DCNv2'\}: .*depth=18"),
        (
            (18,),
            dict(plugins=[dict(cfg=EMA8, position="after_conv3")]),
            r"^plugins: position='after_conv3' .*'EMA'.*\('after_conv1', 'after_conv2'\)",
        ),
        (
            (50,),
            dict(plugins=[dict(cfg=EMA8, position="after_conv4")]),
            r"^plugins: position='after_conv4' .*'EMA'.*'after_conv3'",
        ),
        ((18,), dict(plugins=[dict(cfg=EMA8)]), "^plugins: position=None .*'EMA'"),
        ((50,), dict(plugins=[dict(cfg=EMA8)]), "^plugins: position=None .*'EMA'"),
        (
            (18,),
            dict(plugins=[dict(cfg=EMA8, position="after_conv1", stages=(1, 1))]),
            r"^plugins: stages=\(1, 1\) .*'EMA'.*num_stages=4",
        ),
    ],
)
def test_arguments_are_refused_in_words(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        RFAResNet(*args, **kwargs)


def test_unknown_arguments_and_types_are_refused():
    with pytest.raises(TypeError, match="no_such_argument"):
        RFAResNet(18, no_such_argument=1)
    with pytest.raises(TypeError, match="no_such_argument"):
        RFAResNet(18, rfa=dict(RFA, no_such_argument=1))
    with pytest.raises(ValueError, match=r"^rfa\.type='NoSuchConv' is registered nowhere"):
        RFAResNet(18, rfa=dict(type="NoSuchConv"))


def test_configs_are_not_changed():
    rfa = dict(RFA, bias=True)
    plugins = [dict(cfg=dict(EMA8, postfix="_1"), position="after_conv2")]
    kept = copy.deepcopy((rfa, plugins))
    thin(18, rfa=rfa, plugins=plugins)
    assert (rfa, plugins) == kept


@pytest.mark.parametrize("depth", [18, 50])
def test_fewer_stages(depth):
    net = thin(
        depth,
        rfa=RFA,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        stage_with_rfa=(0, 1),
    )
    (out,) = net(image())
    assert out.shape == (2, 16 if depth == 18 else 64, 8, 8)
    assert {n.split(".")[0] for n, m in net.named_modules() if isinstance(m, RFAConv)} == {"layer2"}


def test_dcn_alone_works_at_depth_50():
    net = RFAResNet(
        50, dcn=dict(type="RFAConv"), stage_with_dcn=(False, False, False, True), base_channels=8
    )
    assert {n.split(".")[0] for n, m in net.named_modules() if isinstance(m, RFAConv)} == {"layer4"}


# --------------------------------------------------------------------------- in a detector


def test_tiny_retinanet_from_a_config_trains_a_step():
    torch.manual_seed(0)
    init_default_scope("mmdet")  # for the parts whose types name no scope
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


def test_block_types_are_the_ones_to_be_replaced():
    assert issubclass(PluginBasicBlock, BasicBlock)
    for depth, (block, numbers) in RFAResNet.arch_settings.items():
        assert block is (Bottleneck if depth >= 50 else PluginBasicBlock)
        assert numbers == ResNet.arch_settings[depth][1]
