"""CoordAtt: coordinate attention.

Paper: "Coordinate Attention for Efficient Mobile Network Design", arXiv 2103.02907. Plain means
stand for adaptive pooling; gates are float32 under mixed precision.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.ops.precision import at_least_float32, no_autocast

MIN_HIDDEN = 8


@MODELS.register_module()
class CoordAtt(nn.Module):
    """Coordinate attention: weighs rows and columns of every channel; keeps the shape.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        reduction (int): The hidden width is C // reduction, at least 8. Defaults to 32.

    Raises:
        TypeError, ValueError: An argument or the input is not as above.

    Example:
        >>> from mmcv.cnn import build_plugin_layer
        >>> name, coord_att = build_plugin_layer(dict(type="CoordAtt"), in_channels=64)
        >>> name, coord_att(torch.rand(2, 64, 7, 9)).shape
        ('coord_att', torch.Size([2, 64, 7, 9]))
    """

    _abbr_ = "coord_att"

    def __init__(self, in_channels: int, reduction: int = 32) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        hidden = max(MIN_HIDDEN, in_channels // positive_int("reduction", reduction))
        self.conv1 = nn.Conv2d(in_channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act = nn.Hardswish()
        self.conv_h = nn.Conv2d(hidden, in_channels, 1)
        self.conv_w = nn.Conv2d(hidden, in_channels, 1)

    def gates(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of rows and of columns.

        Args:
            rows (Tensor): (B, C, H), the mean of each row.
            columns (Tensor): (B, C, W), the mean of each column.

        Returns:
            tuple[Tensor, Tensor]: (B, C, H) and (B, C, W), at least float32.
        """
        with no_autocast(rows):
            both = torch.cat([rows, columns], dim=2).unsqueeze(3)  # (B, C, H + W, 1)
            hidden = self.act(self.bn1(self.conv1(both.to(self.conv1.weight.dtype))))
            of_rows, of_columns = hidden.split([rows.shape[2], columns.shape[2]], dim=2)
            scores = self.conv_h(of_rows).squeeze(3), self.conv_w(of_columns).squeeze(3)
        row_gate, column_gate = (torch.sigmoid(at_least_float32(s)) for s in scores)
        return row_gate, column_gate

    def forward(self, x: Tensor) -> Tensor:
        """Weigh rows and columns.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("CoordAtt", x, self.in_channels)
        dtype = self.conv1.weight.dtype
        row_gate, column_gate = self.gates(x.mean(3, dtype=dtype), x.mean(2, dtype=dtype))
        return x * column_gate.unsqueeze(2).to(x.dtype) * row_gate.unsqueeze(3).to(x.dtype)
