"""Gates of coordinate attention (arXiv 2103.02907)."""

from collections.abc import Callable

import torch
from torch import Tensor

from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast


def coordinate_gates(
    rows: Tensor,
    columns: Tensor,
    shared: Callable[[Tensor], Tensor],
    of_rows: Callable[[Tensor], Tensor],
    of_columns: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weigh rows and columns of every channel by all of their means.

    Args:
        rows (Tensor): (B, C, H), the mean of each row.
        columns (Tensor): (B, C, W), the mean of each column.
        shared (Callable): Takes (B, C, H + W, 1), both, to (B, m, H + W, 1).
        of_rows (Callable): Takes the part of the rows, (B, m, H, 1), to (B, C, H, 1).
        of_columns (Callable): Likewise, for columns.
        dtype (torch.dtype): That ``shared`` takes.

    Returns:
        tuple[Tensor, Tensor]: (B, C, H) and (B, C, W) in (0, 1), at least float32.

    Example:
        >>> layers = torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(8, 4, 1)
        >>> means = torch.rand(2, 4, 3), torch.rand(2, 4, 5)
        >>> gates = coordinate_gates(*means, *layers, torch.float32)
        >>> [tuple(gate.shape) for gate in gates]
        [(2, 4, 3), (2, 4, 5)]
    """
    with no_autocast(rows):
        both = torch.cat([rows, columns], dim=2).unsqueeze(3)  # (B, C, H + W, 1)
        hidden = shared(both.to(dtype))
        hidden_rows, hidden_columns = hidden.split([rows.shape[2], columns.shape[2]], dim=2)
        row_score = of_rows(hidden_rows).squeeze(3)
        column_score = of_columns(hidden_columns).squeeze(3)
    row_gate = torch.sigmoid(at_least_float32(row_score))
    column_gate = torch.sigmoid(at_least_float32(column_score))
    return row_gate, column_gate
