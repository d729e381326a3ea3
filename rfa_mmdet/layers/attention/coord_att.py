"""CoordAtt: coordinate attention.

Paper: "Coordinate Attention for Efficient Mobile Network Design", arXiv 2103.02907. Plain means
stand for adaptive pooling; gates are float32 under mixed precision.
"""

from collections.abc import Callable

from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_mmdet.layers.arguments import check_feature_map, positive_int
from rfa_mmdet.ops.common.recompute import weigh
from rfa_mmdet.ops.coord_att import coordinate_gates

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
        >>> import torch
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
        return coordinate_gates(rows, columns, self.bn1, *self._weights())

    def _weights(self) -> tuple[Tensor, ...]:
        convs = (self.conv1, self.conv_h, self.conv_w)
        return tuple(parameter for conv in convs for parameter in conv.parameters())

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the weights of rows and columns, multiplied, to be looked at.

        Args:
            x (Tensor): (B, C, H, W), the layer's input.

        Returns:
            Tensor: (B, C, H, W) in (0, 1).
        """
        check_feature_map("CoordAtt", x, self.in_channels)
        dtype = self.conv1.weight.dtype
        rows, columns = self.gates(x.mean(3, dtype=dtype), x.mean(2, dtype=dtype))
        return (rows.unsqueeze(3) * columns.unsqueeze(2)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh rows and columns.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).
        """
        check_feature_map("CoordAtt", x, self.in_channels)
        bn, weights = self.bn1, self._weights()
        means = x.mean(3, dtype=weights[0].dtype), x.mean(2, dtype=weights[0].dtype)

        def spread(norm: Callable[[Tensor], Tensor], *given: Tensor) -> tuple[Tensor, Tensor]:
            rows, columns, *parameters = given
            row_gate, column_gate = coordinate_gates(rows, columns, norm, *parameters)
            return column_gate.unsqueeze(2).to(x.dtype), row_gate.unsqueeze(3).to(x.dtype)

        def first(*_: Tensor) -> tuple[Tensor, Tensor]:
            return spread(bn, *means, *weights)

        if type(bn) is not nn.BatchNorm2d:  # SyncBatchNorm: once more would be to talk once more
            column_gate, row_gate = first()
            return x * column_gate * row_gate
        held = () if bn.training or bn.running_mean is None else (bn.running_mean, bn.running_var)

        def again(_: Tensor, scale: Tensor, shift: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            mean, var = given[8:] or (None, None)  # None: of the batch, not counted again

            def norm(z: Tensor) -> Tensor:
                return F.batch_norm(z, mean, var, scale, shift, not held, 0.0, bn.eps)

            return spread(norm, *given[:8])

        return weigh(x, again, bn.weight, bn.bias, *means, *weights, *held, first=first)
