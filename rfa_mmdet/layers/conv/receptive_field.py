"""What RFAConv, RFCBAMConv and RFCAConv have in common: features of the receptive field.

For each output cell and channel, K = kh * kw learnt responses to the window stand in for its K
values: F = act(norm(depthwise convolution)), (B, C, K, h, w). They are weighed, each method in
its own way, and the final convolution sums them up.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
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
    convolve_weighed_windows,
    convolve_windows,
    lay_out,
)
from rfa_mmdet.ops.receptive_field import WindowFeatures


class ReceptiveFieldConv(AttentionConv2d):
    """Base of the receptive-field convolutions.

    Where the norm trains on batches, a warm-started layer takes their statistics from the first
    one by itself: see :mod:`rfa_mmdet.layers.warm_start.first_steps`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode: As of :class:`~rfa_mmdet.layers.conv.base.AttentionConv2d`.
        norm_cfg (dict | None): Norm of the features. Defaults to BN.
        act_cfg (dict | None): Their activation. Defaults to ReLU.
        input_floor (float): Lowest value of the input, at most 0, from which on a warm start is
            exact: below it, the activation cuts off. 0 behind a ReLU. Else the features start
            shifted by it, and the bias, which is needed then, takes the shift off again.
            Defaults to 0.
        backend (str): 'reference': the formula. 'cpu', 'triton': kernels that do not store the
            features, for batch norm or none and ReLU or none, float32 and bfloat16 (Triton float16
            as well, the CPU float64). 'auto': those of x's device, or where it has none, the same
            in plain torch; the formula where they cannot compute this, and in traces and exports.
            Under SyncBatchNorm, if one rank takes the formula, all do. Defaults to 'auto'.
    """

    # Of torch.ops.rfa_mmdet, what the layer calls.
    operators: ClassVar[tuple[str, ...]]
    feature: nn.Conv2d  # None where RFAConv takes the window's own values
    # Whether the norm is as any other; after a load, the first batches show it.
    settled = True

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
        # Registered before the convolution: mmcv's fuse_conv_bn takes a norm that follows one for
        # its own, and folds it into a bias that is not looked at here.
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
                f"input_floor={input_floor} with norm_cfg=None: it is the norm that shifts the "
                "features; pass a norm, or act_cfg=None, which cuts nothing off"
            )
        # Stride k over windows laid side by side, as the papers write it.
        self.conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.kernel_size,
            groups=self.groups,
            bias=self.with_bias,
        )

    def _check_floor(self, input_floor: Any) -> float:
        if isinstance(input_floor, bool) or not isinstance(input_floor, (int, float)):
            raise TypeError(f"input_floor={input_floor!r}: must be a number")
        if not -math.inf < input_floor <= 0:
            raise ValueError(f"input_floor={input_floor}: must be finite and at most 0")
        if input_floor < 0 and not self.with_bias:
            raise ValueError(
                f"input_floor={input_floor} with bias=False: the bias takes the shift off again; "
                "pass bias=True"
            )
        return float(input_floor)

    def plain_obstacle(self) -> str:
        """Say why the features cannot be the window's own values; empty if they can."""
        if norm_obstacle(self.norm):
            return norm_obstacle(self.norm)
        if not isinstance(self.act, (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU)):
            return f"its activation, {type(self.act).__name__}, is no identity above 0; ReLU is"
        return ""

    def plain_start(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return values under which this layer computes what a plain convolution does.

        On inputs from ``input_floor`` on, and with the norm on its running statistics.
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
        super()._load_from_state_dict(*args)
        self.settled = False

    def forward(self, x: Tensor) -> Tensor:
        """Convolve.

        Args:
            x (Tensor): (B, in_channels, H, W).

        Returns:
            Tensor: (B, out_channels, h, w).
        """
        self.check_input(x)
        if self.settled or not self.norm.training or needs_plain_operators():
            return self.compute(x)
        return self._first_steps(x)

    def compute(self, x: Tensor) -> Tensor:
        """Compute what :meth:`forward` does, by the operators or by the formula."""
        raise NotImplementedError

    @not_compiled
    def _first_steps(self, x: Tensor) -> Tensor:
        """Compute what :meth:`forward` does, and see whether the norm can use batches yet."""
        norm: Any = self.norm
        # Not in a replica, or where torch.func puts other parameters in: they are gone after this.
        if awaits_statistics(norm) and norm.weight.is_leaf:
            take_statistics(norm, self._responses(x))
        if not (awaits_statistics(norm) or only_shifts(norm, self._shift())):
            self.settled = True
            return self.compute(x)
        norm.training = False
        try:
            return self.compute(x)
        finally:
            norm.training = True

    def _shift(self) -> float:
        """Return what the norm takes off: without one, nothing shifts the features."""
        return 0.0 if isinstance(self.norm, nn.Identity) else self.input_floor

    def _responses(self, x: Tensor) -> Iterator[Tensor]:
        """Yield what the norm gets, image by image, as all would take K times the map's memory."""
        with no_autocast(x):  # which would keep lowered weights, without their gradient
            for image in x.to(dtype_of(self.conv, x)).split(1):
                yield self.responses(image)

    def responses(self, x: Tensor) -> Tensor:
        """Return responses before the norm, (B, C * K, h, w), of a map (B, C, H, W)."""
        return self.feature(x)  # type: ignore[no-any-return]

    def by_formula(self, x: Tensor) -> Tensor:
        """Compute the formula of a map in plain torch.

        Where the operators do not know the norm or the activation, x alone is kept for the backward
        pass, which runs the formula again.
        """
        if self.backend != "auto" or not recomputes() or knows(self.norm, self.act):
            return self.formula(x)
        # Hooks would be called twice.
        if any(must_be_called(module) for module in self.modules() if module is not self):
            return self.formula(x)
        return keep_input_alone(self, self.formula, x)

    def formula(self, x: Tensor) -> Tensor:
        """Compute what :meth:`forward` does, with the features in memory."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Return the receptive-field features, (B, C, K, h, w), of a map (B, C, H, W)."""
        folded = fold_norm(self.feature, self.norm)
        if folded is None:
            normed = self.norm(self.responses(x))
        else:
            normed = self.feature._conv_forward(x, *folded)
        return self.activated(normed)

    def activated(self, normed: Tensor) -> Tensor:
        """Return normalised responses (B, C * K, h, w), activated, as (B, C, K, h, w)."""
        # Overwritten only where nobody else can have them.
        if type(self.act) is nn.ReLU and self._untold() and not is_recorded():
            features = torch.relu_(normed)
        else:
            features = self.act(normed)
        batch, wide, height, width = features.shape
        # No -1 for K: an empty batch could not tell it.
        positions = wide // self.in_channels
        return features.reshape(batch, self.in_channels, positions, height, width)

    def window_features(self, x: Tensor) -> WindowFeatures | None:
        """Return the features of a map (B, C, H, W) for the operators. None: the formula must run.

        If they are returned, the norm's running statistics are updated.
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
        """Return the convolutions that the kernels do not call, and whether they need not be."""
        conv, feature = self.conv, self.feature
        found: Convs = [(conv, self._is_final(conv))]
        if feature is not None:
            plain = is_plain_conv(feature, *window, self.in_channels, self.padding_mode)
            found.append((feature, plain))
        return found

    def _is_final(self, conv: nn.Module) -> bool:
        """Whether a module is the plain convolution of the windows, side by side."""
        size = self.kernel_size
        return is_plain_conv(conv, size, stride=size, groups=self.groups, bias=True)

    def _untold(self) -> bool:
        """Whether no hook can have kept the features for itself."""
        made_by = (self.feature, self.norm, self.act)
        return not any(must_be_called(module) for module in made_by if module is not None)

    def convolve(self, windows: Tensor, *gates: Tensor) -> Tensor:
        """Sum up features: (B, C, K, h, w), or (B, C, kh, kw, h, w), to (B, O, h, w).

        With two gates, they are weighed by them, and overwritten where no gradient is asked for.
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
        return convolve_weighed_windows(windows, (first, second), *given, self._untold())
