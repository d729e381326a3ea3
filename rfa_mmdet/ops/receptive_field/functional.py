"""Window features that are never materialised, and the operations on them.

The features would take K times the input's memory, and writing and reading them takes longer than
computing them. So the kernels compute them tile by tile where needed, forward and backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.autograd import FoldBatchNorm

_ops = torch.ops.rfa_mmdet


class WindowFeatures(NamedTuple):
    """Features of the windows of a map: act(feature @ window + shift), (B, C, K, h, w).

    :mod:`~rfa_mmdet.ops.receptive_field.backends` decides which kernels run. The results are
    differentiable once, in reverse mode.

    Attributes:
        x (Tensor): (B, C, H, W); its dtype is that of the results.
        feature (Tensor): (C * K, 1, kh, kw), depthwise kernels.
        shift (Tensor): (C * K,).
        relu (bool): Whether the activation is ReLU; otherwise there is none.
        window (Window): A window with K positions.

    Example:
        >>> from rfa_mmdet.ops.receptive_field.backends import missing
        >>> x, feature, shift = torch.rand(2, 4, 8, 9), torch.rand(36, 1, 3, 3), torch.rand(36)
        >>> features = WindowFeatures(x, feature, shift, True, Window((3, 3), padding=(1, 1)))
        >>> if missing("cpu") is None:
        ...     assert features.max_and_mean().shape == (2, 2, 9, 8, 9)
    """

    x: Tensor
    feature: Tensor
    shift: Tensor
    relu: bool
    window: Window

    def attend(
        self, attention_weight: Tensor, weight: Tensor, bias: Tensor | None, groups: int
    ) -> Tensor:
        """Convolve the features, weighted by RFAConv's attention.

        Args:
            attention_weight (Tensor): (C * K, 1, 1, 1), weight of a grouped 1x1 convolution.
            weight (Tensor): (O, C / groups, kh, kw).
            bias (Tensor | None): (O,).
            groups (int): Groups of the convolution.

        Returns:
            Tensor: (B, O, h, w), in x's dtype.
        """
        x, feature, shift, relu, window = self
        weight, bias = self._in_type(weight, bias)
        y: Tensor = _ops.rfa_conv(
            x, attention_weight, feature, shift, relu, weight, bias, *window, groups
        )
        return y

    def max_and_mean(self) -> Tensor:
        """Return the maximum and the mean over the channels, (B, 2, K, h, w).

        The gradient of a maximum goes to the first channel that attains it.
        """
        indexed = torch.is_grad_enabled()
        pooled: Tensor = _ops.pool_channels(*self[:4], indexed, *self.window)[0]
        return pooled

    def coordinate_means(self) -> tuple[Tensor, Tensor]:
        """Return the row and column means of the windows laid out side by side.

        Returns:
            tuple[Tensor, Tensor]: (B, C, kh, h), with row y * kh + i at [..., i, y], and
            (B, C, kw, w).
        """
        rows, columns = _ops.pool_coordinates(*self[:4], *self.window)
        return rows, columns

    def convolve(
        self, gates: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None, groups: int
    ) -> Tensor:
        """Convolve the features, each multiplied by two gates.

        Args:
            gates (tuple[Tensor, Tensor]): Channel gates, (B, C), and position gates, (B, K, h, w);
                or row gates, (B, C, kh, h), and column gates, (B, C, kw, w).
            weight (Tensor): (O, C / groups, kh, kw).
            bias (Tensor | None): (O,).
            groups (int): Groups of the convolution.

        Returns:
            Tensor: (B, O, h, w), in x's dtype.
        """
        y: Tensor = _ops.gated_conv(
            *(*self[:4], *gates, *self._in_type(weight, bias), *self.window, groups)
        )
        return y

    def _in_type(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        dtype = self.x.dtype
        if weight.dtype == dtype and (bias is None or bias.dtype == dtype):
            return weight, bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)


def fold_batch_norm(
    x: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    window: Window,
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fold batch norm with batch statistics into the features that precede it.

    The statistics follow from the mean and covariance of the windows' values; see README.md.
    Compute the features, and nothing else, from the returned map rather than from x: its gradient
    then arrives here, and the gradient through the statistics is added in one pass, on a GPU in
    place.

    Args:
        x (Tensor): (B, C, H, W), as for :class:`WindowFeatures`.
        feature (Tensor): (C * K, 1, kh, kw), without the norm. This and the other parameters have
            the dtype of the statistics, at least float32.
        weight, bias (Tensor | None): Weight and bias of the norm, (C * K,). None means 1 and 0.
        eps (float): Added to the variance.
        window (Window): The window of the features.
        group (Any): Process group over which to take the statistics. None means only this process.

    Returns:
        tuple[Tensor, ...]: x, feature and shift for :class:`WindowFeatures`; mean and unbiased
        variance, (C * K,) each, without gradients.
    """
    if group is not None:
        found: tuple[Tensor, ...] = FoldBatchNorm.apply(
            x, feature, weight, bias, eps, *window, group
        )
    else:
        found = _ops.fold_batch_norm(x, feature, weight, bias, eps, *window)
    same, feature, shift, mean, var = found
    # Operators must not return their input; only the autograd function does.
    return same if same.dim() == x.dim() else x, feature, shift, mean, var
