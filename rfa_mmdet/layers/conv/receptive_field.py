"""What RFAConv, RFCBAMConv and RFCAConv have in common: features of the receptive field.

For each output cell and channel, K = kh * kw learnt responses to the window stand in for its K
values: F = act(norm(depthwise convolution)), (B, C, K, h, w). They are weighed, each method in
its own way, and the final convolution sums them up.
"""

from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.model import kaiming_init
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import boolean
from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.ops.windows import convolve_weighed_windows


class ReceptiveFieldConv(AttentionConv2d):
    """Base of the receptive-field convolutions.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        out_channels (int): O of the output (B, O, h, w).
        kernel_size, stride, padding, dilation, groups, padding_mode: As of
            :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        bias (bool): Of the final convolution.
        norm_cfg (dict | None): Norm of the features.
        act_cfg (dict | None): Their activation.
        learnt (bool): Whether the features are learnt; else they are the window's own values.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int] | None,
        dilation: int | tuple[int, int],
        groups: int,
        bias: bool,
        padding_mode: str,
        norm_cfg: dict | None,
        act_cfg: dict | None,
        learnt: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode
        )
        boolean("bias", bias)
        wide = in_channels * self.kernel_size[0] * self.kernel_size[1]  # C * K
        if learnt:
            self.feature = nn.Conv2d(
                in_channels,
                wide,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                groups=in_channels,
                bias=False,
                padding_mode=padding_mode,
            )
        self.norm = build_norm_layer(norm_cfg, wide)[1] if norm_cfg else nn.Identity()
        self.act = build_activation_layer(act_cfg) if act_cfg else nn.Identity()
        # Stride k over windows laid side by side, as the papers write it.
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            self.kernel_size,
            stride=self.kernel_size,
            groups=groups,
            bias=bias,
        )

    def init_weights(self) -> None:
        """Initialise anew; MMEngine calls this after a parent's ``init_cfg`` has filled the convs.

        The final convolution as every convolution of a ResNet, everything else as torch does,
        which is what the papers trained with. Kaiming's fan of the whole grouped convolution would
        start the features about C times too small.
        """
        for module in self.modules():
            if module is not self.conv and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        kaiming_init(self.conv)

    def features(self, x: Tensor) -> Tensor:
        """Return the receptive-field features, (B, C, K, h, w), of a map (B, C, H, W)."""
        features = self.act(self.norm(self.feature(x)))  # (B, C * K, h, w)
        batch, wide, height, width = features.shape
        # No -1 for K: an empty batch could not tell it.
        positions = wide // self.in_channels
        return features.reshape(batch, self.in_channels, positions, height, width)

    def convolve(self, windows: Tensor, gates: tuple[Tensor, Tensor]) -> Tensor:
        """Sum up weighed features: (B, C, K, h, w), or (B, C, kh, kw, h, w), to (B, O, h, w)."""
        return convolve_weighed_windows(
            windows, gates, self.conv.weight, self.conv.bias, self.groups
        )
