"""ECA: efficient channel attention.

Paper: "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
arXiv 1910.03151. The gate is float32 under mixed precision.
"""

import math

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, odd_int, positive_int
from rfa_mmdet.layers.untouched import dtype_of
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.scale import scaled


@MODELS.register_module()
class ECA(Plugin):
    """Efficient channel attention: weights channels by neighbouring channels. Keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        kernel_size (int | None): Number of channels that a gate depends on, odd. Defaults to None:
            log2(C) / 2 + 1 / 2, rounded down and then up to odd, as in the paper.
        start (str): 'paper', or 'identity' for use after trained layers: the kernel starts at zero,
            so every gate is 1/2, and the output is always multiplied by 2 (``output_scale``). See
            :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`. Defaults to 'paper'.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> from mmcv.cnn import build_plugin_layer
        >>> name, eca = build_plugin_layer(dict(type="ECA"), in_channels=64)
        >>> name, eca.kernel_size, eca(torch.rand(2, 64, 7, 9)).shape
        ('eca', 3, torch.Size([2, 64, 7, 9]))
    """

    _abbr_ = "eca"

    def __init__(
        self, in_channels: int, kernel_size: int | None = None, start: PluginStart = "paper"
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        if kernel_size is None:
            kernel_size = int(math.log2(self.in_channels) / 2 + 1 / 2) | 1
        kernel_size = self.kernel_size = odd_int("kernel_size", kernel_size)
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.start_as(start)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make every gate 1/2."""
        return self._zeros("conv.weight"), 1 / 2

    def forward(self, x: Tensor) -> Tensor:
        """Apply the channel weights.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        return x * scaled(self.attention_map(x), self.output_scale)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the channel weights, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, C, H, W).

        Returns:
            Tensor: (B, C, 1, 1) in (0, 1).
        """
        check_feature_map("ECA", x, self.in_channels)
        # Convolve along the channels: (B, 1, C).
        with no_autocast(x):
            means = x.mean((2, 3), dtype=dtype_of(self.conv, x))
            score = self.conv(means.unsqueeze(1)).squeeze(1)
        return torch.sigmoid(at_least_float32(score)).to(x.dtype)[:, :, None, None]

    def extra_repr(self) -> str:
        """Show the argument that the submodule does not."""
        return self._with_start(f"in_channels={self.in_channels}")
