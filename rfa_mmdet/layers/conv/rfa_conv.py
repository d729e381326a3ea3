"""RFAConv: receptive-field attention convolution.

Paper: "Receptive-Field Attention Convolution for Improving CNNs", earlier "RFAConv: Innovating
Spatial Attention and Standard Convolutional Operation", arXiv 2304.03198.

Differences from the published code: all arguments of Conv2d work (there, a second class of the same
name without stride shadows the first, dilation is ignored, and an assertion against even kernels
never fails); a 1x1 kernel is a plain convolution; the final convolution runs over channels instead
of a map enlarged k times (the same sum).
"""

from functools import wraps
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_mmdet.layers.arguments import int_pair, with_arguments_of
from rfa_mmdet.layers.conv._fast_path import Convs
from rfa_mmdet.layers.conv.receptive_field import ReceptiveFieldConv
from rfa_mmdet.layers.untouched import dtype_of, is_plain_conv
from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field import receptive_field_attention, receptive_field_mean


@MODELS.register_module()
class RFAConv(ReceptiveFieldConv):
    """Convolution with an attention over the K = kh * kw positions of each window.

    Like Conv2d, it has no norm or activation after the convolution: ConvModule and ResNet add
    theirs. A 1x1 window has nothing to attend to: ``RFAConv(C, O, 1)`` checks its arguments and
    returns a plain :class:`torch.nn.Conv2d`, without attention, norm and activation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        norm_cfg, act_cfg, input_floor, backend: See
            :class:`~rfa_mmdet.layers.conv.receptive_field.ReceptiveFieldConv`.
        feature (str): 'conv': features are learnt by a depthwise convolution. 'unfold': features
            are the window's own values; norm and activation still apply, so pass ``norm_cfg=None,
            act_cfg=None`` for the raw values. Defaults to 'conv'.

    Raises:
        TypeError, ValueError: An argument or the input is invalid, or the chosen backend does not
            support it.
        RuntimeError: The chosen backend is not available in this process.

    Example:
        >>> import torch
        >>> from mmcv.cnn import build_conv_layer
        >>> conv = build_conv_layer(dict(type="RFAConv"), 16, 32, 3, stride=2, padding=1)
        >>> conv(torch.rand(2, 16, 9, 12)).shape
        torch.Size([2, 32, 5, 6])
        >>> RFAConv(16, 32, 1)
        Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1))
    """

    operators = ("rfa_conv",)

    @with_arguments_of(ReceptiveFieldConv)
    def __init__(self, *args: Any, feature: str = "conv", **kwargs: Any) -> None:
        if feature not in ("conv", "unfold"):
            raise ValueError(f"feature={feature!r}: must be 'conv' or 'unfold'")
        super().__init__(*args, **kwargs)
        if feature == "unfold":
            self.register_module("feature", None)  # the operator rfa_conv then uses raw windows
        wide = self.in_channels * self.kernel_size[0] * self.kernel_size[1]  # C * K
        self.attention = nn.Conv2d(self.in_channels, wide, 1, groups=self.in_channels, bias=False)

    # For inspect.signature, which prefers __new__.
    @wraps(__init__, assigned=())  # type: ignore[misc]
    def __new__(
        cls,
        in_channels: Any = None,
        out_channels: Any = None,
        kernel_size: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the layer, or a plain convolution for a 1x1 window."""
        layer = super().__new__(cls)
        try:
            pointwise = int_pair("kernel_size", kernel_size, minimum=1) == (1, 1)
        except (TypeError, ValueError):  # __init__ raises the error
            return layer
        if not pointwise:
            return layer
        cls.__init__(
            layer, in_channels, out_channels, kernel_size, *args, **kwargs
        )  # checks the arguments
        return layer.plain_conv()

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that give each of the K positions the weight 1 / K."""
        return self._zeros("attention.weight"), 1 / (self.kernel_size[0] * self.kernel_size[1])

    def compute(self, x: Tensor) -> Tensor:
        """Compute the output with the operators, or else with the formula."""
        features = self.window_features(x)
        if features is not None:
            conv = self.conv
            return features.attend(self.attention.weight, conv.weight, conv.bias, self.groups)
        return self.by_formula(x)

    def formula(self, x: Tensor) -> Tensor:
        """Compute the output with all features in memory."""
        attention = self._attention(x)
        if self.feature is not None:
            windows = self.features(x)
        else:
            values = self.responses(x).unflatten(2, attention.shape[3:])
            windows = self.activated(self.norm(values))
        return self.convolve(windows * attention.to(windows.dtype))

    def responses(self, x: Tensor) -> Tensor:
        """Return the input of the norm; raw windows have their positions flattened."""
        if self.feature is not None:
            return super().responses(x)
        padded, padding = self.pad(x)
        return F.unfold(padded, self.kernel_size, self.dilation, padding, self.stride)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention weights of each window's positions, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, in_channels, H, W).

        Returns:
            Tensor: (B, in_channels, K, h, w); sums to 1 over K.
        """
        self.check_input(x)
        return self._attention(x)

    def _attention(self, x: Tensor) -> Tensor:
        padded, padding = self.pad(x)
        mean = receptive_field_mean(padded, self.kernel_size, self.stride, padding, self.dilation)
        attention = self.attention
        if self._is_attention(attention):
            return receptive_field_attention(mean, attention.weight)
        with no_autocast(mean):
            logits = attention(mean.to(dtype_of(attention, x)))  # (B, C * K, h, w)
        return torch.softmax(at_least_float32(logits).unflatten(1, (self.in_channels, -1)), dim=2)

    def _is_attention(self, conv: nn.Module) -> bool:
        """Return whether a module is the plain convolution of the means."""
        return is_plain_conv(conv, (1, 1), groups=self.in_channels)

    def uncalled(self, window: Window) -> Convs:
        """Return the convolutions that kernels bypass, and whether that is allowed."""
        attention = self.attention
        return [*super().uncalled(window), (attention, self._is_attention(attention))]
