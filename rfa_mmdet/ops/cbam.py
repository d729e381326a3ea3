"""Gates of CBAM (arXiv 1807.06521)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rfa_mmdet.ops.common.convolution import same_conv_gradients
from rfa_mmdet.ops.common.precision import at_least_float32, compute_dtype, no_autocast
from rfa_mmdet.ops.common.recompute import is_recorded, recomputes
from rfa_mmdet.ops.common.reductions import shares_of_maximum
from rfa_mmdet.ops.common.scale import scaled


def channel_gate(maxima: Tensor, means: Tensor, squeeze: Tensor, excite: Tensor) -> Tensor:
    """Return the channel weights, from a shared MLP on the channels' maxima and means.

    Args:
        maxima, means (Tensor): (B, C, 1, 1).
        squeeze (Tensor): First layer of the MLP, (hidden, C, 1, 1).
        excite (Tensor): Second layer of the MLP, (C, hidden, 1, 1).

    Returns:
        Tensor: (B, C, 1, 1) in (0, 1), at least float32.

    Example:
        >>> layers = torch.rand(4, 8, 1, 1), torch.zeros(8, 4, 1, 1)
        >>> channel_gate(*torch.rand(2, 2, 8, 1, 1), *layers).unique()
        tensor([0.5000])
    """
    with no_autocast(maxima):
        # As matrix products: convolutions of single positions take three times longer.
        first, second = squeeze.flatten(1), excite.flatten(1)
        max_score, mean_score = [
            F.linear(torch.relu(F.linear(pool.flatten(1), first)), second)
            for pool in (maxima, means)
        ]
        return torch.sigmoid(at_least_float32(max_score + mean_score))[:, :, None, None]


def spatial_pools(x: Tensor) -> Tensor:
    """Return the maxima and means over the channels.

    Args:
        x (Tensor): (B, C, H, W).

    Returns:
        Tensor: (B, 2, H, W), at least float32.

    Example:
        >>> spatial_pools(torch.arange(3.).reshape(1, 3, 1, 1)).flatten()
        tensor([2., 1.])
    """
    dtype = compute_dtype(x.dtype)
    return torch.cat([x.amax(1, keepdim=True).to(dtype), x.mean(1, keepdim=True, dtype=dtype)], 1)


def in_fast_layout(pools: Tensor) -> Tensor:
    """Convert two-channel maps to the memory format that a CPU convolves fastest: channels last.

    Args:
        pools (Tensor): (B, 2, H, W).

    Returns:
        Tensor: The same values, possibly copied.

    Example:
        >>> in_fast_layout(torch.rand(1, 2, 3, 5)).stride()
        (30, 1, 10, 2)
    """
    if is_recorded() or pools.device.type != "cpu":
        return pools
    # Up to ten times faster than contiguous, forward and backward.
    return pools.contiguous(memory_format=torch.channels_last)


def spatial_gate(pools: Tensor, weight: Tensor) -> Tensor:
    """Return the spatial weights, from a convolution of the maxima and means over the channels.

    Args:
        pools (Tensor): Returned by :func:`spatial_pools`, (B, 2, H, W).
        weight (Tensor): (1, 2, k, k), k odd.

    Returns:
        Tensor: (B, 1, H, W) in (0, 1), at least float32.

    Example:
        >>> spatial_gate(torch.rand(2, 2, 3, 5), torch.rand(1, 2, 7, 7)).shape
        torch.Size([2, 1, 3, 5])
    """
    with no_autocast(pools):
        pools = in_fast_layout(pools.to(weight.dtype))
        score = F.conv2d(pools, weight, padding=(weight.shape[2] // 2,) * 2)
    return torch.sigmoid(at_least_float32(score))


def apply_cbam_gates(
    x: Tensor,
    maxima: Tensor,
    means: Tensor,
    squeeze: Tensor,
    excite: Tensor,
    weight: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Apply the channel weights, then the spatial weights of the result.

    Only saves the map, its pools and the spatial weights for the backward pass. Not twice
    differentiable, unless a graph is being recorded
    (:func:`~rfa_mmdet.ops.common.recompute.is_recorded`).

    Args:
        x (Tensor): (B, C, H, W).
        maxima, means (Tensor): Maxima and means of x's channels, (B, C, 1, 1).
        squeeze, excite (Tensor): See :func:`channel_gate`.
        weight (Tensor): See :func:`spatial_gate`.
        scale (float): Factor of the result. Defaults to 1.

    Returns:
        Tensor: (B, C, H, W), in x's dtype.

    Example:
        >>> x, pools = torch.ones(4, 8, 3, 5), torch.ones(2, 4, 8, 1, 1)
        >>> zeros = torch.zeros(2, 8, 1, 1), torch.zeros(8, 2, 1, 1), torch.zeros(1, 2, 7, 7)
        >>> apply_cbam_gates(x, *pools, *zeros).unique()
        tensor([0.2500])
    """
    if recomputes():
        given = (x, maxima, means, squeeze, excite, weight)
        weighted: Tensor = _ApplyCBAMGates.apply(scale, *given)
        return weighted
    x = x * channel_gate(maxima, means, squeeze, excite).to(x.dtype)
    return x * scaled(spatial_gate(spatial_pools(x), weight), scale).to(x.dtype)


class _ApplyCBAMGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, x: Tensor, *given: Tensor) -> Tensor:
        *channel_inputs, weight = given
        weighted = x * channel_gate(*channel_inputs).to(x.dtype)
        gate = spatial_gate(spatial_pools(weighted), weight)
        ctx.save_for_backward(x, gate, *given)
        ctx.scale = scale
        return weighted.mul_(scaled(gate, scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, *given, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:6]
        given = [t.detach().requires_grad_(need) for t, need in zip(given, needed, strict=True)]
        with torch.enable_grad():
            learnt_channel = channel_gate(*given).to(x.dtype)
        channel = learnt_channel.detach()
        # Only two buffers of x's size are allocated: weighted and grad.
        weighted = x * channel
        grad = grad_y * weighted
        grad_gate = scaled(grad.sum(1, keepdim=True, dtype=gate.dtype), ctx.scale)
        grad_score = grad_gate * gate * (1 - gate)
        pools = spatial_pools(weighted)
        grad_pools, grad_weight = same_conv_gradients(
            grad_score.to(weight.dtype), pools.to(weight.dtype), weight
        )
        grad_maxima, grad_means = grad_pools.chunk(2, dim=1)
        hits, share = shares_of_maximum(weighted, pools[:, :1].to(x.dtype), grad_maxima)
        torch.mul(grad_y, scaled(gate, ctx.scale).to(x.dtype), out=grad)
        grad.addcmul_(hits, share).add_((grad_means / x.shape[1]).to(x.dtype))
        grad_channel = torch.mul(grad, x, out=hits).sum((2, 3), keepdim=True)
        learnt = [tensor for tensor in given if tensor.requires_grad]
        found = iter(torch.autograd.grad(learnt_channel, learnt, grad_channel) if learnt else ())
        grad_given = (next(found) if need else None for need in needed)
        return None, grad.mul_(channel), *grad_given, grad_weight
