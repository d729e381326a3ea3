"""Parameter-free parts of confident attention, ConAM (arXiv 2110.14369)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def patch_means(x: Tensor, patch_size: int) -> Tensor:
    """Means over non-overlapping patches; those at the border are means over real pixels only.

    Args:
        x (Tensor): (B, C, H, W).
        patch_size (int): Side s of a patch, in cells.

    Returns:
        Tensor: (B, C, ceil(H / s), ceil(W / s)).

    Example:
        >>> patch_means(torch.ones(1, 2, 5, 7), 3).unique()
        tensor([1.])
    """
    # Floor mode over s - 1 more zeros is ceil mode, whose size does not export.
    padding = (0, patch_size - 1, 0, patch_size - 1)
    real = F.pad(torch.ones_like(x[:1, :1]), padding)
    return F.avg_pool2d(F.pad(x, padding), patch_size) / F.avg_pool2d(real, patch_size)


def patch_confidence(local: Tensor, whole: Tensor) -> Tensor:
    """Softmax over patches of each patch's dot product with the vector of the whole map.

    Args:
        local (Tensor): (B, P, C), a vector a patch.
        whole (Tensor): (B, C), the vector of the map.

    Returns:
        Tensor: (B, P), sums to 1 over P.

    Example:
        >>> patch_confidence(torch.zeros(1, 4, 8), torch.zeros(1, 8))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return torch.softmax((local @ whole.unsqueeze(2)).squeeze(2), dim=1)


def spread_patches(value: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Give every cell the value of its patch.

    Args:
        value (Tensor): (B, ceil(H / s), ceil(W / s)).
        patch_size (int): Side s of a patch.
        size (tuple[int, int]): (H, W).

    Returns:
        Tensor: (B, 1, H, W).

    Example:
        >>> spread_patches(torch.tensor([[[1., 2.]]]), 2, (2, 3))
        tensor([[[[1., 1., 2.],
                  [1., 1., 2.]]]])
    """
    rows, columns = (torch.arange(n, device=value.device) // patch_size for n in size)
    return value[:, None, rows][..., columns]
