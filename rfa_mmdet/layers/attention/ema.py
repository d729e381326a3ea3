"""EMA: efficient multi-scale attention with cross-spatial learning.

Paper: "Efficient Multi-Scale Attention Module with Cross-Spatial Learning", arXiv 2305.13563.

Differences from the published code: ``factor`` is checked when the layer is built (there, a reshape
fails in the first forward pass), plain means replace adaptive pooling (the same values, but they
export with dynamic sizes), and gates are float32 under mixed precision. The parameter names are the
published ones.
"""

from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.layers.untouched import are_plain, dtype_of, is_plain_conv
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.common.recompute import is_recorded
from rfa_mmdet.ops.common.scale import scaled
from rfa_mmdet.ops.ema import apply_ema_gate, ema_gate


@MODELS.register_module()
class EMA(Plugin):
    """Efficient multi-scale attention. Keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        factor (int): Number of channel groups; must divide ``in_channels``. Defaults to 32.
        start (str): 'paper', or 'identity' for use after trained layers: weight and bias of the
            norm and of the 3x3 convolution start at zero, so every gate is 1/2, and the output is
            always multiplied by 2 (``output_scale``). See
            :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`. Defaults to 'paper'.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

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
        """Return parameter values that make every gate 1/2."""
        names = [f"{module}.{name}" for module in ("gn", "conv3x3") for name in ("weight", "bias")]
        return self._zeros(*names), 1 / 2

    def forward(self, x: Tensor) -> Tensor:
        """Apply the spatial weights of each channel group.

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
                weighted = apply_ema_gate(groups, *weights, eps=gn.eps, scale=self.output_scale)
                return self._joined(weighted)
        return self._joined(groups * scaled(self._gate(groups, x), self.output_scale))

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the spatial weights, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W) in (0, 1), the same for all channels of a group.
        """
        check_feature_map("EMA", x, self.in_channels)
        groups = self._groups(x)
        return self._joined(self._gate(groups, x).expand_as(groups))

    def _groups(self, x: Tensor) -> Tensor:
        """Reshape (B, C, H, W) to (B * factor, c, H, W)."""
        groups: Tensor = x.unflatten(1, (self.factor, -1)).flatten(0, 1)
        return groups

    def _joined(self, groups: Tensor) -> Tensor:
        """Reshape (B * factor, c, H, W) to (B, C, H, W)."""
        joined: Tensor = groups.unflatten(0, (-1, self.factor)).flatten(1, 2)
        return joined

    def _gate(self, groups: Tensor, x: Tensor) -> Tensor:
        """Return the spatial weights of the groups, (B * factor, 1, H, W)."""
        dtype, size = dtype_of(self.conv1x1, x), (x.shape[2], x.shape[3])
        return ema_gate(groups, self.conv1x1, self.conv3x3, self.gn, dtype, size)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return self._with_start(f"in_channels={self.in_channels}, factor={self.factor}")
