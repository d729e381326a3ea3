"""RFCBAMConv: CBAM over receptive-field features.

Paper: arXiv 2304.03198 (RFAConv).

Differences from the published code: all arguments of Conv2d work; the windows are laid out side by
side only for the two-channel map of the spatial attention, not for the features (the same values).
As there, the channel weights come from the input, through a hidden width of 16 (the published
argument is ``ratio``), and the spatial weights from the unweighted features.

With BN or no norm, and ReLU or no activation, kernels compute the same without storing all features
(``_fast_path.py``), in C++ on the CPU and in Triton on CUDA. Traces, exports and modified modules,
which must be called (``untouched.py``), always use the formula. If several channels share the
maximum, the kernels pass the gradient to the first one, the formula to all.
"""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import positive_int, with_arguments_of
from rfa_mmdet.layers.attention.cbam import cell_gate
from rfa_mmdet.layers.attention.se import ChannelGate
from rfa_mmdet.layers.conv.receptive_field import ReceptiveFieldConv
from rfa_mmdet.layers.untouched import dtype_of
from rfa_mmdet.ops.common.reductions import max_and_mean
from rfa_mmdet.ops.common.windows import lay_out, take_apart


@MODELS.register_module()
class RFCBAMConv(ReceptiveFieldConv):
    """Convolution with channel and spatial attention over its receptive-field features.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        norm_cfg, act_cfg, input_floor, backend: See
            :class:`~rfa_mmdet.layers.conv.receptive_field.ReceptiveFieldConv`.
        hidden_channels (int): Hidden width of the channel attention. Defaults to 16.

    Raises:
        TypeError, ValueError: An argument or the input is invalid, or the chosen backend does not
            support it.
        RuntimeError: The chosen backend is not available in this process.

    Example:
        >>> conv = RFCBAMConv(16, 32, 3, stride=2)
        >>> conv(torch.rand(2, 16, 9, 12)).shape
        torch.Size([2, 32, 5, 6])
    """

    operators = ("pool_channels", "gated_conv")

    @with_arguments_of(ReceptiveFieldConv)
    def __init__(self, *args: Any, hidden_channels: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SE itself accepts None, which means a width by reduction.
        hidden_channels = positive_int("hidden_channels", hidden_channels)
        self.se = ChannelGate(self.in_channels, hidden_channels=hidden_channels)
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make both gates 1/2."""
        return self._zeros("se.fc.2.weight", "spatial.weight"), 1 / 4

    def compute(self, x: Tensor) -> Tensor:
        """Compute the output with the operators, or else with the formula."""
        features = self.window_features(x)
        if features is None:
            return self.by_formula(x)
        channel, spatial = self._gates(x, features.max_and_mean())
        gates = channel.flatten(1), spatial.flatten(1, 2)
        return features.convolve(gates, self.conv.weight, self.conv.bias, self.groups)

    def formula(self, x: Tensor) -> Tensor:
        """Compute the output with all features in memory."""
        windows, gates = self._features_and_gates(x)
        return self.convolve(windows, *gates)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention weights of each window's features, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, in_channels, H, W).

        Returns:
            Tensor: (B, in_channels, K, h, w) in (0, 1).
        """
        self.check_input(x)
        channel, spatial = self._features_and_gates(x)[1]
        return channel * spatial

    def _features_and_gates(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the features, (B, C, K, h, w), and their gates."""
        features = self.features(x)
        pooled = max_and_mean(features, 1, dtype_of(self.spatial, x), keepdim=False)
        channel, spatial = self._gates(x, torch.stack(pooled, dim=1))
        return features, (channel.to(features.dtype), spatial.to(features.dtype))

    def _gates(self, x: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates of channels and positions, (B, C, 1, 1, 1) and (B, 1, K, h, w).

        ``pooled`` is the maximum and mean of the features over the channels, (B, 2, K, h, w).
        """
        spatial = cell_gate(lay_out(pooled, self.kernel_size), self.spatial)  # (B, 1, hkh, wkw)
        return self.se(x).unsqueeze(4), take_apart(spatial, self.kernel_size)
