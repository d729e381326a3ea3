"""Base of RFAConv, RFCBAMConv and RFCAConv: receptive-field features.

For each output position and channel, K = kh * kw learnt responses replace the K values of the
window: F = act(norm(depthwise convolution)), (B, C, K, h, w). Each method weights them in its own
way, and the final convolution sums them up.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.logging import print_log
from torch import Tensor, nn

from rfa_mmdet.layers.arguments import with_arguments_of
from rfa_mmdet.layers.conv._checkpoint import keep_input_alone
from rfa_mmdet.layers.conv._fast_path import (
    Convs,
    check_choice,
    fold_norm,
    knows,
    window_features,
)
from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.untouched import dtype_of, is_plain_conv, must_be_called
from rfa_mmdet.layers.warm_start.first_steps import awaits_statistics, only_shifts, take_statistics
from rfa_mmdet.layers.warm_start.identity import identity_features, identity_norm, norm_obstacle
from rfa_mmdet.ops.common.precision import no_autocast
from rfa_mmdet.ops.common.recompute import is_recorded, needs_plain_operators, recomputes
from rfa_mmdet.ops.common.torch_versions import not_compiled
from rfa_mmdet.ops.common.windows import (
    Window,
    convolve_weighted_windows,
    convolve_windows,
    lay_out,
)
from rfa_mmdet.ops.receptive_field import WindowFeatures


class ReceptiveFieldConv(AttentionConv2d):
    """Base class of the receptive-field convolutions.

    If the norm trains on batch statistics, a warm-started layer calibrates itself to the first
    batch; see :mod:`rfa_mmdet.layers.warm_start.first_steps`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: See :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        norm_cfg (dict | None): Norm of the features. Defaults to BN.
        act_cfg (dict | None): Activation of the features. Defaults to ReLU.
        input_floor (float): Lower bound of the input, at most 0, down to which a warm start is
            exact; the activation clips anything below. 0 is right after a ReLU. With a negative
            value, the features start shifted by it, and the bias, which is required then, undoes
            the shift. Defaults to 0.
        backend (str): 'reference': the formula. 'cpu', 'triton': force kernels that do not store
            the features; they support BN or no norm, ReLU or no activation, float32 and bfloat16
            (Triton also float16, the CPU also float64). 'auto': the kernels for the input's
            device, or the same in plain torch if there are none; the formula for anything they do
            not support, and in traces and exports. Under SyncBatchNorm, all ranks use the formula
            if one must. Defaults to 'auto'.
    """

    # Operators of torch.ops.rfa_mmdet that the layer calls.
    operators: ClassVar[tuple[str, ...]]
    feature: nn.Conv2d  # None if RFAConv uses the window's own values
    # Whether the norm is past the warm start; checked in the first batches after loading.
    settled = True
    # Whether the first input after a warm start was compared with input_floor.
    floor_checked = True

    @with_arguments_of(AttentionConv2d)
    def __init__(
        self,
        *args: Any,
        norm_cfg: dict[str, Any] | None = dict(type="BN"),
        act_cfg: dict[str, Any] | None = dict(type="ReLU"),
        input_floor: float = 0.0,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.input_floor = self._check_floor(input_floor)
        wide = self.in_channels * self.kernel_size[0] * self.kernel_size[1]  # C * K
        # Registered before the convolution, because mmcv's fuse_conv_bn folds a norm that follows a
        # convolution into its bias, which is not used here.
        self.norm = build_norm_layer(norm_cfg, wide)[1] if norm_cfg else nn.Identity()
        self.feature = nn.Conv2d(
            self.in_channels,
            wide,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            groups=self.in_channels,
            bias=False,
            padding_mode=self.padding_mode,
        )
        self.act = build_activation_layer(act_cfg) if act_cfg else nn.Identity()
        self.backend = check_choice(backend, self.operators, self.norm, self.act)
        if self.input_floor < 0 and act_cfg and not norm_cfg:
            raise ValueError(
                f"input_floor={input_floor} with norm_cfg=None: the norm is needed to shift the "
                "features; pass a norm, or act_cfg=None, which clips nothing"
            )
        # Stride k over windows laid out side by side, as in the papers.
        self.conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.kernel_size,
            groups=self.groups,
            bias=self.with_bias,
        )

    def extra_repr(self) -> str:
        """Show Conv2d's arguments, input_floor and backend; submodules show the others."""
        text = super().extra_repr()
        if self.input_floor != 0:
            text += f", input_floor={self.input_floor}"
        if self.backend != "auto":
            text += f", backend={self.backend!r}"
        return text

    def _check_floor(self, input_floor: Any) -> float:
        if isinstance(input_floor, bool) or not isinstance(input_floor, (int, float)):
            raise TypeError(f"input_floor={input_floor!r}: must be a number")
        if not -math.inf < input_floor <= 0:
            raise ValueError(f"input_floor={input_floor}: must be finite and at most 0")
        if input_floor < 0 and not self.with_bias:
            raise ValueError(
                f"input_floor={input_floor} with bias=False: the bias is needed to undo the shift; "
                "pass bias=True"
            )
        return float(input_floor)

    def plain_obstacle(self) -> str:
        """Return why the features cannot be the window's own values; empty if they can."""
        if norm_obstacle(self.norm):
            return norm_obstacle(self.norm)
        if not isinstance(self.act, (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU)):
            return (
                f"its activation, {type(self.act).__name__}, is not the identity above 0; use ReLU"
            )
        return ""

    def plain_start(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return values that make this layer equal to a plain convolution.

        Holds for inputs of at least ``input_floor``, and with the norm on its running statistics.
        """
        values = super().plain_start(weight, bias)
        if self.feature is not None:
            values["feature.weight"] = identity_features(self.in_channels, self.kernel_size)
        floor = self._shift()
        for name, value in identity_norm(self.norm, floor).items():
            values[f"norm.{name}"] = value
        if floor:
            values["conv.bias"] = values["conv.bias"] + floor * weight.flatten(1).sum(1)
        return values

    def _load_from_state_dict(self, *args: Any) -> None:
        before = self.start
        super()._load_from_state_dict(*args)
        self.settled = False
        if self.start is not before:
            self.floor_checked = not self.start.plain or isinstance(self.act, nn.Identity)

    def init_weights(self) -> None:
        """Reinitialise; this ends a warm start."""
        super().init_weights()
        self.floor_checked = True

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x (Tensor): (B, in_channels, H, W).

        Returns:
            Tensor: (B, out_channels, h, w).
        """
        self.check_input(x)
        if not (self.floor_checked or is_recorded()):
            self._compare_with_floor(x)
        if self.settled or not self.norm.training or needs_plain_operators():
            return self.compute(x)
        return self._first_steps(x)

    def compute(self, x: Tensor) -> Tensor:
        """Compute the output with the operators, or else with the formula."""
        raise NotImplementedError

    @not_compiled
    def _first_steps(self, x: Tensor) -> Tensor:
        """Compute the output, and check whether the norm can use batch statistics yet."""
        if not self.floor_checked:  # forward() did not, if it is compiled
            self._compare_with_floor(x)
        norm: Any = self.norm
        # Not in replicas or under torch.func, whose parameters are temporary.
        if awaits_statistics(norm) and norm.weight.is_leaf:
            take_statistics(norm, self._responses(x))
        # An optimizer will not change a frozen norm.
        trains = any(parameter.requires_grad for parameter in norm.parameters())
        starts = trains and only_shifts(norm, self._shift())
        if not (awaits_statistics(norm) or starts):
            self.settled = True
            return self.compute(x)
        norm.training = False
        try:
            return self.compute(x)
        finally:
            norm.training = True

    def _compare_with_floor(self, x: Tensor) -> None:
        """Warn if the activation alters inputs that the plain convolution does not."""
        # Fake tensors have no values, and DataParallel's replicas are temporary.
        if type(x) is not Tensor or x.is_meta or getattr(self, "_is_replica", False):
            return
        if x.numel() == 0:
            return
        self.floor_checked = True
        lowest = x.detach().min().item()
        if lowest < self._shift():
            kind, name = type(self).__name__, self.start.name
            layer = f"{name}: {kind}" if name else f"{kind}({self.extra_repr()})"
            shifts = not isinstance(self.norm, nn.Identity)
            print_log(
                f"{layer} was warm-started with input_floor={self.input_floor:g}, but its input "
                f"has values as low as {lowest:.3g}. The {type(self.act).__name__} alters values "
                "below the floor, so the outputs differ from the plain convolution's. Pass "
                f"{'bias=True and a lower input_floor, or ' if shifts else ''}act_cfg=None",
                logger="current",
                level=logging.WARNING,
            )

    def _shift(self) -> float:
        """Return the shift that the norm subtracts; 0 without a norm."""
        return 0.0 if isinstance(self.norm, nn.Identity) else self.input_floor

    def _responses(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the norm's input image by image: for all, it takes K times the map's memory."""
        with no_autocast(x):  # autocast would cache low-precision weights without gradients
            for image in x.to(dtype_of(self.conv, x)).split(1):
                yield self.responses(image)

    def responses(self, x: Tensor) -> Tensor:
        """Return the responses of a map (B, C, H, W) before the norm, (B, C * K, h, w)."""
        return self.feature(x)  # type: ignore[no-any-return]

    def by_formula(self, x: Tensor) -> Tensor:
        """Compute the formula in plain torch.

        If the operators do not support the norm or activation, only x is saved for the backward
        pass, which runs the formula again.
        """
        if self.backend != "auto" or not recomputes() or knows(self.norm, self.act):
            return self.formula(x)
        # Hooks would be called twice.
        if any(must_be_called(module) for module in self.modules() if module is not self):
            return self.formula(x)
        return keep_input_alone(self, self.formula, x)

    def formula(self, x: Tensor) -> Tensor:
        """Compute the output with all features in memory."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Return the receptive-field features of a map (B, C, H, W), (B, C, K, h, w)."""
        folded = fold_norm(self.feature, self.norm)
        if folded is None:
            normed = self.norm(self.responses(x))
        else:
            normed = self.feature._conv_forward(x, *folded)
        return self.activated(normed)

    def activated(self, normed: Tensor) -> Tensor:
        """Activate normalised responses (B, C * K, h, w), and return them as (B, C, K, h, w)."""
        # In place only if nothing else can hold a reference.
        if type(self.act) is nn.ReLU and self._is_unobserved() and not is_recorded():
            features = torch.relu_(normed)
        else:
            features = self.act(normed)
        batch, wide, height, width = features.shape
        # No -1 for K, because it cannot be inferred from an empty batch.
        positions = wide // self.in_channels
        return features.reshape(batch, self.in_channels, positions, height, width)

    def window_features(self, x: Tensor) -> WindowFeatures | None:
        """Return the features of a map (B, C, H, W) for the operators, or None for the formula.

        Updates the norm's running statistics if it returns features.
        """
        window = Window(self.kernel_size, self.stride, self.padding, self.dilation)
        return window_features(
            self.backend,
            self.operators,
            x,
            window,
            self.pad,
            self.uncalled(window),
            self.feature,
            self.norm,
            self.act,
            self.conv,
        )

    def uncalled(self, window: Window) -> Convs:
        """Return the convolutions that kernels bypass, and whether that is allowed."""
        conv, feature = self.conv, self.feature
        found: Convs = [(conv, self._is_final(conv))]
        if feature is not None:
            plain = is_plain_conv(feature, *window, self.in_channels, self.padding_mode)
            found.append((feature, plain))
        return found

    def _is_final(self, conv: nn.Module) -> bool:
        """Return whether a module is the plain convolution of windows laid out side by side."""
        size = self.kernel_size
        return is_plain_conv(conv, size, stride=size, groups=self.groups, bias=True)

    def _is_unobserved(self) -> bool:
        """Return whether no hook can hold a reference to the features."""
        made_by = (self.feature, self.norm, self.act)
        return not any(must_be_called(module) for module in made_by if module is not None)

    def convolve(self, windows: Tensor, *gates: Tensor) -> Tensor:
        """Sum up features (B, C, K, h, w) or (B, C, kh, kw, h, w) to (B, O, h, w).

        Gates are multiplied in first; without gradients, this overwrites the features.
        """
        conv = self.conv
        if not self._is_final(conv):
            for gate in gates:
                windows = windows * gate
            out: Tensor = conv(lay_out(windows.flatten(2, -3), self.kernel_size))
            return out
        given = conv.weight, conv.bias, self.groups
        if not gates:
            return convolve_windows(windows, *given)
        first, second = gates
        return convolve_weighted_windows(windows, (first, second), *given, self._is_unobserved())
