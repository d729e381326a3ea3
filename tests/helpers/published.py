"""The published layers, reimplemented from the papers' formulas and the list of key names."""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

import rfa_mmdet.models


def side_by_side(x: Tensor, k: int) -> Tensor:
    """Lay out (B, C, K, h, w) as (B, C, h * k, w * k)."""
    b, c, _, h, w = x.shape
    return x.view(b, c, k, k, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c, h * k, w * k)


class PublishedRFAConv(nn.Module):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__()
        self.k, wide = k, c * k * k
        self.get_weight = nn.Sequential(
            nn.AvgPool2d(k, stride, k // 2), nn.Conv2d(c, wide, 1, groups=c, bias=False)
        )
        self.generate_feature = nn.Sequential(
            nn.Conv2d(c, wide, k, stride, k // 2, groups=c, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        )
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride=k, bias=bias))

    def forward(self, x):
        weight = self.get_weight(x).unflatten(1, (x.shape[1], -1)).softmax(2)
        feature = self.generate_feature(x).unflatten(1, (x.shape[1], -1))
        return self.conv(side_by_side(feature * weight, self.k))


class Generates(nn.Module):
    def __init__(self, c, o, k, stride, bias):
        super().__init__()
        self.k, wide = k, c * k * k
        self.generate = nn.Sequential(
            nn.Conv2d(c, wide, k, stride, k // 2, groups=c, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        )
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride=k, bias=bias))

    def windows(self, x):
        return side_by_side(self.generate(x).unflatten(1, (x.shape[1], -1)), self.k)


class PublishedSE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(c, 16, bias=False), nn.ReLU(), nn.Linear(16, c, bias=False), nn.Sigmoid()
        )

    def forward(self, x):
        return self.fc(x.mean((2, 3)))[:, :, None, None]


class PublishedRFCBAMConv(Generates):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__(c, o, k, stride, bias)
        self.get_weight = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.Sigmoid())
        self.se = PublishedSE(c)

    def forward(self, x):
        windows = self.windows(x)
        pooled = [windows.max(1, keepdim=True).values, windows.mean(1, keepdim=True)]
        return self.conv(windows * self.se(x) * self.get_weight(torch.cat(pooled, 1)))


def add_coordinate(layer: nn.Module, c: int) -> None:
    hidden = max(8, c // 32)
    layer.conv1 = nn.Conv2d(c, hidden, 1)
    layer.bn1 = nn.BatchNorm2d(hidden)
    layer.conv_h = nn.Conv2d(hidden, c, 1)
    layer.conv_w = nn.Conv2d(hidden, c, 1)


def coordinate(layer: nn.Module, x: Tensor) -> Tensor:
    rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
    y = layer.bn1(layer.conv1(torch.cat([rows, columns], 2)))
    y = y * (y + 3).clamp(0, 6) / 6
    y_h, y_w = y.split([x.shape[2], x.shape[3]], 2)
    a_h, a_w = layer.conv_h(y_h).sigmoid(), layer.conv_w(y_w.transpose(2, 3)).sigmoid()
    return x * a_w * a_h


class PublishedRFCAConv(Generates):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__(c, o, k, stride, bias)
        add_coordinate(self, c)

    def forward(self, x):
        return self.conv(coordinate(self, self.windows(x)))


class PublishedCAConv(nn.Module):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__()
        add_coordinate(self, c)
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride, k // 2, bias=bias))

    def forward(self, x):
        return self.conv(coordinate(self, x))


class PublishedCAMConv(nn.Module):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(c, c // 16, 1, bias=False), nn.ReLU(), nn.Conv2d(c // 16, c, 1, bias=False)
        )
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride, k // 2, bias=bias))

    def apply_attention(self, x):
        most, mean = x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)
        return x * (self.mlp(most) + self.mlp(mean)).sigmoid()

    def forward(self, x):
        return self.conv(self.apply_attention(x))


class PublishedCBAMConv(PublishedCAMConv):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__(c, o, k, stride, bias)
        self.spatital = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def apply_attention(self, x):
        x = super().apply_attention(x)
        pooled = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return x * self.spatital(pooled).sigmoid()


THEIRS = {
    "RFAConv": PublishedRFAConv,
    "RFCBAMConv": PublishedRFCBAMConv,
    "RFCAConv": PublishedRFCAConv,
    "CAMConv": PublishedCAMConv,
    "CBAMConv": PublishedCBAMConv,
    "CAConv": PublishedCAConv,
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a distinctive value."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(seed + 5)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        else:
            # Small weights keep gates away from 0 and 1.
            value.normal_(0, (1 / max(1, value[0].numel())) ** 0.5, generator=generator)
            value += 0.1
    return module.double().eval()


def build(system: str, *args, seed: int = 1, **kwargs) -> nn.Module:
    return randomise(MODELS.get(system)(*args, **kwargs), seed)


def feature_map(c: int, size: tuple[int, int] = (9, 12)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, c, *size, dtype=torch.float64, generator=generator)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.std() > 1e-3  # no comparison of zeros
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Head(nn.Module):
    """A module with names that also occur in published layers."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 1)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv = nn.Sequential(nn.Conv2d(c, 4, 1))

    def forward(self, x):
        return self.conv(self.bn1(self.conv1(x)))


class Detector(nn.Module):
    def __init__(self, system):
        super().__init__()
        plugin = dict(cfg=dict(type="EMA", factor=8), position="after_conv1")
        conam = dict(type="ConAM", patch_size=2, hidden_channels=4)
        self.backbone = rfa_mmdet.models.RFAResNet(
            18,
            base_channels=16,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(0, 1),
            rfa=dict(type=system, bias=True),
            plugins=[plugin, dict(cfg=conam, position="after_conv2")],
        )
        self.bbox_head = Head(32)

    def forward(self, x):
        return self.bbox_head(self.backbone(x)[-1])


def published_detector(system: str) -> nn.Module:
    """Return the same detector with published layers."""
    detector = Detector(system)
    for stage in (detector.backbone.layer1, detector.backbone.layer2):
        for block in stage:
            conv = block.conv1
            block.conv1 = THEIRS[system](conv.in_channels, conv.out_channels, 3, conv.stride[0])
    return randomise(detector, 3)


def image() -> Tensor:
    return feature_map(3, (48, 64))
