"""Baselines of the benchmarks: the authors' formulas in eager mode, and plain convolution.

Written from the papers, using the parameters of our layers: RFAConv, RFCBAMConv, RFCAConv, CAMConv,
CBAMConv and CAConv from arXiv 2304.03198, EMA from 2305.13563, ConAM from 2110.14369, CBAM from
1807.06521, CoordAtt from 2103.02907, SE from 1709.01507, ECA from 1910.03151. The windows of the
receptive-field layers are laid out side by side and convolved with stride k, as in the paper.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def side_by_side(windows: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Lay windows (B, C, K, h, w) out as a map (B, C, h * kh, w * kw)."""
    batch, channels, _, height, width = windows.shape
    kh, kw = kernel_size
    windows = windows.reshape(batch, channels, kh, kw, height, width)
    windows = windows.permute(0, 1, 4, 2, 5, 3)  # (B, C, h, kh, w, kw)
    return windows.reshape(batch, channels, height * kh, width * kw)


def features(layer: nn.Module, x: Tensor) -> Tensor:
    """Return F = ReLU(BN(depthwise convolution)), (B, C, K, h, w)."""
    return layer.act(layer.norm(layer.feature(x))).unflatten(1, (x.shape[1], -1))


def rfa_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Weight the features of a window by a softmax over its positions, computed from its mean."""
    means = F.avg_pool2d(x, layer.kernel_size, layer.stride, layer.padding)  # zeros count
    weights = layer.attention(means).unflatten(1, (x.shape[1], -1)).softmax(2)
    return layer.conv(side_by_side(features(layer, x) * weights, layer.kernel_size))


def rfcbam_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Weight the laid-out features by SE of the input and by a spatial gate."""
    laid_out = side_by_side(features(layer, x), layer.kernel_size)
    channel = layer.se.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)).sigmoid()[:, :, None, None]
    pooled = [laid_out.max(1, keepdim=True).values, laid_out.mean(1, keepdim=True)]
    spatial = layer.spatial(torch.cat(pooled, 1)).sigmoid()
    return layer.conv(laid_out * channel * spatial)


def rfca_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply coordinate attention to the laid-out features."""
    laid_out = side_by_side(features(layer, x), layer.kernel_size)
    return layer.conv(coord_att(layer.coordinate, laid_out))


def channel_attention(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply CBAM's channel attention."""
    score = layer.mlp(F.adaptive_max_pool2d(x, 1)) + layer.mlp(F.adaptive_avg_pool2d(x, 1))
    return x * score.sigmoid()


def cbam(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply channel attention, then one weight per cell."""
    x = channel_attention(layer.channel, x)
    pooled = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
    return x * layer.spatial(pooled).sigmoid()


def coord_att(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply one weight per row and one per column of every channel."""
    rows = F.adaptive_avg_pool2d(x, (None, 1))  # (B, C, H, 1)
    columns = F.adaptive_avg_pool2d(x, (1, None)).transpose(2, 3)  # (B, C, W, 1)
    hidden = layer.act(layer.bn1(layer.conv1(torch.cat([rows, columns], 2))))
    of_rows, of_columns = hidden.split([x.shape[2], x.shape[3]], 2)
    row_gate = layer.conv_h(of_rows).sigmoid()
    column_gate = layer.conv_w(of_columns.transpose(2, 3)).sigmoid()
    return x * column_gate * row_gate


def se(layer: nn.Module, x: Tensor) -> Tensor:
    """Weight channels by their means."""
    return x * layer.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)).sigmoid()[:, :, None, None]


def eca(layer: nn.Module, x: Tensor) -> Tensor:
    """Weight channels by the means of their neighbours."""
    score = layer.conv(F.adaptive_avg_pool2d(x, 1).flatten(1).unsqueeze(1)).squeeze(1)
    return x * score.sigmoid()[:, :, None, None]


def ema(layer: nn.Module, x: Tensor) -> Tensor:
    """Weight the cells of each of two branches by the channel distribution of the other."""
    batch, _, height, width = x.shape
    groups = x.reshape(batch * layer.factor, -1, height, width)
    rows = F.adaptive_avg_pool2d(groups, (None, 1))
    columns = F.adaptive_avg_pool2d(groups, (1, None)).transpose(2, 3)
    of_rows, of_columns = layer.conv1x1(torch.cat([rows, columns], 2)).split([height, width], 2)
    x1 = layer.gn(groups * of_rows.sigmoid() * of_columns.transpose(2, 3).sigmoid())
    x2 = layer.conv3x3(groups)
    p1, p2 = (F.adaptive_avg_pool2d(v, 1).flatten(1).softmax(1).unsqueeze(1) for v in (x1, x2))
    gate = (p1 @ x2.flatten(2) + p2 @ x1.flatten(2)).sigmoid()  # (N, 1, H * W)
    return (groups * gate.unflatten(2, (height, width))).reshape(x.shape)


def conam(layer: nn.Module, x: Tensor) -> Tensor:
    """Strengthen each patch according to the similarity of its mean and the mean of the map."""

    def mlp(vector: Tensor) -> Tensor:
        return layer.linear2(layer.linear1(vector).relu()).relu()

    size = layer.patch_size
    # Border patches are means over real cells only.
    means = F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)  # (B, C, rows, columns)
    local = mlp(means.flatten(2).transpose(1, 2))  # (B, P, C)
    whole = mlp(F.adaptive_avg_pool2d(x, 1).flatten(1))  # (B, C)
    confidence = (local @ whole.unsqueeze(2)).softmax(1)  # (B, P, 1)
    gate = confidence.reshape(-1, 1, *means.shape[2:])
    gate = gate.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return x + x * gate[:, :, : x.shape[2], : x.shape[3]]


def attended_conv(attention: Callable[[nn.Module, Tensor], Tensor]) -> Callable:
    """Return the formula of a layer that applies ``attention``, then convolves."""

    def formula(layer: nn.Module, x: Tensor) -> Tensor:
        return layer.conv(attention(layer.attention, x))

    return formula


FORMULAS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "RFAConv": rfa_conv,
    "RFCBAMConv": rfcbam_conv,
    "RFCAConv": rfca_conv,
    "CAMConv": attended_conv(channel_attention),
    "CBAMConv": attended_conv(cbam),
    "CAConv": attended_conv(coord_att),
    "EMA": ema,
    "ConAM": conam,
    "CBAM": cbam,
    "CoordAtt": coord_att,
    "SE": se,
    "ECA": eca,
}


class Formula(nn.Module):
    """An op's formula with a copy of a layer's parameters and statistics.

    Args:
        name (str): The op, a key of ``FORMULAS``.
        layer (nn.Module): Our layer; copied.

    Example:
        >>> from rfa_mmdet.layers import SE
        >>> layer, x = SE(32), torch.rand(2, 32, 5, 7)
        >>> torch.allclose(Formula("SE", layer)(x), layer(x))
        True
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the formula on (B, C, H, W)."""
        return FORMULAS[self.name](self.layer, x)


def plain_conv(channels: int, stride: int, kernel_size: int) -> nn.Module:
    """Return the baseline of all ratios to 'plain', including those of plug-ins."""
    return nn.Conv2d(channels, channels, kernel_size, stride, kernel_size // 2, bias=False)
