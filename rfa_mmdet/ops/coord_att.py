"""Gates of coordinate attention (arXiv 2103.02907)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast


def coordinate_gates(
    rows: Tensor,
    columns: Tensor,
    norm: Callable[[Tensor], Tensor],
    weight: Tensor,
    bias: Tensor,
    row_weight: Tensor,
    row_bias: Tensor,
    column_weight: Tensor,
    column_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weigh rows and columns of every channel by all of their means.

    Args:
        rows (Tensor): (B, C, H), the mean of each row.
        columns (Tensor): (B, C, W), the mean of each column.
        norm (Callable): Normalises (B, m, H + W, 1).
        weight, bias (Tensor): (m, C, 1, 1) and (m,), of the shared layer.
        row_weight, row_bias (Tensor): (C, m, 1, 1) and (C,), of the layer behind it for rows.
        column_weight, column_bias (Tensor): Likewise, for columns.

    Returns:
        tuple[Tensor, Tensor]: (B, C, H) and (B, C, W) in (0, 1), at least float32.

    Example:
        >>> shared, second = (torch.rand(8, 4, 1, 1), torch.rand(8)), (torch.rand(4, 8, 1, 1), None)
        >>> means = torch.rand(2, 4, 3), torch.rand(2, 4, 5)
        >>> gates = coordinate_gates(*means, torch.nn.Identity(), *shared, *second, *second)
        >>> [tuple(gate.shape) for gate in gates]
        [(2, 4, 3), (2, 4, 5)]
    """
    with no_autocast(rows):
        both = torch.cat([rows, columns], dim=2).unsqueeze(3)  # (B, C, H + W, 1)
        hidden = F.hardswish(norm(F.conv2d(both.to(weight.dtype), weight, bias)))
        hidden_rows, hidden_columns = hidden.split([rows.shape[2], columns.shape[2]], dim=2)
        row_score = F.conv2d(hidden_rows, row_weight, row_bias).squeeze(3)
        column_score = F.conv2d(hidden_columns, column_weight, column_bias).squeeze(3)
    row_gate = torch.sigmoid(at_least_float32(row_score))
    column_gate = torch.sigmoid(at_least_float32(column_score))
    return row_gate, column_gate
