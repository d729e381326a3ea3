"""Cross-spatial learning of EMA (arXiv 2305.13563)."""

import torch
from torch import Tensor

from rfa_mmdet.ops.precision import at_least_float32, no_autocast


def cross_spatial_gate(x1: Tensor, x2: Tensor) -> Tensor:
    """Let the channel distribution of each branch weigh the positions of the other.

    Args:
        x1 (Tensor): (N, c, H, W).
        x2 (Tensor): (N, c, H, W).

    Returns:
        Tensor: (N, 1, H, W) in (0, 1), at least float32.

    Example:
        >>> gate = cross_spatial_gate(torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 5))
        >>> gate.shape, bool((gate == 0.5).all())
        (torch.Size([2, 1, 3, 5]), True)
    """
    with no_autocast(x1):
        x1, x2 = at_least_float32(x1), at_least_float32(x2)
        p1 = torch.softmax(x1.mean((2, 3)), dim=1)  # (N, c)
        p2 = torch.softmax(x2.mean((2, 3)), dim=1)
        # (N, 1, c) @ (N, c, H * W)
        score = p1.unsqueeze(1) @ x2.flatten(2) + p2.unsqueeze(1) @ x1.flatten(2)
        return torch.sigmoid(score).unflatten(2, x1.shape[2:])
