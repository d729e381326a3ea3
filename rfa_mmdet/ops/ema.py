"""Cross-spatial learning of EMA (arXiv 2305.13563)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.convolution import same_conv
from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.recompute import is_recorded
from rfa_mmdet.ops.common.reductions import mean


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
    x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Weigh rows and columns of every channel by a 1x1 convolution of their means.

    Args:
        x (Tensor): (N, c, H, W).
        weight, bias (Tensor): (c, c, 1, 1) and (c,).
        size (tuple[int, int]): (H, W). Of ``x`` itself they would be constants to an exporter.

    Returns:
        tuple[Tensor, Tensor]: (N, c, H, 1) and (N, c, 1, W) in (0, 1), in x's dtype.

    Example:
        >>> layer = torch.rand(4, 4, 1, 1), torch.rand(4)
        >>> gates = row_and_column_gates(torch.rand(2, 4, 3, 5), *layer, (3, 5))
        >>> [tuple(gate.shape) for gate in gates]
        [(2, 4, 3, 1), (2, 4, 1, 5)]
    """
    with no_autocast(x):
        rows, columns = mean(x, 3, weight.dtype), mean(x, 2, weight.dtype)
        gates = F.conv2d(torch.cat([rows, columns], dim=2).unsqueeze(3), weight, bias).squeeze(3)
    gates = torch.sigmoid(at_least_float32(gates)).to(x.dtype)
    row_gate, column_gate = gates.split(list(size), dim=2)
    return row_gate.unsqueeze(3), column_gate.unsqueeze(2)


def ema_gate(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    size: tuple[int, int],
) -> tuple[Tensor]:
    """Weigh every cell of a group of channels.

    Args:
        x (Tensor): (N, c, H, W), a group of channels.
        weight1, bias1 (Tensor): (c, c, 1, 1) and (c,), of the gates of rows and columns.
        weight3, bias3 (Tensor): (c, c, 3, 3) and (c,), of the second branch.
        scale, shift (Tensor): (c,), of the norm of the first branch.
        eps (float): Its epsilon.
        size (tuple[int, int]): (H, W), as of :func:`row_and_column_gates`.

    Returns:
        tuple[Tensor]: (N, 1, H, W) in (0, 1), in x's dtype.

    Example:
        >>> convs = (torch.rand(4, *rest) for rest in ((4, 1, 1), (), (4, 3, 3), ()))
        >>> x, norm = torch.rand(2, 4, 3, 5), (torch.ones(4), torch.zeros(4))
        >>> ema_gate(x, *convs, *norm, eps=1e-5, size=(3, 5))[0].shape
        torch.Size([2, 1, 3, 5])
    """
    row_gate, column_gate = row_and_column_gates(x, weight1, bias1, size)
    x1 = F.group_norm(x * row_gate * column_gate, len(scale), scale, shift, eps)
    x2 = same_conv(x, weight3, bias3)
    # The norm left each channel the mean that it adds: no map is read for it. In a graph it is, as
    # FLOPs are counted there by the formula.
    means1 = at_least_float32(x1).mean((2, 3)) if is_recorded() else shift[None]
    return (cross_spatial_gate(x1, x2, means1).to(x.dtype),)
