"""SE: squeeze-and-excitation.

Paper: "Squeeze-and-Excitation Networks", arXiv 1709.01507. Without biases, as in its later version.
The gate is float32 under mixed precision.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.layers.untouched import dtype_of
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.scale import scaled


@MODELS.register_module()
class SE(Plugin):
    """Squeeze-and-excitation: weights channels by their means. Keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int | None): The hidden width is C // reduction, at least 1. Defaults to None,
            which means 16.
        hidden_channels (int | None): The hidden width, instead of ``reduction``. Defaults to None.
        start (str): 'paper', or 'identity' for use after trained layers: the second matrix starts
            at zero, so every gate is 1/2, and the output is always multiplied by 2
            (``output_scale``). See :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`. Defaults to
            'paper'.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> from mmcv.cnn import build_plugin_layer
        >>> name, se = build_plugin_layer(dict(type="SE"), in_channels=64)
        >>> name, se(torch.rand(2, 64, 7, 9)).shape
        ('se', torch.Size([2, 64, 7, 9]))
    """

    _abbr_ = "se"

    def __init__(
        self,
        in_channels: int,
        reduction: int | None = None,
        hidden_channels: int | None = None,
        start: PluginStart = "paper",
    ) -> None:
        super().__init__()
        in_channels = self.in_channels = positive_int("in_channels", in_channels)
        if reduction is not None:
            reduction = positive_int("reduction", reduction)
            if hidden_channels is not None:
                raise ValueError(
                    f"reduction={reduction} and hidden_channels={hidden_channels} both set the "
                    "hidden width; pass only one of them"
                )
        if hidden_channels is None:
            hidden_channels = max(1, in_channels // (reduction or 16))
        self.hidden_channels = positive_int("hidden_channels", hidden_channels)
        self.fc = nn.Sequential(
            nn.Linear(in_channels, self.hidden_channels, bias=False),
            nn.ReLU(),
            nn.Linear(self.hidden_channels, in_channels, bias=False),
        )
        self.start_as(start)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make every gate 1/2."""
        return self._zeros("fc.2.weight"), 1 / 2

    def gate(self, x: Tensor) -> Tensor:
        """Return the channel weights.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, 1, 1), in x's dtype.
        """
        with no_autocast(x):
            score = self.fc(x.mean((2, 3), dtype=dtype_of(self.fc, x)))
        return torch.sigmoid(at_least_float32(score)).to(x.dtype)[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the channel weights.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("SE", x, self.in_channels)
        return x * scaled(self.gate(x), self.output_scale)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the channel weights, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, C, H, W).

        Returns:
            Tensor: (B, C, 1, 1) in (0, 1).
        """
        check_feature_map("SE", x, self.in_channels)
        return self.gate(x)


class ChannelGate(SE):
    """Only the channel weights, (B, C, 1, 1), as a part of another layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the channel weights of (B, C, H, W)."""
        return self.gate(x)
