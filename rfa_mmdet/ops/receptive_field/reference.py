"""RFAConv in plain torch, from the formulas of arXiv 2304.03198.

All faster implementations are tested against this one. Shapes: ``x`` is (B, C, H, W), the kernel
has K = kh * kw positions, the output size is (h, w).

Differences from the published code: the final convolution is a 1x1 convolution over C * K channels
with the same weights, so the (B, C, h * kh, w * kw) layout of windows is never materialised; logits
and softmax are float32 under mixed precision; stride, padding and dilation apply to both features
and attention (the published layer ignores dilation).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import at_least_float32, no_autocast
from rfa_mmdet.ops.common.windows import Pair, convolve_windows


def receptive_field_mean(
    x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """Return the mean of each window of ``x``. Padding counts as zeros; the divisor is always K.

    Args:
        x (Tensor): (B, C, H, W).
        kernel_size, stride, padding, dilation (tuple[int, int]): As for a convolution.

    Returns:
        Tensor: (B, C, h, w).

    Example:
        >>> x = torch.ones(1, 1, 4, 4)
        >>> receptive_field_mean(x, (2, 2), (2, 2), (0, 0), (1, 1)).shape
        torch.Size([1, 1, 2, 2])
    """
    # avg_pool2d has no dilation, and allows padding of at most half the kernel.
    if dilation == (1, 1) and all(2 * p <= k for p, k in zip(padding, kernel_size)):  # noqa: B905
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=True)
    channels = int(x.shape[1])  # ONNX needs a kernel with a constant shape
    kernel = x.new_full((channels, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]))
    with no_autocast(x):  # autocast would round x; avg_pool2d keeps its precision
        return F.conv2d(x, kernel, None, stride, padding, dilation, channels)


def receptive_field_attention(mean: Tensor, attention_weight: Tensor) -> Tensor:
    """Return the softmax over the K positions of each window.

    Args:
        mean (Tensor): (B, C, h, w), from :func:`receptive_field_mean`.
        attention_weight (Tensor): (C * K, 1, 1, 1), weight of a grouped 1x1 convolution.

    Returns:
        Tensor: (B, C, K, h, w), at least float32; sums to 1 over K.

    Example:
        >>> S = receptive_field_attention(torch.rand(2, 3, 4, 5), torch.zeros(27, 1, 1, 1))
        >>> S.shape, bool((S == 1 / 9).all())
        (torch.Size([2, 3, 9, 4, 5]), True)
    """
    channels = mean.shape[1]
    with no_autocast(mean):
        mean, weight = at_least_float32(mean), at_least_float32(attention_weight)
        logits = F.conv2d(mean, weight.to(mean.dtype), groups=channels)  # (B, C * K, h, w)
        return torch.softmax(logits.unflatten(1, (channels, -1)), dim=2)


def rfa_conv(
    x: Tensor,
    attention_weight: Tensor,
    feature_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Callable[[Tensor], Tensor],
    act: Callable[[Tensor], Tensor],
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Convolve the K features of each window of ``x``, weighted by their attention.

    Args:
        x (Tensor): (B, C, H, W).
        attention_weight (Tensor): (C * K, 1, 1, 1).
        feature_weight (Tensor | None): (C * K, 1, kh, kw), depthwise. If None, the features are the
            windows of ``x`` themselves, the paper's unfold variant.
        weight (Tensor): Weight of the final convolution, (O, C / groups, kh, kw).
        bias (Tensor | None): (O,).
        norm (Callable): Normalises the features, (B, C * K, h, w), keeping the shape.
        act (Callable): Activation of the features, keeping the shape.
        stride, padding, dilation (tuple[int, int]): Of the windows over ``x``; zero padding.
        groups (int): Groups of the final convolution.

    Returns:
        Tensor: (B, O, h, w).

    Example:
        >>> x = torch.rand(2, 4, 8, 8)
        >>> y = rfa_conv(x, torch.rand(36, 1, 1, 1), torch.rand(36, 1, 3, 3),
        ...              torch.rand(6, 4, 3, 3), norm=torch.nn.Identity(), act=torch.relu,
        ...              padding=(1, 1))
        >>> y.shape
        torch.Size([2, 6, 8, 8])
    """
    channels, kernel_size = x.shape[1], (weight.shape[2], weight.shape[3])
    mean = receptive_field_mean(x, kernel_size, stride, padding, dilation)
    if feature_weight is None:
        features = F.unfold(x, kernel_size, dilation, padding, stride)  # (B, C * K, h * w)
        features = features.unflatten(2, mean.shape[2:])
    else:
        features = F.conv2d(x, feature_weight, None, stride, padding, dilation, channels)
    features = act(norm(features)).unflatten(1, (channels, -1))  # (B, C, K, h, w)
    attention = receptive_field_attention(mean, attention_weight)  # (B, C, K, h, w)
    return convolve_windows(features * attention.to(features.dtype), weight, bias, groups)
