"""Cross-spatial learning of EMA (arXiv 2305.13563)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rfa_mmdet.ops.common.convolution import (
    conv_to_one,
    conv_to_one_gradients,
    pointwise,
    pointwise_gradients,
)
from rfa_mmdet.ops.common.precision import at_least_float32, compute_dtype, no_autocast
from rfa_mmdet.ops.common.scale import scaled

Layer = Callable[[Tensor], Tensor]

# The part of the map that each position of a 3x3 kernel sees: everything except one border row and
# one border column, which share a corner.
_SEEN = (
    (1, 1, 1, 1, 1, 1, 1, 1, 1),  # the whole
    (0, 0, 0, 0, 0, 0, -1, -1, -1),  # the first row
    (-1, -1, -1, 0, 0, 0, 0, 0, 0),  # the last row
    (0, 0, -1, 0, 0, -1, 0, 0, -1),  # the first column
    (-1, 0, 0, -1, 0, 0, -1, 0, 0),  # the last column
    (0, 0, 0, 0, 0, 0, 0, 0, 1),  # the corners: first row, first column
    (0, 0, 0, 0, 0, 0, 1, 0, 0),  # first row, last column
    (0, 0, 1, 0, 0, 0, 0, 0, 0),  # last row, first column
    (1, 0, 0, 0, 0, 0, 0, 0, 0),  # last row, last column
)
# Positions per slice of the map on a CPU, so that intermediate values stay in the cache.
CELLS = 2**16


def cross_spatial_gate(x1: Tensor, x2: Tensor) -> Tensor:
    """Weight the positions of each branch by the channel distribution of the other.

    Args:
        x1 (Tensor): (N, c, H, W).
        x2 (Tensor): (N, c, H, W).

    Returns:
        Tensor: (N, 1, H, W) in (0, 1), at least float32.

    Example:
        >>> x = torch.zeros(2, 4, 3, 5)
        >>> gate = cross_spatial_gate(x, x)
        >>> gate.shape, bool((gate == 0.5).all())
        (torch.Size([2, 1, 3, 5]), True)
    """
    with no_autocast(x1):
        x1, x2 = at_least_float32(x1), at_least_float32(x2)
        # A list, because torch 2.1 cannot compile an unpacked generator.
        p1, p2 = [torch.softmax(x.mean((2, 3)), dim=1).unsqueeze(1) for x in (x1, x2)]
        score = p1 @ x2.flatten(2) + p2 @ x1.flatten(2)  # (N, 1, c) @ (N, c, H * W)
        gate: Tensor = torch.sigmoid(score).unflatten(2, x1.shape[2:])
        return gate


def ema_gate(
    x: Tensor, conv1: Layer, conv3: Layer, norm: Layer, dtype: torch.dtype, size: tuple[int, int]
) -> Tensor:
    """Return the spatial weights of a group of channels.

    Args:
        x (Tensor): A group of channels, (N, c, H, W).
        conv1 (Callable): 1x1 convolution of (N, c, H + W, 1), for the row and column gates.
        conv3 (Callable): 3x3 convolution, the second branch.
        norm (Callable): Norm of the first branch.
        dtype (torch.dtype): Input dtype of ``conv1``.
        size (tuple[int, int]): (H, W). Passed separately, because exporters treat the sizes of
            ``x`` as constants.

    Returns:
        Tensor: (N, 1, H, W) in (0, 1), in x's dtype.

    Example:
        >>> convs = torch.nn.Conv2d(4, 4, 1), torch.nn.Conv2d(4, 4, 3, padding=1)
        >>> x, norm = torch.rand(2, 4, 3, 5), torch.nn.GroupNorm(4, 4)
        >>> ema_gate(x, *convs, norm, torch.float32, (3, 5)).shape
        torch.Size([2, 1, 3, 5])
    """
    with no_autocast(x):
        means = torch.cat([x.mean(3, dtype=dtype), x.mean(2, dtype=dtype)], dim=2)
        gates = conv1(means.unsqueeze(3)).squeeze(3)
    gates = torch.sigmoid(at_least_float32(gates)).to(x.dtype)
    row_gate, column_gate = gates.split(list(size), dim=2)
    x1 = norm(x * row_gate.unsqueeze(3) * column_gate.unsqueeze(2))
    return cross_spatial_gate(x1, conv3(x)).to(x.dtype)


def apply_ema_gate(x: Tensor, *weights: Tensor, eps: float, scale: float = 1.0) -> Tensor:
    """Multiply a map by its :func:`ema_gate`, saving only the map for the backward pass.

    Requires a norm with one channel per group. Its means are then known, so only a weighted sum
    over the channels of the 3x3 convolution is needed, which is a convolution to one channel; its
    channel means follow from sums of the map. Not twice differentiable.

    Args:
        x (Tensor): A group of channels, (N, c, H, W).
        *weights (Tensor): Weight and bias of the 1x1 and 3x3 convolutions and of the norm.
        eps (float): Epsilon of the norm.
        scale (float): Factor of the result. Defaults to 1.

    Returns:
        Tensor: A tensor with x's shape and dtype.

    Example:
        >>> x, modules = torch.rand(2, 4, 3, 5), (torch.nn.Conv2d(4, 4, 1),
        ...     torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.GroupNorm(4, 4))
        >>> weights = [weight for module in modules for weight in (module.weight, module.bias)]
        >>> expected = x * ema_gate(x, *modules, torch.float32, (3, 5))
        >>> torch.allclose(apply_ema_gate(x, *weights, eps=1e-5), expected, atol=1e-6)
        True
    """
    y: Tensor = _ApplyEMAGate.apply(eps, scale, x, *weights)
    return y


class _ApplyEMAGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, eps: float, scale: float, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.eps, ctx.scale = eps, scale
        y = torch.empty_like(x)
        with no_autocast(x):
            means = _means(x)
            given = [weight.to(means[0].dtype) for weight in weights]
            parts = _parts(*means, *given)
            for part in _slices(x):
                cells = at_least_float32(x[part])
                gate = _cells(eps, cells, *_of_slice(parts, part))[0]
                y[part] = cells * scaled(gate, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        with no_autocast(x):
            means = _means(x)
            given = [weight.to(means[0].dtype) for weight in weights]
            parts = _parts(*means, *given)
            grad_x, found = torch.empty_like(x), []
            for part in _slices(x):
                upstream, cells = at_least_float32(grad_y[part]), at_least_float32(x[part])
                grad_x[part], *grad_parts = _cells_backward(
                    ctx.eps, ctx.scale, upstream, cells, *_of_slice(parts, part)
                )
                found.append(grad_parts)
            *grad_groups, grad_kernels = (torch.cat(t) for t in zip(*found, strict=True))
            known = [*grad_groups, grad_kernels.sum(0), *parts, *means, *given]
            grad_means, grad_shares, *grad_weights = _parts_backward(*known)
            _add_to_map(grad_x, grad_means, grad_shares)
        needed = ctx.needs_input_grad[3:]
        gradients = zip(grad_weights, weights, needed, strict=True)
        wanted = (g.view_as(w).to(w.dtype) if n else None for g, w, n in gradients)
        return None, None, grad_x, *wanted


def _slices(x: Tensor) -> Iterator[slice]:
    """Divide (N, c, H, W) along N into at least one slice."""
    count = max(1, len(x))
    step = max(1, CELLS // (x.shape[2] * x.shape[3])) if x.device.type == "cpu" else count
    return (slice(start, start + step) for start in range(0, count, step))


def _of_slice(parts: tuple[Tensor, ...], part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments of :func:`_cells` for a slice."""
    gates, weights, constant, kernel, *_ = parts
    return gates[part], weights[part], constant[part], kernel


def _means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column means, (N, c, H + W), and the sums for _SEEN, relative to the size."""
    height, width = x.shape[2:]
    dtype = compute_dtype(x.dtype)
    rows, columns = x.sum(3, dtype=dtype), x.sum(2, dtype=dtype)
    edges = rows[..., :1], rows[..., -1:], columns[..., :1], columns[..., -1:]
    corners = _corners(x).to(dtype).expand(-1, -1, 2, 2).flatten(2)
    sums = torch.cat([rows.sum(2, keepdim=True), *edges, corners], dim=2)
    return torch.cat([rows / width, columns / height], dim=2), sums / (height * width)


def _add_to_map(grad_x: Tensor, grad_means: Tensor, grad_shares: Tensor) -> None:
    """Add the gradients of :func:`_means` to the gradient of the map."""
    height, width = grad_x.shape[2:]
    rows, columns = grad_means[..., :height] / width, grad_means[..., height:] / height
    grad_sums = grad_shares / (height * width)
    rows += grad_sums[..., :1]
    rows[..., 0] += grad_sums[..., 1]
    rows[..., -1] += grad_sums[..., 2]
    columns[..., 0] += grad_sums[..., 3]
    columns[..., -1] += grad_sums[..., 4]
    grad_x += rows.unsqueeze(3)
    grad_x += columns.unsqueeze(2)
    corners = _corners(grad_x)
    corners += grad_sums[..., 5:].unflatten(2, (2, 2)).sum_to_size(corners.shape)


def _corners(x: Tensor) -> Tensor:
    """Return a view of the corners, (N, c, 2, 2), with size 1 where the map has size 1."""
    return x[:, :, :: max(1, x.shape[2] - 1), :: max(1, x.shape[3] - 1)]


def _parts(
    means: Tensor,
    shares: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, ...]:
    """Compute what the gate needs from :func:`_means` of the map.

    Returns:
        tuple[Tensor, ...]: The row and column gates, (N, c, H + W); the parts of the score: weights
        of the normed map's channels, (N, 1, c), a constant, (N, 1, 1), and a kernel for the map,
        (1, c, 3, 3); the channel distributions of the second branch, (N, c), and of the first,
        (c,).
    """
    gates = torch.sigmoid(pointwise(means, weight1, bias1))
    p1 = torch.softmax(shift, dim=0)
    p2 = torch.softmax(torch.addmm(bias3, shares.flatten(1), _weight_of_shares(weight3).T), dim=1)
    constant = (p2 @ shift + p1 @ bias3).view(-1, 1, 1)
    kernel = (p1 @ weight3.flatten(1)).view(1, *weight3.shape[1:])
    return gates, (p2 * scale).unsqueeze(1), constant, kernel, p2, p1


def _weight_of_shares(weight3: Tensor) -> Tensor:
    """Return the 3x3 convolution's weight as a weight of the relative sums, (c, c * 9)."""
    return (weight3.flatten(2) @ weight3.new_tensor(_SEEN).T).flatten(1)


def _parts_backward(
    grad_gates: Tensor,
    grad_weights: Tensor,
    grad_constant: Tensor,
    grad_kernel: Tensor,
    gates: Tensor,
    weights: Tensor,
    constant: Tensor,
    kernel: Tensor,
    p2: Tensor,
    p1: Tensor,
    means: Tensor,
    shares: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of the inputs of :func:`_parts` from those of its first four results."""
    grad_gates = torch.ops.aten.sigmoid_backward(grad_gates, gates)
    grad_means, grad_weight1, grad_bias1 = pointwise_gradients(grad_gates, means, weight1)
    grad_weights, grad_constant, grad_kernel = (
        grad_weights[:, 0],
        grad_constant[:, 0],
        grad_kernel.flatten(),
    )
    constants = grad_constant.sum()
    grad_p1 = weight3.flatten(1) @ grad_kernel + constants * bias3
    grad_p2 = grad_weights * scale + grad_constant * shift
    grad_scores = p2 * (grad_p2 - (grad_p2 * p2).sum(1, keepdim=True))
    grad_weight3 = (grad_scores.T @ shares.flatten(1)).view(*weight3.shape[:2], 9)
    grad_weight3 = (grad_weight3 @ weight3.new_tensor(_SEEN)).flatten(1) + torch.outer(
        p1, grad_kernel
    )
    return (
        grad_means,
        (grad_scores @ _weight_of_shares(weight3)).view_as(shares),
        grad_weight1,
        grad_bias1,
        grad_weight3,
        grad_scores.sum(0) + constants * p1,
        (grad_weights * p2).sum(0),
        grad_constant[:, 0] @ p2 + p1 * (grad_p1 - grad_p1 @ p1),
    )


def _cells(
    eps: float, x: Tensor, gates: Tensor, weights: Tensor, constant: Tensor, kernel: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gate and intermediate values.

    Returns:
        tuple[Tensor, ...]: The gate, (N, 1, H, W); the product of row and column gates,
        (N, c, H, W); the normed map; and its inverse standard deviations, (N, c).
    """
    count, channels, height, width = x.shape
    row_gates, column_gates = _split(gates, x)
    both = row_gates * column_gates
    # This operator, unlike F.group_norm, takes no other layout.
    weighted = (x * both).contiguous()
    normed, _, inverse = torch.native_group_norm(
        weighted, None, None, count, channels, height * width, channels, eps
    )
    score = torch.baddbmm(constant, weights, normed.flatten(2)).view(count, 1, height, width)
    return torch.sigmoid(score.add_(conv_to_one(x, kernel))), both, normed, inverse


def _cells_backward(
    eps: float,
    scale: float,
    grad_y: Tensor,
    x: Tensor,
    gates: Tensor,
    weights: Tensor,
    constant: Tensor,
    kernel: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of x and of the next four arguments."""
    gate, both, normed, inverse = _cells(eps, x, gates, weights, constant, kernel)
    grad_gate = scaled((grad_y * x).sum(1, keepdim=True), scale)
    grad_score = torch.ops.aten.sigmoid_backward(grad_gate, gate)
    grad_x, grad_kernel = conv_to_one_gradients(grad_score, x, kernel)
    grad_x.addcmul_(grad_y, gate, value=scale)
    grad_weights = torch.bmm(grad_score.flatten(2), normed.flatten(2).mT)  # (N, 1, c)
    grad_constant = grad_score.sum((2, 3)).unsqueeze(2)
    # Through the norm: subtract the mean, and the component along the normed map.
    cells = x.shape[2] * x.shape[3]
    grad_score -= (grad_constant / cells).unsqueeze(3)
    slope = (inverse * weights.squeeze(1))[..., None, None]
    grad_weighted = normed.mul_(slope * (grad_weights / -cells).view_as(slope))
    grad_weighted.addcmul_(grad_score, slope)
    grad_x.addcmul_(grad_weighted, both)
    grad_weighted.mul_(x)
    row_gates, column_gates = _split(gates, x)
    grad_rows = grad_weighted @ column_gates.mT
    grad_columns = row_gates.mT @ grad_weighted
    grad_gates = torch.cat([grad_rows.squeeze(3), grad_columns.squeeze(2)], dim=2)
    return grad_x, grad_gates, grad_weights, grad_constant, grad_kernel


def _split(gates: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Split (N, c, H + W) into (N, c, H, 1) and (N, c, 1, W)."""
    rows, columns = gates.split(list(x.shape[2:]), dim=2)
    return rows.unsqueeze(3), columns.unsqueeze(2)
