"""EMA: efficient multi-scale attention with cross-spatial learning.

Paper: "Efficient Multi-Scale Attention Module with Cross-Spatial Learning", arXiv 2305.13563.

What differs from the published code: channels that ``factor`` does not divide are refused when
the layer is built (there, a reshape fails in the first forward); plain means stand for adaptive
pooling (the same numbers; they export with dynamic sizes); gates are float32 under mixed
precision. The parameters keep the published names.
"""

from collections.abc import Callable

from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.ops.common.recompute import weigh
from rfa_mmdet.ops.ema import ema_gate


@MODELS.register_module()
class EMA(nn.Module):
    """Efficient multi-scale attention; keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        factor (int): Number of channel groups; divides ``in_channels``. Defaults to 32.

    Raises:
        TypeError, ValueError: An argument or the input is not as above.

    Example:
        >>> import torch
        >>> from mmcv.cnn import build_plugin_layer
        >>> name, ema = build_plugin_layer(dict(type="EMA", factor=8), in_channels=64)
        >>> name, ema(torch.rand(2, 64, 7, 9)).shape
        ('ema', torch.Size([2, 64, 7, 9]))
    """

    _abbr_ = "ema"

    def __init__(self, in_channels: int, factor: int = 32) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.factor = positive_int("factor", factor)
        if in_channels % factor:
            divisors = [d for d in range(1, in_channels + 1) if in_channels % d == 0]
            raise ValueError(
                f"factor={factor}: must divide in_channels={in_channels}; "
                f"valid: {', '.join(map(str, divisors))}"
            )
        channels = in_channels // factor
        self.conv1x1 = nn.Conv2d(channels, channels, 1)
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.gn = nn.GroupNorm(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh every cell, a gate for each group of channels.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        groups, gate, weights = self._inputs(x)
        return self._joined(weigh(groups, gate, *weights))

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights of the cells, to be looked at.

        Args:
            x (Tensor): (B, C, H, W), the layer's input.

        Returns:
            Tensor: (B, C, H, W) in (0, 1), the same for the channels of a group.
        """
        groups, gate, weights = self._inputs(x)
        (weight,) = gate(groups, *weights)  # (B * factor, 1, H, W)
        return self._joined(weight.expand_as(groups))

    def _joined(self, groups: Tensor) -> Tensor:
        """Return (B * factor, c, H, W) as (B, C, H, W)."""
        joined: Tensor = groups.unflatten(0, (-1, self.factor)).flatten(1, 2)
        return joined

    def _inputs(self, x: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor]], tuple[Tensor, ...]]:
        """Return the groups of channels, and how and of what their gates are made."""
        check_feature_map("EMA", x, self.in_channels)
        # (B, C, H, W) -> (B * factor, c, H, W)
        groups = x.unflatten(1, (self.factor, -1)).flatten(0, 1)
        modules = (self.conv1x1, self.conv3x3, self.gn)
        weights = tuple(parameter for module in modules for parameter in module.parameters())

        def gate(groups: Tensor, *weights: Tensor) -> tuple[Tensor]:
            size = x.shape[2], x.shape[3]
            return ema_gate(groups, *weights, eps=self.gn.eps, size=size)  # type: ignore[arg-type, misc]

        return groups, gate, weights

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"in_channels={self.in_channels}, factor={self.factor}"
