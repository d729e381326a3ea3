"""CBAM: convolutional block attention module, and its channel attention.

Paper: "CBAM: Convolutional Block Attention Module", arXiv 1807.06521; without a norm after the
spatial convolution, as in the RFAConv paper (arXiv 2304.03198). Plain means and maxima replace
adaptive pooling; gates are float32 under mixed precision.
"""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import LARGEST_SIDE, check_feature_map, odd_int, positive_int
from rfa_mmdet.layers.untouched import are_plain, dtype_of, is_plain_conv
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.cbam import (
    apply_cbam_gates,
    channel_gate,
    in_fast_layout,
    spatial_pools,
)
from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.reductions import max_and_mean
from rfa_mmdet.ops.common.scale import scaled


class ChannelAttention(nn.Module):
    """CBAM's channel attention: a shared MLP on the channels' maxima and means.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int): The hidden width is C // reduction, at least 1. Defaults to 16.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> import torch
        >>> ChannelAttention(64)(torch.rand(2, 64, 7, 9)).shape
        torch.Size([2, 64, 7, 9])
    """

    def __init__(self, in_channels: int, reduction: int = 16) -> None:
        super().__init__()
        in_channels = self.in_channels = positive_int("in_channels", in_channels)
        hidden = max(1, in_channels // positive_int("reduction", reduction))
        self.mlp = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, in_channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the channel weights to (B, C, H, W)."""
        return x * self.attention_map(x)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the channel weights, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, C, H, W).

        Returns:
            Tensor: (B, C, 1, 1) in (0, 1).
        """
        check_feature_map(type(self).__name__, x, self.in_channels)
        weights = self.weights()
        if weights is not None:
            return channel_gate(*self.pools(x, weights[0].dtype), *weights).to(x.dtype)
        with no_autocast(x):
            # Concatenated, so each module is called once.
            pools = torch.cat(self.pools(x, dtype_of(self.mlp, x)), dim=2)  # (B, C, 2, 1)
            both = self.mlp(pools)
        return torch.sigmoid(at_least_float32(both[:, :, :1] + both[:, :, 1:])).to(x.dtype)

    def pools(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the maxima and means of x's channels, (B, C, 1, 1) each."""
        return max_and_mean(x, (2, 3), dtype)

    def weights(self) -> tuple[Tensor, Tensor] | None:
        """Return the weights of both convolutions, or None if the modules must be called."""
        mlp = self.mlp
        if not (are_plain(nn.Sequential, mlp) and len(mlp._modules) == 3):
            return None
        squeeze: Any
        excite: Any
        squeeze, act, excite = mlp._modules.values()
        plain = is_plain_conv(squeeze, (1, 1)) and is_plain_conv(excite, (1, 1))
        return (squeeze.weight, excite.weight) if plain and are_plain(nn.ReLU, act) else None


def cell_gate(pools: Tensor, conv: nn.Module) -> Tensor:
    """Return spatial weights: the sigmoid of a convolution of the pooled channels.

    Args:
        pools (Tensor): Maximum and mean over the channels, (B, 2, H, W).
        conv (nn.Module): Convolution from two channels to one that keeps the size.

    Returns:
        Tensor: (B, 1, H, W) in (0, 1), at least float32.

    Example:
        >>> cell_gate(torch.rand(2, 2, 3, 5), nn.Conv2d(2, 1, 7, padding=3)).shape
        torch.Size([2, 1, 3, 5])
    """
    with no_autocast(pools):
        score = conv(in_fast_layout(pools.to(dtype_of(conv, pools))))
    return torch.sigmoid(at_least_float32(score))


@MODELS.register_module()
class CBAM(Plugin):
    """Convolutional block attention: weights channels, then positions. Keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int): The hidden width of the channel attention is C // reduction, at least 1.
            Defaults to 16.
        kernel_size (int): Kernel size of the spatial attention, odd. Defaults to 7.
        start (str): 'paper', or 'identity' for use after trained layers: the last layers of both
            attentions start at zero, so both gates are 1/2, and the output is always multiplied by
            4 (``output_scale``). See :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`. Defaults
            to 'paper'.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> import torch
        >>> from mmcv.cnn import build_plugin_layer
        >>> name, cbam = build_plugin_layer(dict(type="CBAM"), in_channels=64)
        >>> name, cbam(torch.rand(2, 64, 7, 9)).shape
        ('cbam', torch.Size([2, 64, 7, 9]))
    """

    _abbr_ = "cbam"

    def __init__(
        self,
        in_channels: int,
        reduction: int = 16,
        kernel_size: int = 7,
        start: PluginStart = "paper",
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        kernel_size = self.kernel_size = odd_int("kernel_size", kernel_size, LARGEST_SIDE)
        self.channel = ChannelAttention(in_channels, reduction)
        self.spatial = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.start_as(start)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make both gates 1/2."""
        return self._zeros("channel.mlp.2.weight", "spatial.weight"), 1 / 4

    def forward(self, x: Tensor) -> Tensor:
        """Apply the channel weights, then the spatial weights.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("CBAM", x, self.in_channels)
        weights = self._weights()
        if weights is not None:
            pools = self.channel.pools(x, weights[0].dtype)
            return apply_cbam_gates(x, *pools, *weights, scale=self.output_scale)
        x = self.channel(x)
        gate = cell_gate(spatial_pools(x), self.spatial)
        return x * scaled(gate, self.output_scale).to(x.dtype)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the weights of all convolutions, or None if the modules must be called."""
        size, channel, spatial = self.kernel_size, self.channel, self.spatial
        if not is_plain_conv(spatial, (size, size), padding=(size // 2, size // 2)):
            return None
        weights = channel.weights() if are_plain(ChannelAttention, channel) else None
        return None if weights is None else (*weights, spatial.weight)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the product of channel and spatial weights, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W) in (0, 1).
        """
        check_feature_map("CBAM", x, self.in_channels)
        channel = self.channel.attention_map(x)
        return channel * cell_gate(spatial_pools(x * channel), self.spatial).to(x.dtype)
