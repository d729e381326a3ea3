"""CoordAtt: coordinate attention.

Paper: "Coordinate Attention for Efficient Mobile Network Design", arXiv 2103.02907. Plain means
stand for adaptive pooling; gates are float32 under mixed precision.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.layers.untouched import are_plain, dtype_of, is_plain_conv
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.common.recompute import recomputes
from rfa_mmdet.ops.common.scale import scaled
from rfa_mmdet.ops.coord_att import coordinate_gates, weigh_by_coordinates

MIN_HIDDEN = 8


@MODELS.register_module()
class CoordAtt(Plugin):
    """Coordinate attention: weighs rows and columns of every channel; keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int): The hidden width is C // reduction, at least 8. Defaults to 32.
        start (str): 'paper', or behind trained layers 'identity': the last convolutions start at
            zero, so the gates of rows and of columns at 1/2, and the output is multiplied by 4
            (``output_scale``), in testing too. See
            :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`. Defaults to 'paper'.

    Raises:
        TypeError, ValueError: An argument or the input is not as above.

    Example:
        >>> import torch
        >>> from mmcv.cnn import build_plugin_layer
        >>> name, coord_att = build_plugin_layer(dict(type="CoordAtt"), in_channels=64)
        >>> name, coord_att(torch.rand(2, 64, 7, 9)).shape
        ('coord_att', torch.Size([2, 64, 7, 9]))
    """

    _abbr_ = "coord_att"

    def __init__(self, in_channels: int, reduction: int = 32, start: PluginStart = "paper") -> None:
        super().__init__()
        in_channels = self.in_channels = positive_int("in_channels", in_channels)
        hidden = max(MIN_HIDDEN, in_channels // positive_int("reduction", reduction))
        self.conv1 = nn.Conv2d(in_channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act = nn.Hardswish()
        self.conv_h = nn.Conv2d(hidden, in_channels, 1)
        self.conv_w = nn.Conv2d(hidden, in_channels, 1)
        self.start_as(start)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return values under which the gates of rows and of columns are 1/2."""
        names = [f"{conv}.{name}" for conv in ("conv_h", "conv_w") for name in ("weight", "bias")]
        return self._zeros(*names), 1 / 4

    def gates(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of rows and of columns.

        Args:
            rows (Tensor): (B, C, H), the mean of each row.
            columns (Tensor): (B, C, W), the mean of each column.

        Returns:
            tuple[Tensor, Tensor]: (B, C, H) and (B, C, W), at least float32.
        """

        def shared(means: Tensor) -> Tensor:
            hidden: Tensor = self.act(self.bn1(self.conv1(means)))
            return hidden

        dtype = dtype_of(self.conv1, rows)
        return coordinate_gates(rows, columns, shared, self.conv_h, self.conv_w, dtype)

    def _gates_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of rows, (B, C, H, 1), and of columns, (B, C, 1, W), of a map."""
        dtype = dtype_of(self.conv1, x)
        rows, columns = self.gates(x.mean(3, dtype=dtype), x.mean(2, dtype=dtype))
        return rows.unsqueeze(3), columns.unsqueeze(2)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights of rows and columns, multiplied, to be looked at.

        Args:
            x (Tensor): (B, C, H, W), the layer's input.

        Returns:
            Tensor: (B, C, H, W) in (0, 1).
        """
        check_feature_map("CoordAtt", x, self.in_channels)
        rows, columns = self._gates_of(x)
        return (rows * columns).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh rows and columns.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("CoordAtt", x, self.in_channels)
        convs, bn = (self.conv1, self.conv_h, self.conv_w), self.bn1
        # SyncBatchNorm is called: to compute it once more would be to talk once more.
        plain = are_plain(nn.BatchNorm2d, bn) and all(
            is_plain_conv(conv, (1, 1), bias=True) for conv in convs
        )
        # What torch has for a batch norm's gradient divides by the batch's size.
        if not (recomputes() and plain and are_plain(nn.Hardswish, self.act) and len(x)):
            rows, columns = self._gates_of(x)
            return x * columns.to(x.dtype) * scaled(rows, self.output_scale).to(x.dtype)
        weights = [
            weight
            for module in (self.conv1, bn, self.conv_h, self.conv_w)
            for weight in (module.weight, module.bias)
        ]
        held = () if bn.training or bn.running_mean is None else (bn.running_mean, bn.running_var)
        return weigh_by_coordinates(x, bn, bn.eps, *weights, *held, scale=self.output_scale)


class CoordinateGates(CoordAtt):
    """The weights of rows and columns alone, as a part of another layer."""

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:  # type: ignore[override]
        """Return what :meth:`gates` does, side by side: (B, C, H + W)."""
        return torch.cat(self.gates(rows, columns), dim=2)
