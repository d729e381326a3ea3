"""EMA: efficient multi-scale attention with cross-spatial learning.

Paper: "Efficient Multi-Scale Attention Module with Cross-Spatial Learning", arXiv 2305.13563.

What differs from the published code: channels that ``factor`` does not divide are refused when
the layer is built (there, a reshape fails in the first forward); plain means stand for adaptive
pooling (the same numbers; they export with dynamic sizes); gates are float32 under mixed
precision. The parameters keep the published names.
"""

from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.layers.untouched import are_plain, dtype_of, is_plain_conv
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.common.recompute import is_recorded
from rfa_mmdet.ops.common.scale import scaled
from rfa_mmdet.ops.ema import ema_gate, weigh_by_ema


@MODELS.register_module()
class EMA(Plugin):
    """Efficient multi-scale attention; keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        factor (int): Number of channel groups; divides ``in_channels``. Defaults to 32.
        start (str): 'paper', or behind trained layers 'identity': the norm's weight and bias and
            the 3x3's start at zero, so every gate at 1/2, and the output is multiplied by 2
            (``output_scale``), in testing too. See
            :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`. Defaults to 'paper'.

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

    def __init__(self, in_channels: int, factor: int = 32, start: PluginStart = "paper") -> None:
        super().__init__()
        in_channels = self.in_channels = positive_int("in_channels", in_channels)
        factor = self.factor = positive_int("factor", factor)
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
        self.start_as(start)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return values under which every gate is 1/2."""
        names = [f"{module}.{name}" for module in ("gn", "conv3x3") for name in ("weight", "bias")]
        return self._zeros(*names), 1 / 2

    def forward(self, x: Tensor) -> Tensor:
        """Weigh every cell, a gate for each group of channels.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("EMA", x, self.in_channels)
        groups, conv1, conv3, gn = self._groups(x), self.conv1x1, self.conv3x3, self.gn
        if (
            not is_recorded()
            and is_plain_conv(conv1, (1, 1), bias=True)
            and is_plain_conv(conv3, (3, 3), padding=(1, 1), bias=True)
            and are_plain(nn.GroupNorm, gn)
            and gn.num_groups == gn.num_channels
        ):
            given = [
                weight for module in (conv1, conv3, gn) for weight in (module.weight, module.bias)
            ]
            weights = [weight for weight in given if weight is not None]
            if len(weights) == len(given):
                weighed = weigh_by_ema(groups, *weights, eps=gn.eps, scale=self.output_scale)
                return self._joined(weighed)
        return self._joined(groups * scaled(self._gate(groups, x), self.output_scale))

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights of the cells, to be looked at.

        Args:
            x (Tensor): (B, C, H, W), the layer's input.

        Returns:
            Tensor: (B, C, H, W) in (0, 1), the same for the channels of a group.
        """
        check_feature_map("EMA", x, self.in_channels)
        groups = self._groups(x)
        return self._joined(self._gate(groups, x).expand_as(groups))

    def _groups(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) as (B * factor, c, H, W)."""
        groups: Tensor = x.unflatten(1, (self.factor, -1)).flatten(0, 1)
        return groups

    def _joined(self, groups: Tensor) -> Tensor:
        """Return (B * factor, c, H, W) as (B, C, H, W)."""
        joined: Tensor = groups.unflatten(0, (-1, self.factor)).flatten(1, 2)
        return joined

    def _gate(self, groups: Tensor, x: Tensor) -> Tensor:
        """Return the weights of the cells of the groups, (B * factor, 1, H, W)."""
        dtype, size = dtype_of(self.conv1x1, x), (x.shape[2], x.shape[3])
        return ema_gate(groups, self.conv1x1, self.conv3x3, self.gn, dtype, size)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return self._with_start(f"in_channels={self.in_channels}, factor={self.factor}")
