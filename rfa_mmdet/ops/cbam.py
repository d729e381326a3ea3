"""Gates of CBAM (arXiv 1807.06521)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.precision import at_least_float32, no_autocast


def channel_pools(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return maximum and mean of each channel.

    Args:
        x (Tensor): (B, C, H, W).
        dtype (torch.dtype): Of the result.

    Returns:
        tuple[Tensor, Tensor]: (B, C, 1, 1) each.

    Example:
        >>> channel_pools(torch.arange(3.).reshape(1, 1, 1, 3), torch.float32)
        (tensor([[[[2.]]]]), tensor([[[[1.]]]]))
    """
    return x.amax((2, 3), keepdim=True).to(dtype), x.mean((2, 3), keepdim=True, dtype=dtype)


def channel_gate(maxima: Tensor, means: Tensor, squeeze: Tensor, excite: Tensor) -> Tensor:
    """Weigh the channels, by one MLP on their maxima and on their means.

    Args:
        maxima, means (Tensor): (B, C, 1, 1).
        squeeze (Tensor): (hidden, C, 1, 1), first layer of the MLP.
        excite (Tensor): (C, hidden, 1, 1), its second.

    Returns:
        Tensor: (B, C, 1, 1) in (0, 1), at least float32.

    Example:
        >>> pools = channel_pools(torch.rand(2, 8, 3, 5), torch.float32)
        >>> channel_gate(*pools, torch.rand(4, 8, 1, 1), torch.zeros(8, 4, 1, 1)).unique()
        tensor([0.5000])
    """
    with no_autocast(maxima):
        of_maxima, of_means = (
            F.conv2d(torch.relu(F.conv2d(pool, squeeze)), excite) for pool in (maxima, means)
        )
        return torch.sigmoid(at_least_float32(of_maxima + of_means))


def spatial_gate(x: Tensor, weight: Tensor) -> Tensor:
    """Weigh the cells, by a convolution of the maxima and the means over the channels.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (1, 2, k, k), k odd.

    Returns:
        Tensor: (B, 1, H, W) in (0, 1), in x's dtype.

    Example:
        >>> spatial_gate(torch.rand(2, 8, 3, 5), torch.rand(1, 2, 7, 7)).shape
        torch.Size([2, 1, 3, 5])
    """
    with no_autocast(x):
        maxima = x.amax(1, keepdim=True).to(weight.dtype)
        means = x.mean(1, keepdim=True, dtype=weight.dtype)
        score = F.conv2d(torch.cat([maxima, means], dim=1), weight, padding=weight.shape[2] // 2)
        return torch.sigmoid(at_least_float32(score)).to(x.dtype)


def cbam_gates(
    x: Tensor, maxima: Tensor, means: Tensor, squeeze: Tensor, excite: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Weigh the channels, and then the cells of what the channels have become.

    Args:
        x (Tensor): (B, C, H, W).
        maxima, means (Tensor): (B, C, 1, 1), of x's channels.
        squeeze, excite (Tensor): As of :func:`channel_gate`.
        weight (Tensor): As of :func:`spatial_gate`.

    Returns:
        tuple[Tensor, Tensor]: (B, C, 1, 1) and (B, 1, H, W), in x's dtype.

    Example:
        >>> x = torch.rand(4, 8, 3, 5)
        >>> weights = torch.rand(2, 8, 1, 1), torch.rand(8, 2, 1, 1), torch.rand(1, 2, 7, 7)
        >>> gates = cbam_gates(x, *channel_pools(x, x.dtype), *weights)
        >>> [tuple(gate.shape) for gate in gates]
        [(4, 8, 1, 1), (4, 1, 3, 5)]
    """
    channel = channel_gate(maxima, means, squeeze, excite).to(x.dtype)
    return channel, spatial_gate(x * channel, weight)
