"""Cross-spatial learning of EMA (arXiv 2305.13563)."""

from collections.abc import Callable

import torch
from torch import Tensor

from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.reductions import mean

Layer = Callable[[Tensor], Tensor]


def cross_spatial_gate(x1: Tensor, x2: Tensor, means1: Tensor) -> Tensor:
    """Let the channel distribution of each branch weigh the positions of the other.

    Args:
        x1 (Tensor): (N, c, H, W).
        x2 (Tensor): (N, c, H, W).
        means1 (Tensor): (N, c), the means of x1's channels; (1, c) where those of all N are one.

    Returns:
        Tensor: (N, 1, H, W) in (0, 1), at least float32.

    Example:
        >>> x = torch.zeros(2, 4, 3, 5)
        >>> gate = cross_spatial_gate(x, x, torch.zeros(1, 4))
        >>> gate.shape, bool((gate == 0.5).all())
        (torch.Size([2, 1, 3, 5]), True)
    """
    with no_autocast(x1):
        x1, x2 = at_least_float32(x1), at_least_float32(x2)
        p1 = torch.softmax(means1.to(x1.dtype), dim=1).unsqueeze(1)
        p2 = torch.softmax(mean(x2, (2, 3), x2.dtype), dim=1).unsqueeze(1)
        score = p1 @ x2.flatten(2) + p2 @ x1.flatten(2)  # (N, 1, c) @ (N, c, H * W)
        gate: Tensor = torch.sigmoid(score).unflatten(2, x1.shape[2:])
        return gate


def row_and_column_gates(
    x: Tensor, conv: Layer, dtype: torch.dtype, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Weigh rows and columns of every channel by a 1x1 convolution of their means.

    Args:
        x (Tensor): (N, c, H, W).
        conv (Callable): 1x1, of (N, c, H + W, 1).
        dtype (torch.dtype): That it takes.
        size (tuple[int, int]): (H, W). Of ``x`` itself they would be constants to an exporter.

    Returns:
        tuple[Tensor, Tensor]: (N, c, H, 1) and (N, c, 1, W) in (0, 1), in x's dtype.

    Example:
        >>> conv = torch.nn.Conv2d(4, 4, 1)
        >>> gates = row_and_column_gates(torch.rand(2, 4, 3, 5), conv, torch.float32, (3, 5))
        >>> [tuple(gate.shape) for gate in gates]
        [(2, 4, 3, 1), (2, 4, 1, 5)]
    """
    with no_autocast(x):
        rows, columns = mean(x, 3, dtype), mean(x, 2, dtype)
        gates = conv(torch.cat([rows, columns], dim=2).unsqueeze(3)).squeeze(3)
    gates = torch.sigmoid(at_least_float32(gates)).to(x.dtype)
    row_gate, column_gate = gates.split(list(size), dim=2)
    return row_gate.unsqueeze(3), column_gate.unsqueeze(2)


def ema_gate(
    x: Tensor,
    conv1: Layer,
    conv3: Layer,
    norm: Layer,
    dtype: torch.dtype,
    size: tuple[int, int],
    norm_means: Tensor | None = None,
) -> tuple[Tensor]:
    """Weigh every cell of a group of channels.

    Args:
        x (Tensor): (N, c, H, W), a group of channels.
        conv1 (Callable): 1x1, of the gates of rows and columns.
        conv3 (Callable): 3x3, the second branch.
        norm (Callable): Of the first branch.
        dtype, size: As of :func:`row_and_column_gates`.
        norm_means (Tensor | None): (c,), the mean that the norm leaves each channel, where it is
            known: no map is read for it then.

    Returns:
        tuple[Tensor]: (N, 1, H, W) in (0, 1), in x's dtype.

    Example:
        >>> convs = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 3, padding=1)
        >>> x, norm = torch.rand(2, 4, 3, 5), torch.nn.GroupNorm(4, 4)
        >>> ema_gate(x, *convs, norm, torch.float32, (3, 5))[0].shape
        torch.Size([2, 1, 3, 5])
    """
    row_gate, column_gate = row_and_column_gates(x, conv1, dtype, size)
    x1, x2 = norm(x * row_gate * column_gate), conv3(x)
    means1 = at_least_float32(x1).mean((2, 3)) if norm_means is None else norm_means[None]
    return (cross_spatial_gate(x1, x2, means1).to(x.dtype),)
