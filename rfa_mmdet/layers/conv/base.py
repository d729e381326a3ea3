"""The interface that mmcv and MMDetection expect from a convolution."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

from mmengine.model import kaiming_init
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_mmdet.layers.arguments import (
    LARGEST_WINDOW,
    boolean,
    check_feature_map,
    int_pair,
    positive_int,
)
from rfa_mmdet.layers.warm_start.start import Start, WarmStartable

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = get_args(PaddingMode)


class AttentionConv2d(WarmStartable):
    """Base class of attention convolutions, with the arguments and attributes of Conv2d.

    Unlike in Conv2d, the default ``padding`` keeps the size at stride 1, as in the papers. Even
    kernels have no such symmetric padding and need an explicit one.

    A state dict with a plain convolution's ``weight`` at this layer's place warm-starts it; see
    :mod:`rfa_mmdet.layers.warm_start.start`.

    Subclasses build the final convolution as ``conv``.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        out_channels (int): O of the output (B, O, h, w).
        kernel_size (int | tuple[int, int]): Size of the window.
        stride (int | tuple[int, int]): Stride of the window. Defaults to 1.
        padding (int | tuple[int, int] | None): Padding on each side. Defaults to None: dilation *
            (kernel_size - 1) / 2.
        dilation (int | tuple[int, int]): Spacing of the window's positions. Defaults to 1.
        groups (int): Groups of the final convolution; must divide both channel numbers. Defaults
            to 1.
        bias (bool): Whether the final convolution has a bias. Defaults to True.
        padding_mode (str): 'zeros', 'reflect', 'replicate' or 'circular'. Defaults to 'zeros'.

    Raises:
        TypeError, ValueError: An argument is invalid; the message names it and its value.
    """

    # mmcv's ConvModule copies these from its convolution.
    transposed = False
    output_padding = (0, 0)

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
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.out_channels = positive_int("out_channels", out_channels)
        self.kernel_size = int_pair("kernel_size", kernel_size, minimum=1)
        if math.prod(self.kernel_size) > LARGEST_WINDOW:
            raise ValueError(
                f"kernel_size={self.kernel_size}: must have at most {LARGEST_WINDOW} positions"
            )
        self.stride = int_pair("stride", stride, minimum=1)
        self.dilation = int_pair("dilation", dilation, minimum=1)
        self.padding = self._resolve_padding(padding)
        self.groups = positive_int("groups", groups)
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"groups={groups}: must divide in_channels={in_channels} "
                f"and out_channels={out_channels}"
            )
        self.with_bias = boolean("bias", bias)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={padding_mode!r}: must be one of {PADDING_MODES}")
        self.padding_mode = padding_mode

    def _resolve_padding(self, padding: Any) -> tuple[int, int]:
        if padding is not None:
            return int_pair("padding", padding, minimum=0)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(
                f"padding=None with the even kernel_size={self.kernel_size}: no symmetric padding "
                "keeps the size; pass padding, or an odd kernel_size"
            )
        sides = zip(self.dilation, self.kernel_size, strict=True)
        padding = tuple(d * (k - 1) // 2 for d, k in sides)
        return int_pair("padding=None, dilation * (kernel_size - 1) / 2", padding, minimum=0)

    def plain_conv(self) -> nn.Conv2d:
        """Return a new plain convolution with this layer's arguments."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.with_bias,
            self.padding_mode,
        )

    def check_input(self, x: Tensor) -> None:
        """Check the shape and dtype of an input.

        Args:
            x (Tensor): (B, C, H, W).

        Raises:
            TypeError, ValueError: ``x`` is not a floating-point tensor (B, in_channels, H, W), or
                is smaller than the window.
        """
        name = type(self).__name__
        check_feature_map(name, x, self.in_channels)
        # torch 2.1 cannot compile strict=True.
        sizes = zip(x.shape[2:], self.kernel_size, self.padding, self.dilation)  # noqa: B905
        for size, k, p, d in sizes:
            if size + 2 * p < d * (k - 1) + 1:
                raise ValueError(
                    f"{name}: input of shape {tuple(x.shape)} with padding={self.padding} is "
                    f"smaller than the window: kernel_size={self.kernel_size}, "
                    f"dilation={self.dilation}"
                )
            widest = size - 1 if self.padding_mode == "reflect" else size
            if self.padding_mode in ("reflect", "circular") and p > widest:
                raise ValueError(
                    f"{name}: padding={self.padding} with padding_mode={self.padding_mode!r} is "
                    f"wider than the input of shape {tuple(x.shape)} allows"
                )

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pad a map, unless the mode is zeros.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            tuple[Tensor, tuple[int, int]]: The map, and the zero padding still to be added.
        """
        if self.padding_mode == "zeros":
            return x, self.padding
        vertical, horizontal = self.padding
        x = F.pad(x, (horizontal, horizontal, vertical, vertical), mode=self.padding_mode)
        return x, (0, 0)

    def init_weights(self) -> None:
        """Reinitialise; MMEngine calls this after a parent's ``init_cfg``.

        Uses Kaiming initialisation for the final convolution, as in ResNet, and torch's defaults
        for everything else, as in the papers.
        """
        self.reset_attention()
        kaiming_init(self.conv)

    def apply(self, fn: Callable[[nn.Module], Any]) -> "AttentionConv2d":
        """Apply a function to all modules; a parent's ``init_cfg`` only to the final convolution.

        MMEngine applies it this way, but does not call :meth:`init_weights` where a container of
        torch, such as a head's ``nn.ModuleList``, is between the two.
        """
        super().apply(fn)
        if getattr(fn, "__module__", "") == kaiming_init.__module__ and self.start == Start():
            self.reset_attention()
        return self

    def reset_attention(self) -> None:
        """Reset everything except the final convolution to torch's defaults.

        A parent's Kaiming or normal initialisation uses the fan of all groups together, so it
        starts grouped convolutions far too small.
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self.conv and reset is not None:
                reset()

    def extra_repr(self) -> str:
        """Show Conv2d's arguments; submodules show the others."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text
