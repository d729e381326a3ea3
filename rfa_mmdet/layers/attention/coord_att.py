"""CoordAtt: coordinate attention.

Paper: "Coordinate Attention for Efficient Mobile Network Design", arXiv 2103.02907. Plain means
replace adaptive pooling; gates are float32 under mixed precision.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.layers.untouched import are_plain, dtype_of, is_plain_conv
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.common.recompute import recomputes
from rfa_mmdet.ops.common.scale import scaled
from rfa_mmdet.ops.coord_att import apply_coordinate_gates, coordinate_gates

MIN_HIDDEN = 8


@MODELS.register_module()
class CoordAtt(Plugin):
    """Coordinate attention: weights the rows and columns of every channel. Keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int): The hidden width is C // reduction, at least 8. Defaults to 32.
        start (str): 'paper', or 'identity' for use after trained layers: the last convolutions
            start at zero, so the row and column gates are 1/2, and the output is always multiplied
            by 4 (``output_scale``). See :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`.
            Defaults to 'paper'.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

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
        """Return parameter values that make the row and column gates 1/2."""
        names = [f"{conv}.{name}" for conv in ("conv_h", "conv_w") for name in ("weight", "bias")]
        return self._zeros(*names), 1 / 4

    def gates(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of rows and columns.

        Args:
            rows (Tensor): The mean of each row, (B, C, H).
            columns (Tensor): The mean of each column, (B, C, W).

        Returns:
            tuple[Tensor, Tensor]: (B, C, H) and (B, C, W), at least float32.
        """

        def shared(means: Tensor) -> Tensor:
            hidden: Tensor = self.act(self.bn1(self.conv1(means)))
            return hidden

        dtype = dtype_of(self.conv1, rows)
        return coordinate_gates(rows, columns, shared, self.conv_h, self.conv_w, dtype)

    def _gates_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a map's row weights, (B, C, H, 1), and column weights, (B, C, 1, W)."""
        dtype = dtype_of(self.conv1, x)
        rows, columns = self.gates(x.mean(3, dtype=dtype), x.mean(2, dtype=dtype))
        return rows.unsqueeze(3), columns.unsqueeze(2)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the product of row and column weights, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W) in (0, 1).
        """
        check_feature_map("CoordAtt", x, self.in_channels)
        rows, columns = self._gates_of(x)
        return (rows * columns).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the row and column weights.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("CoordAtt", x, self.in_channels)
        convs, bn = (self.conv1, self.conv_h, self.conv_w), self.bn1
        # SyncBatchNorm must be called: recomputing it would communicate again.
        plain = are_plain(nn.BatchNorm2d, bn) and all(
            is_plain_conv(conv, (1, 1), bias=True) for conv in convs
        )
        # torch's gradient of batch norm divides by the batch size, so it must not be 0.
        if not (recomputes() and plain and are_plain(nn.Hardswish, self.act) and len(x)):
            rows, columns = self._gates_of(x)
            return x * columns.to(x.dtype) * scaled(rows, self.output_scale).to(x.dtype)
        weights = [
            weight
            for module in (self.conv1, bn, self.conv_h, self.conv_w)
            for weight in (module.weight, module.bias)
        ]
        held = () if bn.training or bn.running_mean is None else (bn.running_mean, bn.running_var)
        return apply_coordinate_gates(x, bn, bn.eps, *weights, *held, scale=self.output_scale)


class CoordinateGates(CoordAtt):
    """Only the weights of rows and columns, as a part of another layer."""

    def forward(self, rows: Tensor, columns: Tensor) -> Tensor:  # type: ignore[override]
        """Return the result of :meth:`gates`, concatenated: (B, C, H + W)."""
        return torch.cat(self.gates(rows, columns), dim=2)
