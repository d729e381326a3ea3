"""RFAResNet: replaced layers, unchanged behaviour, and invalid arguments."""

import copy

import pytest
import torch
from mmdet.models.backbones.resnet import ResNet
from torch import Tensor, nn

from rfa_mmdet.layers import RFAConv
from rfa_mmdet.models import RFAResNet
from tests.helpers.resnet import DEPTHS, EMA8, RFA, blocks, image, replaced_conv, thin


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


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
        # The table is for classifiers with 1000 classes: 512 x 1000 weights and 1000 biases.
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
def test_stride_and_dilation_are_kept(depth, style):
    kwargs = dict(strides=(1, 2, 1, 2), dilations=(1, 1, 2, 3), style=style, base_channels=8)
    net, plain = RFAResNet(depth, rfa=RFA, **kwargs), ResNet(depth, **kwargs)
    strides = set()
    for stage in range(1, 5):
        for new, old in zip(blocks(net, stage), blocks(plain, stage), strict=True):
            a, b = getattr(new, replaced_conv(depth)), getattr(old, replaced_conv(depth))
            assert type(a) is RFAConv
            assert (a.stride, a.dilation, a.padding) == (b.stride, b.dilation, b.padding)
            strides.add(a.stride)
    # Only a caffe-style Bottleneck has the stride in its first 1x1 convolution.
    assert strides == ({(1, 1)} if depth == 50 and style == "caffe" else {(1, 1), (2, 2)})
    shapes = [y.shape for y in plain(image())]
    assert [y.shape for y in net(image())] == shapes


@pytest.mark.parametrize("depth", [18, 50])
def test_without_rfa_and_plugins_it_equals_mmdets_resnet(depth):
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
def test_initialisation_matches_mmdet(depth, zero):
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


def test_init_weights_keeps_the_scale_of_new_convs():
    net = RFAResNet(18, rfa=RFA, base_channels=32)
    torch.manual_seed(0)
    net.init_weights()
    new = net.layer2[1].conv1
    assert float(new.attention.weight.std()) == pytest.approx(1 / 3**0.5, rel=0.1)
    assert float(new.feature.weight.std()) == pytest.approx(1 / 27**0.5, rel=0.1)
    expected = float(net.layer2[1].conv2.weight.std())
    assert float(new.conv.weight.std()) == pytest.approx(expected, rel=0.1)


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


def test_configs_are_not_modified():
    rfa = dict(RFA, bias=True)
    plugins = [dict(cfg=dict(EMA8, postfix="_1"), position="after_conv2")]
    kept = copy.deepcopy((rfa, plugins))
    thin(18, rfa=rfa, plugins=plugins)
    assert (rfa, plugins) == kept


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((20,), {}, r"^depth=20: must be one of \(18, 34, 50, 101, 152\)$"),
        (("18",), {}, "^depth='18': must be one of"),
        (
            (18, RFA, (0, 1, 1)),
            {},
            r"^stage_with_rfa=\(0, 1, 1\): must be one bool for each of the num_stages=4",
        ),
        (
            (18, RFA, (1, 1, 1, 1)),
            dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 1, 2)),
            r"^stage_with_rfa=\(1, 1, 1, 1\): must be one bool for each of the num_stages=3",
        ),
        ((18, RFA, (1, 2, 3, 4)), {}, r"^stage_with_rfa=\(1, 2, 3, 4\): must be one bool"),
        ((18, RFA, "0111"), {}, r"^stage_with_rfa='0111': must be one bool"),
        ((18, RFA, True), {}, r"^stage_with_rfa=True: must be one bool"),
        ((18,), dict(plugins=[dict(cfg=dict(type="SE"), stage=(1, 1, 1, 1))]), "^plugins=.*keys"),
        ((18,), dict(plugins=dict(cfg=dict(type="SE"))), "^plugins=.*must be a list of dicts"),
        ((18, None, (1, 1, 1, 1)), {}, r"^stage_with_rfa=\(1, 1, 1, 1\): needs rfa"),
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
def test_invalid_arguments_give_clear_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        RFAResNet(*args, **kwargs)


def test_unknown_arguments_and_types_raise():
    with pytest.raises(TypeError, match="no_such_argument"):
        RFAResNet(18, no_such_argument=1)
    with pytest.raises(TypeError, match="no_such_argument"):
        RFAResNet(18, rfa=dict(RFA, no_such_argument=1))
    with pytest.raises(ValueError, match=r"^rfa\.type='NoSuchConv' is not registered"):
        RFAResNet(18, rfa=dict(type="NoSuchConv"))
    with pytest.raises(TypeError, match=r"^rfa='RFAConv': must be a dict with a 'type'"):
        RFAResNet(18, rfa="RFAConv")
    message = r"^rfa=.*: cannot replace layer1\.0\.conv1, which is already a CAMConv"
    with pytest.raises(ValueError, match=message):
        RFAResNet(18, rfa=RFA, conv_cfg=dict(type="CAMConv"))
