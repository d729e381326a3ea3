"""Parameter-free parts of confidence attention, ConAM (arXiv 2110.14369)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.recompute import is_recorded


def patch_means(x: Tensor, patch_size: int) -> Tensor:
    """Return the means of non-overlapping patches; at the border, over real pixels only.

    Args:
        x (Tensor): (B, C, H, W).
        patch_size (int): Side s of a patch.

    Returns:
        Tensor: (B, C, ceil(H / s), ceil(W / s)).

    Example:
        >>> patch_means(torch.ones(1, 2, 5, 7), 3).unique()
        tensor([1.])
    """
    if not is_recorded():
        return F.avg_pool2d(x, patch_size, ceil_mode=True, count_include_pad=False)
    # Floor mode with s - 1 more zeros equals ceil mode, whose size does not export.
    padding = (0, patch_size - 1, 0, patch_size - 1)
    real = F.pad(torch.ones_like(x[:1, :1]), padding)
    return F.avg_pool2d(F.pad(x, padding), patch_size) / F.avg_pool2d(real, patch_size)


def map_means(local: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Return the means of the map from those of its patches, without reading the map again.

    Args:
        local (Tensor): Returned by :func:`patch_means`, (B, C, rows, columns).
        patch_size (int): Side s of a patch.
        size (tuple[int, int]): (H, W) of the map.

    Returns:
        Tensor: (B, C).

    Example:
        >>> x = torch.rand(1, 2, 5, 7)
        >>> torch.allclose(map_means(patch_means(x, 3), 3, (5, 7)), x.mean((2, 3)))
        True
    """
    # Share of the map in each patch.
    rows, columns = [
        (n - patch_size * torch.arange(count).to(local)).clamp(max=patch_size) / n
        for n, count in zip(size, local.shape[2:])  # noqa: B905
    ]
    return (local * torch.outer(rows, columns)).sum((2, 3))


def patch_confidence(local: Tensor, whole: Tensor) -> Tensor:
    """Return the softmax over patches of their dot products with the vector of the map.

    Args:
        local (Tensor): Vectors of the patches, (B, P, C).
        whole (Tensor): Vector of the map, (B, C).

    Returns:
        Tensor: (B, P); sums to 1 over P.

    Example:
        >>> patch_confidence(torch.zeros(1, 4, 8), torch.zeros(1, 8))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return torch.softmax((local @ whole.unsqueeze(2)).squeeze(2), dim=1)


def spread_patches(value: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Give every position the value of its patch.

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
    if is_recorded():  # sizes of an indexing operation export, those of a repetition do not
        rows, columns = [torch.arange(n, device=value.device) // patch_size for n in size]
        return value[:, None, rows][..., columns]
    value = value.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return value[:, None, : size[0], : size[1]]


def confidence_gate(
    x: Tensor,
    patch_size: int,
    scale_by_patches: bool,
    mlp: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Return the confidence of each patch of a map, at every position.

    Args:
        x (Tensor): (B, C, H, W).
        patch_size (int): Side of a patch.
        scale_by_patches (bool): Whether the mean over patches is 1, rather than the sum.
        mlp (Callable): The shared MLP; takes the vectors of the patches, (B, P, C), and of the map,
            (B, C).

    Returns:
        Tensor: (B, 1, H, W), in x's dtype.

    Example:
        >>> confidence_gate(torch.ones(1, 8, 4, 4), 2, False, lambda *both: both).unique()
        tensor([0.2500])
    """
    with no_autocast(x):
        values = at_least_float32(x)
        local = patch_means(values, patch_size)  # (B, C, rows, columns)
        if is_recorded():  # so FLOP counters see the formula
            means = values.mean((2, 3))
        else:
            means = map_means(local, patch_size, (x.shape[2], x.shape[3]))
        confidence = patch_confidence(*mlp(local.flatten(2).transpose(1, 2), means))
        if scale_by_patches:
            confidence = confidence * confidence.shape[1]
        confidence = confidence.reshape(-1, *local.shape[2:])  # (B, rows, columns)
    return spread_patches(confidence, patch_size, (x.shape[2], x.shape[3])).to(x.dtype)
