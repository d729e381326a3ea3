"""Retrofit of modules unknown to MMEngine's registries, with their current weights."""

import copy

import pytest
import torch
from torch import nn

import rfa_mmdet
from tests.helpers.identity import IDENTITIES
from tests.helpers.norms import randomise_norms
from tests.helpers.registered import CONVS
from tests.helpers.zoo import flat, relative


class Bottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes)
        )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
        )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.downsample(x))


BLOCKS = {BasicBlock: 1, Bottleneck: 4}  # and their expansion


class ResNet(nn.Module):
    """A ResNet with torchvision's names."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        narrow, wide = 8 * BLOCKS[block], 16 * BLOCKS[block]
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(block(8, 8, 1), block(narrow, 8, 1))
        self.layer2 = nn.Sequential(block(narrow, 16, 2), block(wide, 16, 1))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(wide, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Odd(nn.Module):
    """A block without attributes that describe its output."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.expand(self.squeeze(x)).relu()], 1)


class Detector(nn.Module):
    """Predicts centres and boxes from two levels; returns losses in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.body = nn.Sequential(Odd(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.heads = nn.ModuleDict(dict(centre=nn.Conv2d(16, 2, 3), box=nn.Conv2d(16, 4, 3)))

    def forward(self, images, targets=None):
        maps = self.body(self.stem(images))
        found = {name: head(maps) for name, head in self.heads.items()}
        if self.training:
            return sum((y - targets[name]).abs().mean() for name, y in found.items())
        return found


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("conv", CONVS)
def test_resnet_keeps_its_outputs(conv, block):
    torch.manual_seed(0)
    plain = randomise_norms(ResNet(block)).eval()
    x = torch.randn(2, 3, 48, 64)
    net = rfa_mmdet.retrofit(
        copy.deepcopy(plain), [dict(where=r"layer\d\.\d\.conv2", conv=dict(type=conv))]
    )
    assert type(net) is ResNet
    assert len(net.new_layers.layers) == 4
    with torch.no_grad():
        assert relative([plain(x)], [net(x)]) <= 1e-4
    # It trains, has its own checkpoint, and still starts from the plain one's.
    net.train()(x).square().mean().backward()
    layer = net.layer2[0].conv2
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.conv.weight.grad.any()
    net.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert relative([plain(x)], [net.eval()(x)]) <= 1e-4


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", [*CONVS, *IDENTITIES])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_a_resnet(name, block, training):
    torch.manual_seed(0)
    plain = randomise_norms(ResNet(block)).double()
    x, upstream = torch.randn(4, 3, 48, 64).double(), torch.randn(4, 10).double()
    if name in CONVS:
        edit = dict(where=r"layer\d\.\d\.conv2", conv=dict(type=name))
    else:  # starts as the identity if not told otherwise
        cfg = {k: v for k, v in IDENTITIES[name].items() if k != "start"}
        edit = dict(after=r"layer\d\.\d\.conv2", plugin=cfg)
    net = rfa_mmdet.retrofit(copy.deepcopy(plain), [edit]).double()
    outputs = []
    for one in (plain, net):
        one.train(training)
        outputs.append(one(x))
        outputs[-1].backward(upstream)
    assert relative(outputs[:1], outputs[1:]) <= 1e-6
    found = dict(net.named_parameters())
    shared = {key: p.grad for key, p in plain.named_parameters() if key in found}
    assert len(shared) == len([*plain.parameters()]) - 4 * (name in CONVS)
    for key, gradient in shared.items():
        assert relative([gradient], [found[key].grad]) <= 1e-5, key
    assert len(net.new_layers.layers) == 4
    assert all(p.grad is not None for p in net.parameters())


def test_unregistered_detector():
    torch.manual_seed(0)
    plain = Detector().eval()
    images = torch.rand(2, 3, 32, 40)
    edits = [
        dict(where=r"body\.1", conv=dict(type="RFAConv")),
        dict(where=r"heads\..*", conv=dict(type="RFCAConv")),
    ]
    net = rfa_mmdet.retrofit(copy.deepcopy(plain), edits)
    with torch.no_grad():
        assert relative(flat([*plain(images).values()]), flat([*net(images).values()])) <= 1e-4
    targets = {name: torch.zeros_like(y) for name, y in plain(images).items()}
    net.train()(images, targets).backward()
    assert all(p.grad is not None for p in net.heads.parameters())


def test_example_input_gives_the_channels_of_plugins():
    net = Detector().train()
    net.stem.eval()
    modes = [m.training for m in net.modules()]
    edits = [
        dict(after=r"body\.0", plugin=dict(type="CBAM", reduction=4)),
        dict(after="stem", plugin=dict(type="SE")),
    ]
    with pytest.raises(ValueError, match="output channels of a Odd are unknown; pass example_in"):
        rfa_mmdet.retrofit(net, edits)
    rfa_mmdet.retrofit(net, edits, torch.rand(1, 3, 32, 40))
    layers = net.new_layers.layers
    assert {name: layer.in_channels for name, layer in layers.items()} == {
        "body.0.cbam": 16,
        "stem.se": 8,
    }
    own = {m for layer in layers.values() for m in layer.modules()}
    assert [m.training for m in net.modules() if m not in own] == modes


def test_example_input_must_reach_the_plugins():
    class Unused(Detector):
        def __init__(self):
            super().__init__()
            self.spare = Odd()

    edits = [dict(after=r"spare|body\.0", plugin=dict(type="SE"))]
    with pytest.raises(
        ValueError, match=r"example_input: spare did not return a feature map .* set in_ch"
    ):
        rfa_mmdet.retrofit(Unused(), edits, example_input=(torch.rand(1, 3, 32, 40), None))
    edits = [dict(after=r"spare", plugin=dict(type="SE", in_channels=16))]
    net = rfa_mmdet.retrofit(Unused(), edits, example_input=torch.rand(1, 3, 32, 40))
    assert net.spare.se.in_channels == 16


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "regnetx_002"])
def test_timm_models(name):
    timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    torch.manual_seed(0)
    plain = randomise_norms(timm.create_model(name, num_classes=7)).eval()
    x = torch.randn(1, 3, 64, 64)
    where = r"s[34]\.b\d+\.conv2\.conv" if "regnet" in name else r"layer[34]\.\d\.conv2"
    after = r"s[34]\.b\d+" if "regnet" in name else r"layer[34]\.\d"
    net = rfa_mmdet.retrofit(copy.deepcopy(plain), [dict(where=where, conv=dict(type="RFAConv"))])
    with torch.no_grad():
        assert relative([plain(x)], [net(x)]) <= 1e-4
    edits = [dict(after=after, plugin=dict(type="EMA", factor=4, start="identity"))]
    rfa_mmdet.retrofit(net, edits, example_input=x)
    with torch.no_grad():
        assert relative([plain(x)], [net(x)]) <= 1e-4
    net.train()(torch.cat([x, -x])).sum().backward()
