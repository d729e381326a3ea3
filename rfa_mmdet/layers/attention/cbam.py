"""CBAM: convolutional block attention module, and its channel part alone.

Paper: "CBAM: Convolutional Block Attention Module", arXiv 1807.06521; without norm behind the
spatial convolution, as the RFAConv paper (arXiv 2304.03198) compares it. Plain means and maxima
stand for adaptive pooling; gates are float32 under mixed precision.
"""

from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.ops.cbam import channel_gate, spatial_gate, spatial_pools, weigh_channels_and_cells
from rfa_mmdet.ops.common.reductions import max_and_mean


class ChannelAttention(nn.Module):
    """CBAM's channel part: one MLP on the maxima and the means of the channels.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int): The hidden width is C // reduction, at least 1. Defaults to 16.

    Raises:
        TypeError, ValueError: An argument or the input is not as above.

    Example:
        >>> import torch
        >>> ChannelAttention(64)(torch.rand(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, in_channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        hidden = max(1, in_channels // positive_int("reduction", reduction))
        self.mlp = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, in_channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels of (B, C, H, W)."""
        return x * self.attention_map(x)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights of the channels, to be looked at.

        Args:
            x (Tensor): (B, C, H, W), the layer's input.

        Returns:
            Tensor: (B, C, 1, 1) in (0, 1).
        """
        return channel_gate(*self.inputs(x)).to(x.dtype)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return maxima and means of x's channels, (B, C, 1, 1), and the MLP's weights."""
        check_feature_map(type(self).__name__, x, self.in_channels)
        squeeze, excite = list(self.mlp.parameters())  # torch 2.1 compiles no unpacked iterator
        return *max_and_mean(x, (2, 3), squeeze.dtype), squeeze, excite


@MODELS.register_module()
class CBAM(nn.Module):
    """Convolutional block attention: weighs the channels, then the cells; keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int): The hidden width of the channel part is C // reduction, at least 1.
            Defaults to 16.
        kernel_size (int): Of the spatial part, odd. Defaults to 7.

    Raises:
        TypeError, ValueError: An argument or the input is not as above.

    Example:
        >>> import torch
        >>> from mmcv.cnn import build_plugin_layer
        >>> name, cbam = build_plugin_layer(dict(type="CBAM"), in_channels=64)
        >>> name, cbam(torch.rand(2, 64, 7, 9)).shape
        ('cbam', torch.Size([2, 64, 7, 9]))
    """

    _abbr_ = "cbam"

    def __init__(self, in_channels: int, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        if positive_int("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd, to keep the size")
        self.channel = ChannelAttention(in_channels, reduction)
        self.spatial = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels, then the cells.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("CBAM", x, self.in_channels)
        return weigh_channels_and_cells(x, *self.channel.inputs(x), self.spatial.weight)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights of channels and cells, multiplied, to be looked at.

        Args:
            x (Tensor): (B, C, H, W), the layer's input.

        Returns:
            Tensor: (B, C, H, W) in (0, 1).
        """
        check_feature_map("CBAM", x, self.in_channels)
        channel, weight = self.channel.attention_map(x), self.spatial.weight
        return channel * spatial_gate(spatial_pools(x * channel), weight).to(x.dtype)
