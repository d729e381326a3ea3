"""RFAConv: receptive-field attention convolution.

Paper: "RFAConv: Innovating Spatial Attention and Standard Convolutional Operation",
arXiv 2304.03198.

What differs from the published code: every argument of Conv2d works (there, a second class of
the same name without stride shadows the first, dilation is ignored, and an even kernel passes an
assertion that cannot fail); a 1x1 kernel is a plain convolution; the final convolution runs over
channels instead of a k-fold enlarged map (the same sum).
"""

from mmengine.registry import MODELS
from torch import Tensor, nn

from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.conv.receptive_field import ReceptiveFieldConv
from rfa_mmdet.ops.receptive_field import receptive_field_attention, receptive_field_mean, rfa_conv


@MODELS.register_module()
class RFAConv(ReceptiveFieldConv):
    """Convolution whose K = kh * kw window positions are weighed by an attention of their own.

    Arguments shared with Conv2d: see
    :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`. No norm or activation follows the
    convolution: ConvModule and ResNet add theirs.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        out_channels (int): O of the output (B, O, h, w).
        kernel_size (int | tuple[int, int]): A receptive field of one has nothing to weigh: a 1x1
            RFAConv is a plain convolution, without attention, norm and activation.
        stride (int | tuple[int, int]): Defaults to 1.
        padding (int | tuple[int, int] | None): Defaults to None: an odd kernel keeps the size.
        dilation (int | tuple[int, int]): Defaults to 1.
        groups (int): Of the final convolution. Defaults to 1.
        bias (bool): Of the final convolution. Defaults to True.
        padding_mode (str): Defaults to 'zeros'.
        norm_cfg (dict | None): Norm of the receptive-field features. Defaults to BN.
        act_cfg (dict | None): Their activation. Defaults to ReLU.
        feature (str): 'conv': the features are learnt by a depthwise convolution. 'unfold': they
            are the window's own values (then normalised and activated likewise; pass
            ``norm_cfg=None, act_cfg=None`` for the bare values). Defaults to 'conv'.
        input_floor (float): Lowest value of the input for which a warm start is exact; below 0 it
            needs ``bias=True``. Defaults to 0.
        backend (str): 'reference': plain torch. 'cpu', 'triton': kernels that keep no more for the
            backward than a plain convolution, for batch norm or none and ReLU or none, float32 and
            bfloat16 (Triton float16 as well, the CPU float64). 'auto': those of x's device where
            they can compute this, else the reference. Traces and exports always hold the reference.
            Defaults to 'auto'.

    Raises:
        TypeError, ValueError: An argument or the input is not as above, or the backend asked for by
            name cannot compute it.
        RuntimeError: The backend asked for by name is not available in this process.

    Example:
        >>> import torch
        >>> from mmcv.cnn import build_conv_layer
        >>> conv = build_conv_layer(dict(type="RFAConv"), 16, 32, 3, stride=2, padding=1)
        >>> conv(torch.rand(2, 16, 9, 12)).shape
        torch.Size([2, 32, 5, 6])
    """

    operators = ("rfa_conv",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        norm_cfg: dict | None = dict(type="BN"),
        act_cfg: dict | None = dict(type="ReLU", inplace=True),
        feature: str = "conv",
        input_floor: float = 0.0,
        backend: str = "auto",
    ) -> None:
        if feature not in ("conv", "unfold"):
            raise ValueError(f"feature={feature!r}: must be 'conv' or 'unfold'")
        window = (stride, padding, dilation, groups, bias, padding_mode)
        learnt = feature == "conv"
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            *window,
            norm_cfg,
            act_cfg,
            input_floor,
            backend,
            learnt,
        )
        if self.is_pointwise:
            del self.norm, self.act
            if learnt:
                del self.feature
            self.conv = nn.Conv2d(
                in_channels,
                out_channels,
                1,
                self.stride,
                self.padding,
                self.dilation,
                groups,
                bias,
                padding_mode,
            )
            return
        wide = in_channels * self.kernel_size[0] * self.kernel_size[1]  # C * K
        self.attention = nn.Conv2d(in_channels, wide, 1, groups=in_channels, bias=False)

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel is 1x1, and this layer a plain convolution."""
        return self.kernel_size == (1, 1)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return values under which each of the K positions weighs 1 / K."""
        if self.is_pointwise:
            return {}, 1.0
        return self._zeros("attention.weight"), 1 / (self.kernel_size[0] * self.kernel_size[1])

    def plain_obstacle(self) -> str:
        """Say why the features cannot be the window's own values; empty if they can."""
        return "" if self.is_pointwise else super().plain_obstacle()

    def plain_start(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return values under which this layer computes what a plain convolution does."""
        if self.is_pointwise:
            return AttentionConv2d.plain_start(self, weight, bias)
        return super().plain_start(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x (Tensor): (B, in_channels, H, W).

        Returns:
            Tensor: (B, out_channels, h, w).
        """
        self.check_input(x)
        if self.is_pointwise:
            return self.conv(x)
        features = self.window_features(x)
        if features is not None:
            conv = self.conv
            return features.attend(self.attention.weight, conv.weight, conv.bias, self.groups)
        padded, padding = self.pad(x)
        return rfa_conv(
            padded,
            self.attention.weight,
            self.feature.weight if hasattr(self, "feature") else None,
            self.conv.weight,
            self.conv.bias,
            norm=self.norm,
            act=self.act,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def attention_map(self, x: Tensor) -> Tensor:
        """Return how the positions of each window are weighed, to be looked at.

        Args:
            x (Tensor): (B, in_channels, H, W), the layer's input.

        Returns:
            Tensor: (B, in_channels, K, h, w), sums to 1 over K.

        Raises:
            ValueError: The kernel is 1x1: there is no attention.
        """
        if self.is_pointwise:
            raise ValueError("kernel_size=(1, 1): a 1x1 RFAConv is a plain convolution")
        self.check_input(x)
        padded, padding = self.pad(x)
        mean = receptive_field_mean(padded, self.kernel_size, self.stride, padding, self.dilation)
        return receptive_field_attention(mean, self.attention.weight)
