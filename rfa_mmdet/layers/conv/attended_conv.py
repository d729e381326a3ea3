"""CAMConv, CBAMConv and CAConv: attention on the input, then a convolution.

Paper: arXiv 2304.03198 (RFAConv), which uses them as baselines. The attentions are this package's
plug-ins for CBAM (arXiv 1807.06521) and coordinate attention (arXiv 2103.02907).

Differences from the published code: descriptive parameter names (published_names.py has both),
plain means and maxima instead of adaptive pooling, so dynamic sizes export, and float32 gates under
mixed precision.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from rfa_mmdet.layers.arguments import LARGEST_SIDE, odd_int, with_arguments_of
from rfa_mmdet.layers.attention.cbam import CBAM, ChannelAttention
from rfa_mmdet.layers.attention.coord_att import CoordAtt
from rfa_mmdet.layers.conv.base import AttentionConv2d

Attention = ChannelAttention | CBAM | CoordAtt


class AttendedConv(AttentionConv2d):
    """Base class: applies ``attention`` to the input, then ``conv``.

    Args:
        attention (Callable): Builds the attention from ``in_channels``. The attention keeps the
            shape (B, in_channels, H, W).
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
    """

    @with_arguments_of(AttentionConv2d)
    def __init__(self, attention: Callable[[int], Attention], /, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention = attention(self.in_channels)
        self.conv = self.plain_conv()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention, then the convolution.

        Args:
            x (Tensor): (B, in_channels, H, W).

        Returns:
            Tensor: (B, out_channels, h, w).
        """
        self.check_input(x)
        out: Tensor = self.conv(self.attention(x))
        return out

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention weights of the input, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, in_channels, H, W).

        Returns:
            Tensor: (B, in_channels, H, W) in (0, 1), with size 1 in dimensions that share a weight.
        """
        self.check_input(x)
        return self.attention.attention_map(x)


@MODELS.register_module()
class CAMConv(AttendedConv):
    """CBAM's channel attention, then a convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        reduction (int): The attention's hidden width is C // reduction, at least 1.
            Defaults to 16.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> import torch
        >>> CAMConv(16, 32, 3, stride=2)(torch.rand(2, 16, 9, 12)).shape
        torch.Size([2, 32, 5, 6])
    """

    @with_arguments_of(AttendedConv)
    def __init__(self, *args: Any, reduction: int = 16, **kwargs: Any) -> None:
        super().__init__(partial(ChannelAttention, reduction=reduction), *args, **kwargs)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make every gate 1/2."""
        return self._zeros("attention.mlp.2.weight"), 1 / 2


@MODELS.register_module()
class CBAMConv(AttendedConv):
    """CBAM, then a convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        reduction (int): The channel attention's hidden width is C // reduction, at least 1.
            Defaults to 16.
        spatial_kernel_size (int): Kernel size of the spatial attention, odd. Defaults to 7.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> import torch
        >>> CBAMConv(16, 32, 3, stride=2)(torch.rand(2, 16, 9, 12)).shape
        torch.Size([2, 32, 5, 6])
    """

    @with_arguments_of(AttendedConv)
    def __init__(
        self, *args: Any, reduction: int = 16, spatial_kernel_size: int = 7, **kwargs: Any
    ) -> None:
        # Checked here for the right name in the error: kernel_size is another argument.
        odd_int("spatial_kernel_size", spatial_kernel_size, LARGEST_SIDE)
        attention = partial(CBAM, reduction=reduction, kernel_size=spatial_kernel_size)
        super().__init__(attention, *args, **kwargs)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make both gates 1/2."""
        names = ("attention.channel.mlp.2.weight", "attention.spatial.weight")
        return self._zeros(*names), 1 / 4


@MODELS.register_module()
class CAConv(AttendedConv):
    """Coordinate attention, then a convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        reduction (int): The attention's hidden width is C // reduction, at least 8.
            Defaults to 32.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> import torch
        >>> CAConv(16, 32, 3, stride=2)(torch.rand(2, 16, 9, 12)).shape
        torch.Size([2, 32, 5, 6])
    """

    @with_arguments_of(AttendedConv)
    def __init__(self, *args: Any, reduction: int = 32, **kwargs: Any) -> None:
        super().__init__(partial(CoordAtt, reduction=reduction), *args, **kwargs)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that make both gates 1/2."""
        convs = ("attention.conv_h", "attention.conv_w")
        return self._zeros(
            *(f"{conv}.{name}" for conv in convs for name in ("weight", "bias"))
        ), 1 / 4
