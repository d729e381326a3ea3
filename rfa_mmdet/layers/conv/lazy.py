"""Modules of the receptive-field features as plain tensors, so that the features need not be made.

The kernels know batch norm and ReLU. What else a config may name (GroupNorm, SiLU, ...), and
modules with hooks, which must be called to be seen, run in the formula.
"""

from collections.abc import Callable

from torch import Tensor, nn

from rfa_mmdet.layers.conv.accelerated import reduces_over, update_running
from rfa_mmdet.layers.conv.norms import fold_norm, is_batch_norm, is_plain_act, must_be_called
from rfa_mmdet.ops.common.precision import autocast_dtype
from rfa_mmdet.ops.receptive_field.lazy_windows import LazyFeatures, can_be_lazy, fold_batch_norm
from rfa_mmdet.ops.receptive_field.schema import output_size

Pair = tuple[int, int]


def lazy_features(
    x: Tensor,
    feature: nn.Conv2d,
    norm: nn.Module,
    act: nn.Module,
    weight: Tensor,
    pad: Callable[[Tensor], tuple[Tensor, Pair]],
) -> LazyFeatures | None:
    """Return features without making them, and update the norm's running statistics.

    Args:
        x (Tensor): (B, C, H, W).
        feature (nn.Conv2d): Depthwise; what comes before the norm.
        norm, act (nn.Module): Of the features. It is the norm's own ``training`` that counts.
        weight (Tensor): Of the convolution of the features.
        pad (Callable): Pads x where that is not by zeros; returns it, and the zeros to be added.

    Returns:
        LazyFeatures | None: None: they are to be made, from the modules.
    """
    if not (is_plain_act(act) and can_be_lazy(x, weight)):
        return None
    kernel_size, channels = feature.kernel_size, x.shape[1]
    positions = kernel_size[0] * kernel_size[1]
    folded = fold_norm(feature, norm)
    if folded is None and not _of_batch(feature, norm):
        return None
    x, padding = pad(x)
    window = (kernel_size, feature.stride, padding, feature.dilation)
    if folded is not None:
        x = x.to(autocast_dtype(x))
        of_feature, shift = folded
        if shift is None:
            shift = of_feature.new_zeros(channels * positions)
        of_feature = of_feature.reshape(channels, positions, positions)
        shift = shift.reshape(channels, positions)
    else:
        height, width = output_size(x, *window)
        count = x.shape[0] * height * width
        if count == 1:  # no variance: torch has its own words for that
            return None
        x = x.to(autocast_dtype(x))
        of_feature, shift, mean, var = fold_batch_norm(
            x,
            feature.weight.reshape(channels, positions, positions),
            *(norm.weight, norm.bias, norm.eps, window),
        )
        update_running(norm, mean.flatten(), var.flatten() * (count / (count - 1)))
    return LazyFeatures(x, of_feature, shift, isinstance(act, nn.ReLU), *window)


def _of_batch(feature: nn.Conv2d, norm: nn.Module) -> bool:
    """Whether the norm is batch norm on statistics that the kernels can take, those of a batch."""
    if type(feature) is not nn.Conv2d or feature.bias is not None or must_be_called(feature):
        return False
    if not is_batch_norm(norm) or reduces_over(norm) is not None:
        return False
    return norm.training or norm.running_mean is None
