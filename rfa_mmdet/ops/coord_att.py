"""Gates of coordinate attention (arXiv 2103.02907)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rfa_mmdet.ops.common.convolution import pointwise, pointwise_gradients
from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.scale import scaled


def coordinate_gates(
    rows: Tensor,
    columns: Tensor,
    shared: Callable[[Tensor], Tensor],
    row_conv: Callable[[Tensor], Tensor],
    column_conv: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the weights of the rows and columns of every channel.

    Args:
        rows (Tensor): The mean of each row, (B, C, H).
        columns (Tensor): The mean of each column, (B, C, W).
        shared (Callable): Maps both means, (B, C, H + W, 1), to (B, m, H + W, 1).
        row_conv (Callable): Maps the row part, (B, m, H, 1), to (B, C, H, 1).
        column_conv (Callable): Maps the column part, (B, m, W, 1), to (B, C, W, 1).
        dtype (torch.dtype): Input dtype of ``shared``.

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
        row_score = row_conv(hidden_rows).squeeze(3)
        column_score = column_conv(hidden_columns).squeeze(3)
    row_gate = torch.sigmoid(at_least_float32(row_score))
    column_gate = torch.sigmoid(at_least_float32(column_score))
    return row_gate, column_gate


def apply_coordinate_gates(
    x: Tensor,
    norm: Callable[[Tensor], Tensor],
    eps: float,
    *given: Tensor | None,
    scale: float = 1.0,
) -> Tensor:
    """Multiply a map by its :func:`coordinate_gates`, saving only the map and its means.

    Not twice differentiable.

    Args:
        x (Tensor): (B, C, H, W).
        norm (Callable): Batch norm of (B, m, H + W, 1) with its side effects, for the forward pass.
        eps (float): Epsilon of the norm.
        *given (Tensor | None): Weight and bias of the shared 1x1 convolution, of the norm (a hard
            swish follows), and of the 1x1 convolutions of rows and columns; then mean and variance,
            if the norm does not use those of the batch.
        scale (float): Factor of the result. Defaults to 1.

    Returns:
        Tensor: A tensor with x's shape and dtype.

    Example:
        >>> convs = [torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(8, 4, 1)]
        >>> x, norm = torch.rand(2, 4, 3, 5), torch.nn.BatchNorm2d(8)
        >>> modules = convs[0], norm, *convs[1:]
        >>> weights = [weight for module in modules for weight in (module.weight, module.bias)]
        >>> shared = torch.nn.Sequential(convs[0], norm, torch.nn.Hardswish())
        >>> rows, columns = coordinate_gates(x.mean(3), x.mean(2), shared, *convs[1:], x.dtype)
        >>> expected = x * columns.unsqueeze(2) * rows.unsqueeze(3)
        >>> torch.allclose(apply_coordinate_gates(x, norm, norm.eps, *weights), expected, atol=1e-6)
        True
    """
    y: Tensor = _ApplyCoordinateGates.apply(norm, eps, scale, x, *given)
    return y


class _ApplyCoordinateGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        norm: Callable[[Tensor], Tensor],
        eps: float,
        scale: float,
        x: Tensor,
        *given: Tensor | None,
    ) -> Tensor:
        weight, bias, _, _, weight_h, bias_h, weight_w, bias_w, *_ = given
        assert weight is not None
        assert weight_h is not None
        assert weight_w is not None
        means = torch.cat([x.mean(dim, dtype=weight.dtype) for dim in (3, 2)], dim=2)
        ctx.save_for_backward(x, means, *given)
        ctx.eps, ctx.scale = eps, scale
        with no_autocast(x):
            hidden = F.hardswish(norm(pointwise(means, weight, bias).unsqueeze(3)).squeeze(3))
            rows, columns = _gates(hidden, x.shape[2], weight_h, bias_h, weight_w, bias_w)
        row_gates = scaled(rows, scale).unsqueeze(3).to(x.dtype)
        return (x * columns.unsqueeze(2).to(x.dtype)).mul_(row_gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, means, weight, bias, gain, shift, *others = ctx.saved_tensors
        (weight_h, bias_h, weight_w, bias_w), held = others[:4], others[4:]
        mean, var = held or (None, None)
        height, width = x.shape[2:]
        with no_autocast(x):
            z = pointwise(means, weight, bias)
            normed, *batch_stats = torch.native_batch_norm(
                z, gain, shift, mean, var, not held, 0.0, ctx.eps
            )
            hidden = F.hardswish(normed)
            rows, columns = _gates(hidden, height, weight_h, bias_h, weight_w, bias_w)
            row_gates, column_gates = (
                scaled(rows, ctx.scale).unsqueeze(3).to(x.dtype),
                columns.unsqueeze(2).to(x.dtype),
            )
            products = grad_y * x
            grad_rows = (products @ column_gates.mT).squeeze(3).to(rows.dtype)
            grad_columns = (row_gates.mT @ products).squeeze(2).to(rows.dtype)
            del products
            grad_rows = scaled(grad_rows, ctx.scale)
            grad_rows = torch.ops.aten.sigmoid_backward(grad_rows, rows).to(hidden.dtype)
            grad_columns = torch.ops.aten.sigmoid_backward(grad_columns, columns).to(hidden.dtype)
            hidden_rows, hidden_columns = hidden.split([height, width], dim=2)
            grad_hidden_rows, *grad_h = pointwise_gradients(grad_rows, hidden_rows, weight_h)
            grad_hidden_columns, *grad_w = pointwise_gradients(
                grad_columns, hidden_columns, weight_w
            )
            grad_hidden = torch.cat([grad_hidden_rows, grad_hidden_columns], dim=2)
            grad_z, *grad_norm = torch.ops.aten.native_batch_norm_backward(
                *(torch.ops.aten.hardswish_backward(grad_hidden, normed), z, gain, mean, var),
                *(*batch_stats, not held, ctx.eps, (True, gain is not None, shift is not None)),
            )
            grad_means, *grad_shared = pointwise_gradients(grad_z, means, weight)
            grad_x = (grad_y * column_gates).mul_(row_gates)
            grad_x += (grad_means[..., :height] / width).unsqueeze(3)
            grad_x += (grad_means[..., height:] / height).unsqueeze(2)
        gradients = (grad_x, *grad_shared, *grad_norm, *grad_h, *grad_w)
        needed = ctx.needs_input_grad[3:12]
        wanted = (g if need else None for g, need in zip(gradients, needed, strict=True))
        return None, None, None, *wanted, *(None,) * len(held)


def _gates(
    hidden: Tensor,
    height: int,
    weight_h: Tensor,
    bias_h: Tensor | None,
    weight_w: Tensor,
    bias_w: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the row gates, (B, C, H), and column gates, (B, C, W), at least float32."""
    rows, columns = hidden[..., :height], hidden[..., height:]
    return (
        torch.sigmoid(at_least_float32(pointwise(rows, weight_h, bias_h))),
        torch.sigmoid(at_least_float32(pointwise(columns, weight_w, bias_w))),
    )
