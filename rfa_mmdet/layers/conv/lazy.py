"""Modules of the receptive-field features as plain tensors, so that the features need not be made.

The kernels know batch norm and ReLU. What else a config may name (GroupNorm, SiLU, ...), and
modules with hooks, which must be called to be seen, run in the formula.
"""

from torch import Tensor, nn

from rfa_mmdet.layers.conv.accelerated import reduces_over, update_running
from rfa_mmdet.layers.conv.norms import fold_norm, is_batch_norm, is_plain_act, must_be_called
from rfa_mmdet.ops.dispatch import autocast_dtype
from rfa_mmdet.ops.lazy_windows import LazyFeatures, can_be_lazy, fold_batch_norm
from rfa_mmdet.ops.rfa_conv.library import output_size

Pair = tuple[int, int]


def lazy_features(
    x: Tensor,
    feature: nn.Conv2d,
    norm: nn.Module,
    act: nn.Module,
    weight: Tensor,
    padding: Pair,
) -> LazyFeatures | None:
    """Return features without making them, and update the norm's running statistics.

    Args:
        x (Tensor): (B, C, H, W), padded but for zeros.
        feature (nn.Conv2d): Depthwise; what comes before the norm.
        norm, act (nn.Module): Of the features. It is the norm's own ``training`` that counts.
        weight (Tensor): Of the convolution of the features.
        padding (tuple[int, int]): Zeros still to be added.

    Returns:
        LazyFeatures | None: None: they are to be made, from the modules.
    """
    if not (is_plain_act(act) and can_be_lazy(x, weight)):
        return None
    kernel_size, channels = feature.kernel_size, x.shape[1]
    window = (kernel_size, feature.stride, padding, feature.dilation)
    positions = kernel_size[0] * kernel_size[1]
    folded = fold_norm(feature, norm)
    if folded is not None:
        x = x.to(autocast_dtype(x))
        of_feature, shift = folded
        if shift is None:
            shift = of_feature.new_zeros(channels * positions)
        of_feature = of_feature.view(channels, positions, positions)
        shift = shift.view(channels, positions)
    else:
        height, width = output_size(x, *window)
        plain = type(feature) is nn.Conv2d and feature.bias is None
        # Of one value a channel there is no variance: torch has its own words for that.
        if not plain or must_be_called(feature) or x.shape[0] * height * width == 1:
            return None
        if not is_batch_norm(norm) or reduces_over(norm) is not None:
            return None
        if not norm.training and norm.running_mean is not None:
            return None
        x = x.to(autocast_dtype(x))
        of_feature, shift, mean, var = fold_batch_norm(
            x,
            feature.weight.view(channels, positions, positions),
            *(norm.weight, norm.bias, norm.eps, window),
        )
        count = x.shape[0] * height * width
        update_running(norm, mean.flatten(), var.flatten() * (count / (count - 1)))
    return LazyFeatures(x, of_feature, shift, isinstance(act, nn.ReLU), *window)
