"""Features of windows that are never in memory as a whole, and what is made of them.

The features take K times the input's memory, and more time to write and to read again than to
compute. So the kernels compute them tile by tile wherever they are needed, forward and backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.autograd import FoldBatchNorm

_ops = torch.ops.rfa_mmdet


class WindowFeatures(NamedTuple):
    """Features of the windows of a map: act(feature @ window + shift), (B, C, K, h, w).

    Needs the operators' kernels on x's device, see :mod:`~rfa_mmdet.ops.receptive_field.backends`.
    What is made from the features is differentiable once, in reverse mode.

    Attributes:
        x (Tensor): (B, C, H, W), in the type to compute in.
        feature (Tensor): (C * K, 1, kh, kw), depthwise kernels.
        shift (Tensor): (C * K,).
        relu (bool): Whether ReLU is the activation; else there is none.
        window (Window): With K positions.

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
        """Convolve the features, weighed by RFAConv's attention.

        Args:
            attention_weight (Tensor): (C * K, 1, 1, 1), a grouped 1x1 convolution's weight.
            weight (Tensor): (O, C / groups, kh, kw).
            bias (Tensor | None): (O,).
            groups (int): Groups of the convolution.

        Returns:
            Tensor: (B, O, h, w), in x's type.
        """
        x, feature, shift, relu, window = self
        weight, bias = self._in_type(weight, bias)
        y: Tensor = _ops.rfa_conv(
            x, attention_weight, feature, shift, relu, weight, bias, *window, groups
        )
        return y

    def max_and_mean(self) -> Tensor:
        """Return the maximum and the mean over the channels, (B, 2, K, h, w).

        The gradient of the maximum is that of the first channel that has it.
        """
        indexed = torch.is_grad_enabled()
        pooled: Tensor = _ops.pool_channels(*self[:4], indexed, *self.window)[0]
        return pooled

    def coordinate_means(self) -> tuple[Tensor, Tensor]:
        """Return the means of the rows and columns of the windows laid side by side.

        Returns:
            tuple[Tensor, Tensor]: (B, C, kh, h), of row y * kh + i at [..., i, y], and
            (B, C, kw, w).
        """
        rows, columns = _ops.pool_coordinates(*self[:4], *self.window)
        return rows, columns

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
    """Fold batch norm, on the statistics of the batch, into the features that it follows.

    They follow from the means and the covariance of the windows' values: see README.md. Make the
    features, and nothing else, from the map that is returned, not from x: its gradient then arrives
    here, and the one through the statistics is added to it in one pass, on a GPU in place.

    Args:
        x (Tensor): (B, C, H, W), as of :class:`WindowFeatures`.
        feature (Tensor): (C * K, 1, kh, kw), before the norm, as all that follows in the type that
            statistics are computed in.
        weight, bias (Tensor | None): Of the norm, (C * K,). None: ones, zeros.
        eps (float): Added to the variance.
        window (Window): Of the features.
        group (Any): Process group over which the statistics are taken. None: this process alone.

    Returns:
        tuple[Tensor, ...]: x, feature and shift for :class:`WindowFeatures`; mean and unbiased
        variance, (C * K,) each, which carry no gradient.
    """
    if group is not None:
        found: tuple[Tensor, ...] = FoldBatchNorm.apply(
            x, feature, weight, bias, eps, *window, group
        )
    else:
        found = _ops.fold_batch_norm(x, feature, weight, bias, eps, *window)
    same, feature, shift, mean, var = found
    # An operator must not return its input; it does where it is recorded.
    return same if same.dim() == x.dim() else x, feature, shift, mean, var
