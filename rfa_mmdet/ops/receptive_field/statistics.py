"""Fold batch norm, given the moments of windows, and its gradient: small per-channel algebra.

README.md derives the formulas. These are the implementations in plain torch, for every device; the
Triton backend has one kernel per direction, because about 25 small operations would take as long as
the rest of the backward pass. Shapes: mean (C, K) and covariance (C, K, K) of the windows' values,
feature (C * K, 1, kh, kw); everything else is (C * K,).
"""

import torch
from torch import Tensor

from rfa_mmdet.ops.common.torch_versions import register_fake
from rfa_mmdet.ops.receptive_field.schema import LIBRARY

LIBRARY.define(
    "fold_moments(Tensor mean, Tensor covariance, Tensor feature, Tensor? weight, Tensor? bias, "
    "float eps, int count) -> "
    "(Tensor feature, Tensor shift, Tensor mean, Tensor variance, Tensor inverse)"
)
LIBRARY.define(
    "fold_moments_backward(Tensor grad_feature, Tensor grad_shift, Tensor feature, Tensor? weight, "
    "Tensor mean, Tensor covariance, Tensor response_mean, Tensor inverse, int count) -> "
    "(Tensor feature, Tensor weight, Tensor slope, Tensor constant)"
)


def response_moments(feature: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each response from the moments of the windows."""
    kernels = feature.view(covariance.shape)
    response_mean = (kernels * mean.unsqueeze(1)).sum(2)
    # Rounding may make a zero variance slightly negative.
    var = (torch.matmul(kernels, covariance) * kernels).sum(2).clamp_min(0)
    return response_mean.flatten(), var.flatten()


def fold_responses(
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fold batch norm into the kernels whose responses have this mean and biased variance.

    Returns:
        tuple[Tensor, ...]: Feature, shift, mean, unbiased variance, and 1 / sqrt(var + eps).
    """
    inverse = torch.rsqrt(var + eps)
    scale = inverse if weight is None else inverse * weight
    shift = -scale * mean
    shift = shift if bias is None else shift + bias
    return feature * scale.view(-1, 1, 1, 1), shift, mean, var * (count / (count - 1)), inverse


def fold_moments(
    mean: Tensor,
    covariance: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
) -> tuple[Tensor, ...]:
    """Fold batch norm, given the moments of windows; see :func:`fold_responses`."""
    moments = response_moments(feature, mean, covariance)
    return fold_responses(feature, weight, bias, eps, *moments, count)


def response_gradients(
    grad_feature: Tensor,
    grad_shift: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of each response's scale, mean and variance; then the scale itself."""
    scale = inverse if weight is None else inverse * weight
    grad_scale = (grad_feature * feature).sum((1, 2, 3)) - grad_shift * mean
    grad_inverse = grad_scale if weight is None else grad_scale * weight
    return grad_scale, -scale * grad_shift, -0.5 * inverse**3 * grad_inverse, scale


def gradients_through_moments(
    grad_mean: Tensor,
    grad_var: Tensor,
    feature: Tensor,
    mean: Tensor,
    covariance: Tensor,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of feature through mean and variance, then slope and constant.

    With slope (C, K, K) and constant (C, K), the gradient of a window is constant + slope @ window.
    """
    grad_mean, grad_var = (t.view(*mean.shape, 1) for t in (grad_mean, grad_var))
    kernels = feature.view(covariance.shape)
    grad_feature = grad_mean * mean.unsqueeze(1) + 2 * grad_var * torch.matmul(kernels, covariance)
    slope = torch.matmul(kernels.mT, 2 * grad_var * kernels) / max(count, 1)
    constant = (grad_mean * kernels).sum(1) / max(count, 1)
    constant = constant - torch.matmul(slope, mean.unsqueeze(2)).squeeze(2)
    return grad_feature.view_as(feature), slope, constant


def fold_moments_backward(
    grad_feature: Tensor,
    grad_shift: Tensor,
    feature: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    covariance: Tensor,
    response_mean: Tensor,
    inverse: Tensor,
    count: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of feature and weight, and slope and constant for that of the map."""
    grad_scale, grad_mean, grad_var, scale = response_gradients(
        grad_feature, grad_shift, feature, weight, response_mean, inverse
    )
    through, slope, constant = gradients_through_moments(
        grad_mean, grad_var, feature, mean, covariance, count
    )
    found = torch.addcmul(through, scale.view(-1, 1, 1, 1), grad_feature)
    if mean.device.type != "cpu":
        # As the Triton kernels write and read them, so that torch.compile knows the strides.
        slope = slope.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        constant = constant.t().contiguous().t()
    return found, grad_scale * inverse, slope, constant


def _fake_fold_moments(mean: Tensor, covariance: Tensor, feature: Tensor, *_: object) -> object:
    return feature.new_empty(feature.shape), *(mean.new_empty(mean.numel()) for _ in range(4))


def _fake_fold_moments_backward(
    grad_feature: Tensor,
    grad_shift: Tensor,
    feature: Tensor,
    weight: object,
    mean: Tensor,
    *_: object,
) -> object:
    (channels, k), empty = mean.shape, mean.new_empty
    if mean.device.type == "cpu":
        moments = empty(channels, k, k), empty(channels, k)
    else:
        moments = empty(k, k, channels).permute(2, 0, 1), empty(k, channels).t()
    return feature.new_empty(feature.shape), empty(mean.numel()), *moments


for _function, _fake in (
    (fold_moments, _fake_fold_moments),
    (fold_moments_backward, _fake_fold_moments_backward),
):
    LIBRARY.impl(_function.__name__, _function, "CompositeExplicitAutograd")
    register_fake(LIBRARY, _function.__name__, _fake)
