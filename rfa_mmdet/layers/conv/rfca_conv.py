"""RFCAConv: coordinate attention over receptive-field features.

Paper: arXiv 2304.03198 (RFAConv).

Differences from the published code: all arguments of Conv2d work; the windows are never laid out
side by side, because row and column means of that layout are means over windows (the same values).

With BN or no norm, and ReLU or no activation, kernels compute the same without storing all features
(``_fast_path.py``), in C++ on the CPU and in Triton on CUDA. Traces, exports and modified modules,
which must be called (``untouched.py``), always use the formula.
"""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from rfa_mmdet.layers.arguments import with_arguments_of
from rfa_mmdet.layers.attention.coord_att import CoordinateGates
from rfa_mmdet.layers.conv.receptive_field import ReceptiveFieldConv
from rfa_mmdet.layers.untouched import are_plain, dtype_of


@MODELS.register_module()
class RFCAConv(ReceptiveFieldConv):
    """Convolution with coordinate attention over its receptive-field features.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        norm_cfg, act_cfg, input_floor, backend: See
            :class:`~rfa_mmdet.layers.conv.receptive_field.ReceptiveFieldConv`.
        reduction (int): The attention's hidden width is C // reduction, at least 8.
            Defaults to 32.

    Raises:
        TypeError, ValueError: An argument or the input is invalid, or the chosen backend does not
            support it.
        RuntimeError: The chosen backend is not available in this process.

    Example:
        >>> import torch
        >>> conv = RFCAConv(16, 32, 3, stride=2)
        >>> conv(torch.rand(2, 16, 9, 12)).shape
        torch.Size([2, 32, 5, 6])
    """

    operators = ("pool_coordinates", "gated_conv")

    @with_arguments_of(ReceptiveFieldConv)
    def __init__(self, *args: Any, reduction: int = 32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.coordinate = CoordinateGates(self.in_channels, reduction)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make both gates 1/2."""
        convs = ("coordinate.conv_h", "coordinate.conv_w")
        return self._zeros(
            *(f"{conv}.{name}" for conv in convs for name in ("weight", "bias"))
        ), 1 / 4

    def compute(self, x: Tensor) -> Tensor:
        """Compute the output with the operators, or else with the formula."""
        features = self.window_features(x)
        if features is None:
            return self.by_formula(x)
        gates = self._gates(*features.coordinate_means())
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
        row_gate, column_gate = self._features_and_gates(x)[1]
        return (row_gate * column_gate).flatten(2, 3)

    def _features_and_gates(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the features, (B, C, kh, kw, h, w), and their gates."""
        kh, kw = self.kernel_size
        features = self.features(x)
        batch, channels, _, height, width = features.shape
        features = features.reshape(batch, channels, kh, kw, height, width)
        dtype = dtype_of(self.coordinate.conv1, x)
        rows, columns = features.mean((3, 5), dtype=dtype), features.mean((2, 4), dtype=dtype)
        row_gate, column_gate = [gate.to(features.dtype) for gate in self._gates(rows, columns)]
        return features, (row_gate[:, :, :, None, :, None], column_gate[:, :, None, :, None, :])

    def _gates(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates of rows and columns, (B, C, kh, h) and (B, C, kw, w), from their means.

        Row y * kh + i of the paper's layout is position i of window row y; the attention treats all
        rows alike, so their order does not matter.
        """
        # Concatenated, because flattening does not export with dynamic sizes.
        means = [torch.cat(side.unbind(2), dim=2) for side in (rows, columns)]
        if are_plain(CoordinateGates, self.coordinate):
            row_gate, column_gate = self.coordinate.gates(*means)  # (B, C, kh * h), (B, C, kw * w)
        else:  # one tensor, as hooks expect
            sizes = [side.shape[2] for side in means]
            row_gate, column_gate = self.coordinate(*means).split(sizes, dim=2)
        return row_gate.reshape(rows.shape), column_gate.reshape(columns.shape)
