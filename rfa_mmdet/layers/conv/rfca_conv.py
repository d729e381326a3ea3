"""RFCAConv: coordinate attention over the receptive-field features.

Paper: arXiv 2304.03198 (RFAConv).

What differs from the published code: every argument of Conv2d works; the windows are never laid
side by side, as the means of the rows and columns of that layout are means over windows (the same
numbers).

With batch norm or none and ReLU or none, kernels compute the same without storing all features
(``_fast_path.py``), in C++ on a CPU and by Triton on CUDA. Traces, exports and touched modules,
which must be called (``untouched.py``), always take the formula.
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
    """Convolution whose receptive-field features are weighed by row and by column.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: As of :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        norm_cfg, act_cfg, input_floor, backend: As of
            :class:`~rfa_mmdet.layers.conv.receptive_field.ReceptiveFieldConv`.
        reduction (int): The attention's hidden width is C // reduction, at least 8.
            Defaults to 32.

    Raises:
        TypeError, ValueError: An argument or the input is not as above.

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
        """Return values under which both gates are 1/2."""
        convs = ("coordinate.conv_h", "coordinate.conv_w")
        return self._zeros(
            *(f"{conv}.{name}" for conv in convs for name in ("weight", "bias"))
        ), 1 / 4

    def compute(self, x: Tensor) -> Tensor:
        """Compute what :meth:`forward` does, by the operators or by the formula."""
        features = self.window_features(x)
        if features is None:
            return self.by_formula(x)
        gates = self._gates(*features.coordinate_means())
        return features.convolve(gates, self.conv.weight, self.conv.bias, self.groups)

    def formula(self, x: Tensor) -> Tensor:
        """Compute what :meth:`forward` does, with the features in memory."""
        windows, gates = self._weighed(x)
        return self.convolve(windows, *gates)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return what the features of each window are weighed by, to be looked at.

        Args:
            x (Tensor): (B, in_channels, H, W), the layer's input.

        Returns:
            Tensor: (B, in_channels, K, h, w) in (0, 1).
        """
        self.check_input(x)
        row_gate, column_gate = self._weighed(x)[1]
        return (row_gate * column_gate).flatten(2, 3)

    def _weighed(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
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

        Row y * kh + i of the layout holds position i of row y of windows; the attention treats
        every row alike, so that their order does not matter.
        """
        # Concatenated, as flattening them does not export with dynamic sizes.
        means = [torch.cat(side.unbind(2), dim=2) for side in (rows, columns)]
        if are_plain(CoordinateGates, self.coordinate):
            row_gate, column_gate = self.coordinate.gates(*means)  # (B, C, kh * h), (B, C, kw * w)
        else:  # one tensor, as hooks expect
            sizes = [side.shape[2] for side in means]
            row_gate, column_gate = self.coordinate(*means).split(sizes, dim=2)
        return row_gate.reshape(rows.shape), column_gate.reshape(columns.shape)
