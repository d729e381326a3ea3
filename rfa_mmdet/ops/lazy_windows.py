"""Features of windows that are never in memory as a whole: for inference on the CPU.

Gates that depend on sums over all features need them twice. The C++ kernels make them twice, tile
by tile, which costs less than to write and to read K times the input. What they compute stands in
``rfa_conv/cpu.py``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rfa_mmdet.ops.dispatch import autocast_dtype, choose_backend
from rfa_mmdet.ops.gated import is_recorded

Pair = tuple[int, int]


def can_be_lazy(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels can stand in for the formula here and now.

    They compute in inference only; what records a graph, counts operators or makes up tensors must
    see the formula.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): Of the convolution of the features.

    Example:
        >>> can_be_lazy(torch.rand(1, 2, 5, 5), torch.rand(3, 2, 3, 3))  # a gradient may be wanted
        False
    """
    if torch.is_grad_enabled() or is_recorded() or torch._C._len_torch_dispatch_stack():
        return False
    if x.device.type != "cpu" or x.numel() == 0:
        return False
    return choose_backend("auto", x, weight) == "cpu"


@dataclass(frozen=True)
class LazyFeatures:
    """Features act(feature window + shift), (B, C, K, h, w), K = kh * kw, of the windows of a map.

    Attributes:
        x (Tensor): (B, C, H, W) on the CPU, not empty.
        feature (Tensor): (C * K, 1, kh, kw), of a depthwise convolution.
        shift (Tensor | None): (C * K,).
        relu (bool): Whether ReLU is the activation; else there is none.
        stride, padding, dilation (tuple[int, int]): Of the windows; zero padding.

    Example:
        >>> x, feature = torch.rand(2, 4, 8, 9), torch.rand(36, 1, 3, 3)
        >>> features = LazyFeatures(x, feature, None, True, (1, 1), (1, 1), (1, 1))
        >>> with torch.no_grad():
        ...     if can_be_lazy(x, feature):
        ...         assert features.max_and_mean().shape == (2, 2, 9, 8, 9)
    """

    x: Tensor
    feature: Tensor
    shift: Tensor | None
    relu: bool
    stride: Pair
    padding: Pair
    dilation: Pair

    def max_and_mean(self) -> Tensor:
        """Return the maximum and the mean over the channels, (B, 2, K, h, w)."""
        return torch.ops.rfa_mmdet_cpu.pool_channels(*self._features(), *self._window())

    def coordinate_means(self) -> tuple[Tensor, Tensor]:
        """Return the means of the rows and columns of the windows laid side by side.

        Returns:
            tuple[Tensor, Tensor]: (B, C, kh, h), of row y * kh + i at [..., i, y], and
            (B, C, kw, w).
        """
        return torch.ops.rfa_mmdet_cpu.pool_coordinates(*self._features(), *self._window())

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
            Tensor: (B, O, h, w), in the type that a convolution computes in here.
        """
        features = self._features()
        weight = weight.flatten(2).to(features[0].dtype)
        return torch.ops.rfa_mmdet_cpu.forward_gated(
            *features, *gates, weight, bias, *self._window(), groups
        )

    def _features(self) -> tuple[Tensor, Tensor, Tensor, bool]:
        channels, positions = self.x.shape[1], self.feature.shape[2:].numel()
        shift = self.feature.new_zeros(len(self.feature)) if self.shift is None else self.shift
        return (
            self.x.to(autocast_dtype(self.x)),
            self.feature.reshape(channels, positions, positions),
            shift.reshape(channels, positions),
            self.relu,
        )

    def _window(self) -> tuple[Pair, ...]:
        return tuple(self.feature.shape[2:]), self.stride, self.padding, self.dilation
