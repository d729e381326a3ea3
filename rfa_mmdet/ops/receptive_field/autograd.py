"""RFAConv that keeps only its input, the parameters and the batch statistics for the backward.

Over the four functions of a backend (see ``cpu.py``), this file has what is common to all: batch
norm, folded into a scale and a shift of each response, and its gradient. With p the K values of a
window of channel c, response i before norm is z_i = w_i . p, so the batch statistics follow from
the mean m and the covariance S of the windows: mean z_i = w_i . m, var z_i = w_i' S w_i. Let
r_i = 1 / sqrt(var + eps), a_i the norm's weight, and hats mark sums of all ranks, over N positions.
The backend gives dF, the gradient of the normed response, only through sums over positions:
shift_i = sum dF_i and G_ij = sum dF_i p_j. From these, with everything else (C, K, K)-sized:

    d bias_i   = shift_i
    d weight_i = r_i (w_i . G_i - mean_i shift_i)
    dz_i       = a_i r_i (dF_i - shift^_i / N - r_i (z_i - mean_i) dweight^_i / N)
    dw_i       = sum dz_i p = a_i r_i (G_i - n / N (shift^_i m + dweight^_i r_i (S w_i + e_i m)))

where n, m and S are this rank's and e_i its mean of z_i less that of all. The last two terms of
dz_i reach the input as fold(constant + Q p), which the backend subtracts in a second, cheap pass.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfa_mmdet.ops.common.precision import autocast_dtype, no_autocast
from rfa_mmdet.ops.receptive_field.schema import are_worth_keeping, compute_dtype, output_size

Pair = tuple[int, int]


class Norm(NamedTuple):
    """Batch norm of the C * K responses, as plain tensors and numbers.

    Attributes:
        weight (Tensor | None): (C * K,). None: ones.
        bias (Tensor | None): (C * K,). None: zeros.
        mean (Tensor | None): (C * K,), fixed statistics. None: those of the batch are taken.
        var (Tensor | None): (C * K,), likewise.
        eps (float): Added to the variance.
        group (Any): Process group over which the statistics of the batch are taken. None: this
            process alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    group: Any = None


def fused_rfa_conv(
    x: Tensor,
    attention_weight: Tensor,
    feature_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None,
    relu: bool,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute :func:`~rfa_mmdet.ops.receptive_field.reference.rfa_conv` in an accelerated backend.

    Differentiable once, in reverse mode: the transforms of ``torch.func`` and second derivatives
    are the reference's. Under autocast it computes in autocast's type, as a
    convolution does; softmax, statistics and sums are float32.

    Args:
        x, attention_weight, feature_weight, weight, bias: As of the reference.
        norm (Norm | None): Of the features.
        relu (bool): Whether ReLU follows; else nothing does.
        stride, padding, dilation, groups: As of the reference.
        backend (str): 'cpu' or 'triton', as of
            :func:`~rfa_mmdet.ops.receptive_field.dispatch.choose_backend`.

    Returns:
        tuple[Tensor, Tensor | None, Tensor | None]: (B, O, h, w), and mean and unbiased variance
        of the batch, (C * K,) each, where they were taken.

    Example:
        >>> from rfa_mmdet.ops.receptive_field.dispatch import missing
        >>> x, w = torch.rand(2, 4, 8, 8), torch.rand(6, 4, 3, 3)
        >>> if missing("cpu") is None:
        ...     y, _, _ = fused_rfa_conv(x, torch.rand(36, 1, 1, 1), torch.rand(36, 1, 3, 3), w,
        ...                              norm=None, relu=True, padding=(1, 1), backend="cpu")
        ...     assert y.shape == (2, 6, 8, 8)
    """
    dtype = autocast_dtype(x)
    kernel_size = (weight.shape[2], weight.shape[3])
    norm_tensors = (None,) * 4 if norm is None else norm[:4]
    eps, group = (0.0, None) if norm is None else (norm.eps, norm.group)
    batch = norm is not None and norm.mean is None
    positions = kernel_size[0] * kernel_size[1]
    attention = attention_weight.view(-1, positions)
    feature = None if feature_weight is None else feature_weight.view(-1, positions, positions)
    y, mean, var = _RFAConv.apply(
        x.to(dtype),
        attention,
        feature,
        weight.to(dtype).flatten(2),
        None if bias is None else bias.to(dtype),
        *norm_tensors,
        eps,
        batch,
        group,
        norm is not None,
        relu,
        kernel_size,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
        backend,
    )
    return (y, mean, var) if batch else (y, None, None)


class _RFAConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor,
        feature: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        batch: bool,
        group: Any,
        normed: bool,
        relu: bool,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        window = (kernel_size, stride, padding, dilation)
        ops, dtype = torch.ops.rfa_mmdet, compute_dtype(x)
        first = second = r = total = unbiased = None
        with no_autocast(x):
            if batch:
                first, second = ops.rfa_conv_moments(x, *window, backend)
                height, width = output_size(x, *window)
                count = x.shape[0] * height * width
                mean, var = response_statistics(feature, first, second)
                total, mean, var = _over_ranks(count, mean, var, group)
                unbiased = var * (total / (total - 1))
            elif normed:
                mean, var = (s.to(dtype).view_as(attention) for s in (mean, var))
            if normed:
                r = torch.rsqrt(var + eps)
            scale, shift = scale_and_shift(attention, norm_weight, norm_bias, mean, r, dtype)
            y = ops.rfa_conv_forward(
                x, attention, feature, scale, shift, relu, weight, bias, *window, groups, backend
            )
        statistics = (mean, r, first, second)
        again = batch and group is None and not are_worth_keeping(statistics, x)
        ctx.save_for_backward(
            x,
            attention,
            feature,
            weight,
            norm_weight,
            norm_bias,
            *((None,) * 4 if again else statistics),
        )
        ctx.again, ctx.eps = again, eps
        ctx.batch, ctx.group, ctx.relu = batch, group, relu
        ctx.total = total
        ctx.window, ctx.groups, ctx.backend = window, groups, backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Tensors in any case, so that the number of outputs does not change.
        mean = x.new_empty(0) if not batch else mean.flatten()
        unbiased = x.new_empty(0) if not batch else unbiased.flatten()
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError(
                f"RFAConv's backend {ctx.backend!r} has no second derivative; take "
                "backend='reference' for create_graph=True"
            )
        (x, attention, feature, weight, norm_weight, norm_bias, mean, r, first, second) = (
            ctx.saved_tensors
        )
        need_x, need_attention, need_feature, need_weight, need_bias, need_a, need_b, *_ = (
            ctx.needs_input_grad
        )
        ops, dtype, window = torch.ops.rfa_mmdet, compute_dtype(x), ctx.window
        corrected = ctx.batch and (need_x or need_feature)
        need_window = need_attention or need_feature or need_a or need_b or corrected
        with no_autocast(x):
            if ctx.again:
                first, second = ops.rfa_conv_moments(x, *window, ctx.backend)
                mean, var = response_statistics(feature, first, second)
                r = torch.rsqrt(var + ctx.eps)
            scale, shift = scale_and_shift(attention, norm_weight, norm_bias, mean, r, dtype)
            grad_x, d_attention, d_shift, products, d_weight, d_bias = ops.rfa_conv_backward(
                grad_y,
                x,
                attention,
                feature,
                scale,
                shift,
                ctx.relu,
                weight,
                (need_x, need_window, need_weight, need_bias),
                *window,
                ctx.groups,
                ctx.backend,
            )
            d_feature = d_norm_weight = None
            if need_window and r is not None:
                w = _identity_of(attention, dtype) if feature is None else feature.to(dtype)
                d_norm_weight = r * ((w * products).sum(2) - mean * d_shift)
            if need_feature and feature is not None:
                d_feature = scale.unsqueeze(2) * products
            if corrected:
                shift_all, weight_all = _sum_over_ranks(d_shift, d_norm_weight, ctx.group)
                if d_feature is not None:
                    height, width = output_size(x, *window)
                    share = x.shape[0] * height * width / ctx.total
                    excess = (w * first.unsqueeze(1)).sum(2) - mean
                    slope = (weight_all * r).unsqueeze(2)
                    spread = torch.matmul(w, second) + excess.unsqueeze(2) * first.unsqueeze(1)
                    part = shift_all.unsqueeze(2) * first.unsqueeze(1) + slope * spread
                    d_feature = d_feature - scale.unsqueeze(2) * part * share
                if need_x:
                    Q = torch.matmul(w.mT, (scale * r * weight_all / ctx.total).unsqueeze(2) * w)
                    level = scale * (shift_all - r * mean * weight_all) / ctx.total
                    constant = (w * level.unsqueeze(2)).sum(1)
                    ops.rfa_conv_correct_input_gradient(
                        grad_x, x, Q, constant, *window, ctx.backend
                    )

        def shaped(gradient: Tensor | None, like: Tensor | None, need: bool) -> Tensor | None:
            return gradient.to(like.dtype).view_as(like) if need and like is not None else None

        return (
            shaped(grad_x, x, need_x),
            shaped(d_attention, attention, need_attention),
            shaped(d_feature, feature, need_feature),
            shaped(d_weight, weight, need_weight),
            d_bias.to(ctx.bias_dtype) if need_bias else None,
            shaped(d_norm_weight, norm_weight, need_a),
            shaped(d_shift, norm_bias, need_b),
            *(None,) * 13,
        )


def _identity_of(attention: Tensor, dtype: torch.dtype) -> Tensor:
    """Kernels that pick the values of the window: what the unfold form's features amount to."""
    positions = attention.shape[1]
    eye = torch.eye(positions, dtype=dtype, device=attention.device)
    return eye.expand(attention.shape[0], positions, positions)


def response_statistics(
    feature: Tensor | None, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each response from those of the windows.

    Args:
        feature (Tensor | None): (C, K, K). None: the responses are the window's values.
        first, second (Tensor): (C, K) and (C, K, K), mean and covariance of these.

    Returns:
        tuple[Tensor, Tensor]: (C, K) each.

    Example:
        >>> first, second = torch.ones(2, 4), torch.eye(4).expand(2, 4, 4)
        >>> [s.unique().item() for s in response_statistics(None, first, second)]
        [1.0, 1.0]
    """
    if feature is None:
        return first, torch.diagonal(second, dim1=1, dim2=2).clamp_min(0).contiguous()
    w = feature.to(first.dtype)
    mean = (w * first.unsqueeze(1)).sum(2)
    # Rounding may leave a variance of zero a little below it.
    return mean, (torch.matmul(w, second) * w).sum(2).clamp_min(0)


def scale_and_shift(
    attention: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    r: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return a norm as scale * z + shift.

    Args:
        attention (Tensor): Of the shape (C, K) of both.
        weight, bias (Tensor | None): Of the norm, (C * K,).
        mean, r (Tensor | None): Its mean and one over its deviation, (C, K). None: there is none.
        dtype (torch.dtype): Of both.

    Returns:
        tuple[Tensor, Tensor]: (C, K) each.

    Example:
        >>> one = torch.ones(2, 4)
        >>> [t.unique().item() for t in scale_and_shift(one, None, None, one, one, one.dtype)]
        [1.0, -1.0]
    """
    if r is None:
        return torch.ones_like(attention, dtype=dtype), torch.zeros_like(attention, dtype=dtype)
    scale = r if weight is None else r * weight.to(dtype).view_as(r)
    shift = -scale * mean
    return scale, shift if bias is None else shift + bias.to(dtype).view_as(r)


def _over_ranks(
    count: int, mean: Tensor, var: Tensor, group: Any
) -> tuple[int | Tensor, Tensor, Tensor]:
    """Combine count, mean and biased variance of all ranks; a rank may have no data."""
    if group is None:
        return count, mean, var
    own = torch.cat([mean.flatten(), var.flatten(), mean.new_full((1,), count)])
    ranks = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(ranks, own, group=group)
    ranks = torch.stack(ranks)
    counts = ranks[:, -1:, None]  # (ranks, 1, 1)
    means, variances = ranks[:, :-1].unflatten(1, (2, *mean.shape)).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return total, mean, var


def _sum_over_ranks(d_shift: Tensor, d_weight: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    if group is None:
        return d_shift, d_weight
    sums = torch.stack([d_shift, d_weight])
    torch.distributed.all_reduce(sums, group=group)
    return sums[0], sums[1]
