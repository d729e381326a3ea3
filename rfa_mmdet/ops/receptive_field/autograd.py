"""Gradients of the operators, registered for their Autograd key.

They keep the input, the parameters and, where these are small beside the input, the statistics of
a batch: what else a backward pass needs is computed again in it. README.md derives the formulas.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rfa_mmdet.ops.common.precision import no_autocast
from rfa_mmdet.ops.common.torch_versions import is_compiling
from rfa_mmdet.ops.common.windows import Pair, Window
from rfa_mmdet.ops.receptive_field.schema import LIBRARY

# Statistics of a batch are kept where the input has at least so many times their elements.
KEEP_FROM = 12

_ops = torch.ops.rfa_mmdet


def _register(name: str, function: type[Function]) -> None:
    """Let an operator be recorded by an autograd function where a gradient may be asked for."""
    operator = getattr(_ops, name)

    def kernel(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    LIBRARY.impl(name, kernel, "Autograd")


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not is_compiling():  # create_graph=True
        raise RuntimeError(
            "the kernels of receptive-field convolutions have no second derivative; pass "
            "backend='reference' to the layer for create_graph=True"
        )


def _wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


class RFAConv(Function):
    """Of ``rfa_conv``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        attention: Tensor,
        feature: Tensor,
        shift: Tensor,
        relu: bool,
        weight: Tensor,
        bias: Tensor | None,
        *window_and_groups: Any,
    ) -> Tensor:
        """Convolve; see README.md."""
        ctx.save_for_backward(x, attention, feature, shift, weight)
        ctx.relu, ctx.window_and_groups = relu, window_and_groups
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = _ops.rfa_conv(
                x, attention, feature, shift, relu, weight, bias, *window_and_groups
            )
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, attention, feature, shift, weight and bias."""
        _refuse_second_derivative()
        x, attention, feature, shift, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        *features, of_weight, of_bias = _ops.rfa_conv_backward(
            *(grad_y, x, attention, feature, shift, ctx.relu, weight),
            (needs[0], any(needs[1:4]), needs[5], needs[6]),
            *ctx.window_and_groups,
        )
        return (
            *_wanted(features, needs[:4]),
            None,
            *_wanted((of_weight, of_bias), needs[5:7]),
            *(None,) * len(ctx.window_and_groups),
        )


class GatedConv(Function):
    """Of ``gated_conv``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        feature: Tensor,
        shift: Tensor,
        relu: bool,
        first: Tensor,
        second: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *window_and_groups: Any,
    ) -> Tensor:
        """Convolve; see README.md."""
        ctx.save_for_backward(x, feature, shift, first, second, weight)
        ctx.relu, ctx.window_and_groups = relu, window_and_groups
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = _ops.gated_conv(
                x, feature, shift, relu, first, second, weight, bias, *window_and_groups
            )
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, feature, shift, both gates, weight and bias."""
        _refuse_second_derivative()
        x, feature, shift, first, second, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        found = _ops.gated_conv_backward(
            *(grad_y, x, feature, shift, ctx.relu, first, second, weight),
            (needs[0], any(needs[1:3]), needs[6], needs[7]),
            *ctx.window_and_groups,
        )
        return (
            *_wanted(found[:3], needs[:3]),
            None,
            *_wanted(found[3:], needs[4:8]),
            *(None,) * len(ctx.window_and_groups),
        )


class PoolChannels(Function):
    """Of ``pool_channels``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        feature: Tensor,
        shift: Tensor,
        relu: bool,
        indexed: bool,
        *window: Any,
    ) -> tuple[Tensor, Tensor]:
        """Pool; see README.md."""
        ctx.relu, ctx.window = relu, window
        with torch._C._AutoDispatchBelowAutograd():
            pooled, largest = _ops.pool_channels(x, feature, shift, relu, True, *window)
        ctx.save_for_backward(x, feature, shift, largest)
        ctx.mark_non_differentiable(largest)
        return pooled, largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, feature and shift."""
        _refuse_second_derivative()
        x, feature, shift, largest = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = _ops.pool_channels_backward(
            grad, x, feature, shift, ctx.relu, largest, (needs[0], any(needs[1:])), *ctx.window
        )
        return *_wanted(found, needs), None, None, *(None,) * len(ctx.window)


class PoolCoordinates(Function):
    """Of ``pool_coordinates``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, feature: Tensor, shift: Tensor, relu: bool, *window: Any
    ) -> tuple[Tensor, Tensor]:
        """Pool; see README.md."""
        ctx.save_for_backward(x, feature, shift)
        ctx.relu, ctx.window = relu, window
        with torch._C._AutoDispatchBelowAutograd():
            rows, columns = _ops.pool_coordinates(x, feature, shift, relu, *window)
        return rows, columns

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, feature and shift."""
        _refuse_second_derivative()
        x, feature, shift = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = _ops.pool_coordinates_backward(
            *(grad_rows, grad_columns, x, feature, shift, ctx.relu),
            (needs[0], any(needs[1:])),
            *ctx.window,
        )
        return *_wanted(found, needs), None, *(None,) * len(ctx.window)


Folded = tuple[Tensor, Tensor, Tensor, Tensor]


def _fold(
    x: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    window: Window,
    group: Any = None,
) -> tuple[Folded, tuple[Tensor, ...], int | Tensor]:
    """Return the results of ``fold_batch_norm``, the statistics behind them and their count."""
    with no_autocast(x):
        first, second = _ops.window_moments(x, *window)
        mean, var = _response_moments(feature, first, second)
        total, mean, var = _over_ranks(window.count(x), mean, var, group)
        r = torch.rsqrt(var + eps)
        scale = r if weight is None else r * weight
        shift = -scale * mean
        shift = shift if bias is None else shift + bias
        unbiased = var * (total / (total - 1))
        folded = feature * scale.view(-1, 1, 1, 1), shift, mean, unbiased
    return folded, (first, second, mean, r), total


class FoldBatchNorm(Function):
    """Of ``fold_batch_norm``; called by itself over several ranks, which no schema can name."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        feature: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        group: Any = None,
    ) -> Folded:
        """Fold; see README.md. ``group``: the process group to take the statistics over."""
        window = Window(kernel_size, stride, padding, dilation)
        with torch._C._AutoDispatchBelowAutograd():
            folded, kept, total = _fold(x, feature, weight, bias, eps, window, group)
        again = group is None and KEEP_FROM * sum(t.numel() for t in kept) > x.numel()
        ctx.save_for_backward(x, feature, weight, *((None,) * 4 if again else kept))
        ctx.again, ctx.window, ctx.eps, ctx.group, ctx.total = again, window, eps, group, total
        ctx.mark_non_differentiable(*folded[2:])
        return folded

    @staticmethod
    def backward(
        ctx: Any, of_folded: Tensor, of_shift: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, feature, weight and bias."""
        _refuse_second_derivative()
        x, feature, weight, first, second, mean, r = ctx.saved_tensors
        need_x, need_feature, need_weight, need_bias = ctx.needs_input_grad[:4]
        count = ctx.window.count(x)
        if ctx.again:
            first, second, mean, r = _fold(x, feature, weight, None, ctx.eps, ctx.window)[1]
        with no_autocast(x):
            scale = r if weight is None else r * weight
            of_scale = (of_folded * feature).sum((1, 2, 3)) - of_shift * mean
            of_r = of_scale if weight is None else of_scale * weight
            of_mean, of_var = -scale * of_shift, -0.5 * r**3 * of_r
            if ctx.group is not None:
                own = _response_moments(feature, first, second)[0]
                of_mean, of_var = _sum_over_ranks(of_mean, of_var, ctx.group)
                # This rank's statistics count by its share of the windows.
                share = count / ctx.total
                of_mean, of_var = share * (of_mean + 2 * of_var * (own - mean)), share * of_var
            channels, positions = first.shape
            of_mean, of_var = (t.view(channels, positions, 1) for t in (of_mean, of_var))
            kernels = feature.view(channels, positions, positions)
            of_feature: Tensor | None = None
            of_x: Tensor | None = None
            if need_feature:
                of_moments = of_mean * first.unsqueeze(1)
                of_moments = of_moments + 2 * of_var * torch.matmul(kernels, second)
                of_feature = scale.view(-1, 1, 1, 1) * of_folded + of_moments.view_as(feature)
            if need_x and count:
                slope = torch.matmul(kernels.mT, 2 * of_var * kernels) / count
                constant = (of_mean * kernels).sum(1) / count
                constant = constant - torch.matmul(slope, first.unsqueeze(2)).squeeze(2)
                of_x = _ops.window_moments_backward(x, slope, constant, *ctx.window)
        of_weight = of_scale * r if need_weight else None
        return of_x, of_feature, of_weight, of_shift if need_bias else None, *(None,) * 6


def _response_moments(feature: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (C * K,) of each response from those of the windows."""
    kernels = feature.view(second.shape)
    mean = (kernels * first.unsqueeze(1)).sum(2)
    # Rounding may leave a variance of zero a little below it.
    var = (torch.matmul(kernels, second) * kernels).sum(2).clamp_min(0)
    return mean.flatten(), var.flatten()


def _over_ranks(
    count: int, mean: Tensor, var: Tensor, group: Any
) -> tuple[int | Tensor, Tensor, Tensor]:
    """Combine count, mean and biased variance of all ranks; a rank may have no data."""
    if group is None:
        return count, mean, var
    own = torch.cat([mean, var, mean.new_full((1,), count)])
    ranks = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(ranks, own, group=group)
    everyone = torch.stack(ranks)
    counts = everyone[:, -1:]  # (ranks, 1)
    means, variances = everyone[:, :-1].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean).square())).sum(0) / total
    return total, mean, var


def _sum_over_ranks(of_mean: Tensor, of_var: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    sums = torch.stack([of_mean, of_var])
    torch.distributed.all_reduce(sums, group=group)
    return sums[0], sums[1]


def _fold_batch_norm(
    x: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Folded:
    window = Window(kernel_size, stride, padding, dilation)
    return _fold(x, feature, weight, bias, eps, window)[0]


LIBRARY.define(
    "fold_batch_norm(Tensor x, Tensor feature, Tensor? weight, Tensor? bias, float eps, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> "
    "(Tensor feature, Tensor shift, Tensor mean, Tensor variance)"
)
# Made of other operators, for every device.
LIBRARY.impl("fold_batch_norm", _fold_batch_norm, "CompositeExplicitAutograd")

_register("rfa_conv", RFAConv)
_register("gated_conv", GatedConv)
_register("pool_channels", PoolChannels)
_register("pool_coordinates", PoolCoordinates)
_register("fold_batch_norm", FoldBatchNorm)
