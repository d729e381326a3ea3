"""Gradients of the operators, registered for their Autograd key.

They save the input, the parameters and, if small compared with the input, the batch statistics. The
backward pass recomputes everything else. README.md derives the formulas.
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
from rfa_mmdet.ops.receptive_field.statistics import (
    fold_responses,
    gradients_through_moments,
    response_gradients,
    response_moments,
)

# Save the batch statistics if the input has at least this many times as many elements.
KEEP_FROM = 12

_ops = torch.ops.rfa_mmdet


def _register(name: str, function: type[Function]) -> None:
    """Register an autograd function for an operator; it is bypassed if nothing needs a gradient."""
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


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


class RFAConv(Function):
    """Autograd function of ``rfa_conv``."""

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
        *features, grad_weight, grad_bias = _ops.rfa_conv_backward(
            *(grad_y, x, attention, feature, shift, ctx.relu, weight),
            (needs[0], any(needs[1:4]), needs[5], needs[6]),
            *ctx.window_and_groups,
        )
        return (
            *_needed(features, needs[:4]),
            None,
            *_needed((grad_weight, grad_bias), needs[5:7]),
            *(None,) * len(ctx.window_and_groups),
        )


class GatedConv(Function):
    """Autograd function of ``gated_conv``."""

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
            *_needed(found[:3], needs[:3]),
            None,
            *_needed(found[3:], needs[4:8]),
            *(None,) * len(ctx.window_and_groups),
        )


class PoolChannels(Function):
    """Autograd function of ``pool_channels``."""

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
        return *_needed(found, needs), None, None, *(None,) * len(ctx.window)


class PoolCoordinates(Function):
    """Autograd function of ``pool_coordinates``."""

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
        return *_needed(found, needs), None, *(None,) * len(ctx.window)


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
    """Return the results of ``fold_batch_norm``, the statistics they use, and their count."""
    with no_autocast(x):
        first, second = _ops.window_moments(x, *window)
        total: int | Tensor = window.count(x)
        if group is None:
            found = _ops.fold_moments(first, second, feature, weight, bias, eps, total)
        else:
            own = response_moments(feature, first, second)
            total, mean, var = _over_ranks(window.count(x), *own, group)
            found = fold_responses(feature, weight, bias, eps, mean, var, total)
    folded, shift, mean, unbiased, inverse = found
    return (folded, shift, mean, unbiased), (first, second, mean, inverse), total


class FoldBatchNorm(Function):
    """Autograd function of ``fold_batch_norm``.

    SyncBN calls it directly, because a schema cannot have a process group as an argument.
    """

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
    ) -> tuple[Tensor, ...]:
        """Fold; see README.md. Statistics are over ``group``, a process group, if given."""
        window = Window(kernel_size, stride, padding, dilation)
        with torch._C._AutoDispatchBelowAutograd():
            folded, kept, total = _fold(x, feature, weight, bias, eps, window, group)
        again = group is None and KEEP_FROM * sum(t.numel() for t in kept) > x.numel()
        ctx.save_for_backward(x, feature, weight, *((None,) * 4 if again else kept))
        ctx.again, ctx.window, ctx.eps, ctx.group, ctx.total = again, window, eps, group, total
        ctx.mark_non_differentiable(*folded[2:], *(() if ctx.needs_input_grad[0] else (x,)))
        ctx.set_materialize_grads(False)
        return x, *folded

    @staticmethod
    def backward(
        ctx: Any,
        grad_x: Tensor | None,
        grad_folded: Tensor | None,
        grad_shift: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, feature, weight and bias.

        The operators on features pass the gradient of x to this function, which adds its part.
        """
        _refuse_second_derivative()
        x, feature, weight, first, second, mean, inverse = ctx.saved_tensors
        need_x, need_feature, need_weight, need_bias = ctx.needs_input_grad[:4]
        count = ctx.window.count(x)
        if ctx.again:
            kept = _fold(x, feature, weight, None, ctx.eps, ctx.window)[1]
            first, second, mean, inverse = kept
        grad_folded = torch.zeros_like(feature) if grad_folded is None else grad_folded
        grad_shift = torch.zeros_like(mean) if grad_shift is None else grad_shift
        with no_autocast(x):
            if ctx.group is None:
                grad_feature, grad_weight, slope, constant = _ops.fold_moments_backward(
                    grad_folded, grad_shift, feature, weight, first, second, mean, inverse, count
                )
            else:
                grad_scale, grad_mean, grad_var, scale = response_gradients(
                    grad_folded, grad_shift, feature, weight, mean, inverse
                )
                own = response_moments(feature, first, second)[0]
                grad_mean, grad_var = _sum_over_ranks(grad_mean, grad_var, ctx.group)
                # Weight this rank's statistics by its share of the windows.
                share = count / ctx.total
                grad_mean, grad_var = (
                    share * (grad_mean + 2 * grad_var * (own - mean)),
                    share * grad_var,
                )
                through, slope, constant = gradients_through_moments(
                    grad_mean, grad_var, feature, first, second, count
                )
                grad_feature = torch.addcmul(through, scale.view(-1, 1, 1, 1), grad_folded)
                grad_weight = grad_scale * inverse
            if need_x and count and grad_x is not None and _is_to_spare(grad_x):
                _ops.add_window_moments_backward(grad_x, x, slope, constant, *ctx.window)
            elif need_x and count:
                grad_x = _ops.window_moments_backward(x, slope, constant, grad_x, *ctx.window)
        return (
            *(
                grad_x,
                *_needed(
                    (grad_feature, grad_weight, grad_shift), (need_feature, need_weight, need_bias)
                ),
            ),
            *(None,) * 6,
        )


def _is_to_spare(grad: Tensor) -> bool:
    """Return whether the gradient of the map that ``fold_batch_norm`` returned may be overwritten.

    Only the operators on features, or a sum of their results, produce it, so nothing else reads it.
    On a CPU, a second map costs no time; compilers plan memory themselves.
    """
    if grad.device.type == "cpu" or is_compiling():
        return False
    return grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last)


def _over_ranks(
    count: int, mean: Tensor, var: Tensor, group: Any
) -> tuple[int | Tensor, Tensor, Tensor]:
    """Combine count, mean and biased variance over all ranks; ranks without data are allowed."""
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


def _sum_over_ranks(grad_mean: Tensor, grad_var: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    sums = torch.stack([grad_mean, grad_var])
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
) -> tuple[Tensor, ...]:
    window = Window(kernel_size, stride, padding, dilation)
    return x.new_empty(0), *_fold(x, feature, weight, bias, eps, window)[0]


LIBRARY.define(
    "fold_batch_norm(Tensor x, Tensor feature, Tensor? weight, Tensor? bias, float eps, "
    "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> "
    "(Tensor x, Tensor feature, Tensor shift, Tensor mean, Tensor variance)"
)
# Composed of other operators, for every device.
LIBRARY.impl("fold_batch_norm", _fold_batch_norm, "CompositeExplicitAutograd")

_register("rfa_conv", RFAConv)
_register("gated_conv", GatedConv)
_register("pool_channels", PoolChannels)
_register("pool_coordinates", PoolCoordinates)
_register("fold_batch_norm", FoldBatchNorm)
