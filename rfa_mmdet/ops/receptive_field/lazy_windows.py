"""Features of windows that are never in memory as a whole, on the CPU.

Gates that depend on sums over all features need these twice, and their gradients once more. The C++
kernels make the features anew, tile by tile, each time: that costs less than to write and to read K
times the input, and little more than the input is kept for the backward pass. What the kernels
compute stands in ``rfa_conv/cpu.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rfa_mmdet.ops.common.precision import no_autocast
from rfa_mmdet.ops.common.recompute import is_recorded
from rfa_mmdet.ops.receptive_field.autograd import response_statistics, scale_and_shift
from rfa_mmdet.ops.receptive_field.dispatch import choose_backend
from rfa_mmdet.ops.receptive_field.schema import are_worth_keeping, compute_dtype, output_size

Pair = tuple[int, int]


def can_be_lazy(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can stand in for the formula here and now.

    What records a graph, counts operators or makes up tensors must see the formula.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): Of the convolution of the features.

    Example:
        >>> can_be_lazy(torch.rand(1, 2, 5, 5).double(), torch.rand(3, 2, 3, 3).double())
        False
    """
    if is_recorded() or torch._C._len_torch_dispatch_stack() or any(map(_is_made_up, (x, weight))):
        return False
    if x.device.type != "cpu" or x.numel() == 0:
        return False
    return choose_backend("auto", x, weight) == "cpu"


def _is_made_up(tensor: Tensor) -> bool:
    """Whether it has rules of its own for operators: fake, or distributed, for example."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


@dataclass(frozen=True)
class LazyFeatures:
    """Features of the windows of a map: act(feature @ window + shift), (B, C, K, h, w).

    With K = kh * kw. All that is made from them is differentiable once, in reverse mode.

    Attributes:
        x (Tensor): (B, C, H, W) on the CPU, not empty, in the type to compute in.
        feature (Tensor): (C, K, K).
        shift (Tensor): (C, K).
        relu (bool): Whether ReLU is the activation; else there is none.
        kernel_size, stride, padding, dilation (tuple[int, int]): Of the windows; zero padding.

    Example:
        >>> x, feature, shift = torch.rand(2, 4, 8, 9), torch.rand(4, 9, 9), torch.rand(4, 9)
        >>> features = LazyFeatures(x, feature, shift, True, (3, 3), (1, 1), (1, 1), (1, 1))
        >>> if can_be_lazy(x, feature):
        ...     assert features.max_and_mean().shape == (2, 2, 9, 8, 9)
    """

    x: Tensor
    feature: Tensor
    shift: Tensor
    relu: bool
    kernel_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    def max_and_mean(self) -> Tensor:
        """Return the maximum and the mean over the channels, (B, 2, K, h, w).

        The gradient of the maximum is that of the first channel that has it.
        """
        if torch.is_grad_enabled():
            return _PoolChannels.apply(*self._features(), self._window())
        return _ops().pool_channels(*self._features(), False, *self._window())[0]

    def coordinate_means(self) -> tuple[Tensor, Tensor]:
        """Return the means of the rows and columns of the windows laid side by side.

        Returns:
            tuple[Tensor, Tensor]: (B, C, kh, h), of row y * kh + i at [..., i, y], and
            (B, C, kw, w).
        """
        return _PoolCoordinates.apply(*self._features(), self._window())

    def convolve(
        self, gates: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None, groups: int
    ) -> Tensor:
        """Convolve the features, each multiplied by two gates.

        Args:
            gates (tuple[Tensor, Tensor]): Of channels, (B, C), and positions, (B, K, h, w); or of
                rows, (B, C, kh, h), and columns, (B, C, kw, w).
            weight (Tensor): (O, C / groups, kh, kw).
            bias (Tensor | None): (O,).
            groups (int): Groups of the convolution.

        Returns:
            Tensor: (B, O, h, w), in x's type.
        """
        dtype = self.x.dtype
        weight, bias = weight.flatten(2).to(dtype), None if bias is None else bias.to(dtype)
        return _Convolve.apply(*self._features(), *gates, weight, bias, self._window(), groups)

    def _features(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        return self.x, self.feature, self.shift, self.relu

    def _window(self) -> tuple[Pair, ...]:
        return self.kernel_size, self.stride, self.padding, self.dilation


def fold_batch_norm(
    x: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    window: tuple[Pair, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fold batch norm, on the statistics of the batch, into the features that it follows.

    They follow from the means and the covariance of the windows' values: see
    ``rfa_conv/function.py``.

    Args:
        x (Tensor): (B, C, H, W), as of :class:`LazyFeatures`.
        feature (Tensor): (C, K, K), before the norm.
        weight, bias (Tensor | None): Of the norm, (C * K,). None: ones, zeros.
        eps (float): Added to the variance.
        window (tuple): kernel_size, stride, padding and dilation.

    Returns:
        tuple[Tensor, Tensor, Tensor, Tensor]: Feature and shift for :class:`LazyFeatures`; mean and
        biased variance, (C, K) each, which carry no gradient.
    """
    dtype = compute_dtype(x)
    tensors = (t if t is None else t.to(dtype) for t in (feature, weight, bias))
    return _FoldBatchNorm.apply(x, *tensors, eps, window)


def _ops():
    return torch.ops.rfa_mmdet_cpu


def _fold(
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, var = response_statistics(feature, first, second)
    r = torch.rsqrt(var + eps)
    scale, shift = scale_and_shift(mean, weight, bias, mean, r, mean.dtype)
    return feature * scale.unsqueeze(2), shift, mean, var


class _FoldBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, feature, weight, bias, eps, window):
        statistics = _ops().moments(x, *window)
        with no_autocast(x):
            folded, shift, mean, var = _fold(feature, weight, bias, *statistics, eps)
        statistics = statistics if are_worth_keeping(statistics, x) else (None, None)
        ctx.save_for_backward(x, feature, weight, bias, *statistics)
        ctx.eps, ctx.window = eps, window
        ctx.mark_non_differentiable(mean, var)
        return folded, shift, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_feature, grad_shift, *_):
        x, *parameters, first, second = ctx.saved_tensors
        if first is None:
            first, second = _ops().moments(x, *ctx.window)
        inputs = [*parameters, first, second]
        inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
        given = [t for t in inputs if t is not None]
        with torch.enable_grad(), no_autocast(x):
            folded = _fold(*inputs, ctx.eps)[:2]
        found = iter(torch.autograd.grad(folded, given, (grad_feature, grad_shift)))
        *gradients, of_first, of_second = (t if t is None else next(found) for t in inputs)
        grad_x = None
        if ctx.needs_input_grad[0]:
            with no_autocast(x):
                grad_x = _through_moments(x, first, of_first, of_second, ctx.window).to(x.dtype)
        return grad_x, *gradients, None, None


def _through_moments(
    x: Tensor, first: Tensor, of_first: Tensor, of_second: Tensor, window: tuple[Pair, ...]
) -> Tensor:
    """Return the gradient of x from those of the windows' means and covariance."""
    height, width = output_size(x, *window)
    count = x.shape[0] * height * width
    Q = (of_second + of_second.mT) / count
    constant = of_first / count - torch.matmul(Q, first.unsqueeze(2)).squeeze(2)
    grad_x = torch.zeros_like(x, dtype=Q.dtype, memory_format=torch.contiguous_format)
    _ops().correct_input_gradient(grad_x, x, -Q, -constant, *window)
    return grad_x


def _wanted(found: tuple[Tensor, ...], needs: Sequence[bool], like: Sequence) -> list:
    """Return gradients in the types of their tensors; None for those that are not needed."""
    triples = zip(found, needs, like, strict=True)
    return [gradient.to(of.dtype) if need else None for gradient, need, of in triples]


def _through_pool(ctx, operator, grads: tuple, inputs: Sequence[Tensor], *largest: Tensor) -> tuple:
    """Return the gradients of a pool's inputs: x, feature, shift, and two that are no tensors."""
    needs = ctx.needs_input_grad[:3]
    of_x, of_shift, products = operator(
        *(*grads, *inputs, ctx.relu, *largest, (needs[0], needs[1] or needs[2])), *ctx.window
    )
    return *_wanted((of_x, products, of_shift), needs, inputs), None, None


class _PoolChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, feature, shift, relu, window):
        pooled, largest = _ops().pool_channels(x, feature, shift, relu, True, *window)
        ctx.save_for_backward(x, feature, shift, largest)
        ctx.relu, ctx.window = relu, window
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, largest = ctx.saved_tensors
        return _through_pool(ctx, _ops().pool_channels_backward, (grad,), inputs, largest)


class _PoolCoordinates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, feature, shift, relu, window):
        ctx.save_for_backward(x, feature, shift)
        ctx.relu, ctx.window = relu, window
        return _ops().pool_coordinates(x, feature, shift, relu, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_columns):
        grads = grad_rows, grad_columns
        return _through_pool(ctx, _ops().pool_coordinates_backward, grads, ctx.saved_tensors)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, feature, shift, relu, first, second, weight, bias, window, groups):
        ctx.save_for_backward(x, feature, shift, first, second, weight, bias)
        ctx.relu, ctx.window, ctx.groups = relu, window, groups
        return _ops().forward_gated(
            x, feature, shift, relu, first, second, weight, bias, *window, groups
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, feature, shift, first, second, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_x, of_shift, products, *others = _ops().backward_gated(
            *(grad_y, x, feature, shift, ctx.relu, first, second, weight),
            *((needs[0], needs[1] or needs[2], needs[6], needs[7]), *ctx.window, ctx.groups),
        )
        needs = (*needs[:3], *needs[4:8])
        like = (x, feature, shift, first, second, weight, bias)
        found = _wanted((of_x, products, of_shift, *others), needs, like)
        return *found[:3], None, *found[3:], None, None
