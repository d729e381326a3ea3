"""A call of every operator, with small inputs."""

from typing import Any

import torch

WINDOW = ([3, 3], [2, 1], [1, 1], [1, 1])


def arguments(
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    groups: int = 2,
    size: tuple[int, int] = (7, 6),
) -> tuple:
    """Return x, the parameters of the attention and the features, the weight, and the window."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, *size), torch.randn(6, 4 // groups, 3, 3)
    x, weight = (t.to(dtype).contiguous(memory_format=layout) for t in (x, weight))
    parameters = (torch.randn(36, 1, 1, 1), torch.randn(36, 1, 3, 3), torch.randn(36))
    return x, parameters, weight, WINDOW


def operator_calls(
    dtype: torch.dtype,
    layout: torch.memory_format,
    gradients: bool = True,
    **more: Any,
) -> list[tuple[Any, tuple]]:
    """Return operators with inputs, of which those of differentiable ones may require gradients."""
    x, parameters, weight, window = arguments(dtype, layout, **more)
    groups = x.shape[1] // weight.shape[1]
    learnt = [t.clone().requires_grad_(gradients) for t in (x, *parameters, weight)]
    x_, attention, feature, shift, weight_ = learnt
    ops = torch.ops.rfa_mmdet
    y = ops.rfa_conv(x, *parameters, True, weight, None, *window, groups)
    needs, both = [True, True, False, True], [True, False]
    features = (x, *parameters[1:], True)
    pooled, largest = ops.pool_channels(*features, True, *window)
    rows, columns = ops.pool_coordinates(*features, *window)
    mean, covariance = ops.window_moments(x, *window)
    bn = (torch.rand(36), None)
    folded = ops.fold_moments(mean, covariance, parameters[1], *bn, 1e-5, 48)
    calls = [
        (ops.window_moments, (x, *window)),
        (ops.window_moments_backward, (x, torch.randn(4, 9, 9), torch.randn(4, 9), x, *window)),
        (ops.fold_moments, (mean, covariance, parameters[1], *bn, 1e-5, 48)),
        (
            ops.fold_moments_backward,
            (*folded[:2], parameters[1], bn[0], mean, covariance, folded[2], folded[4], 48),
        ),
        (ops.rfa_conv, (x_, attention, feature, shift, True, weight_, None, *window, groups)),
        (ops.rfa_conv_backward, (y, x, *parameters, True, weight, needs, *window, groups)),
        (ops.rfa_conv_backward, (y, x, *parameters, True, weight, [True] * 4, *window, groups)),
        (ops.fold_batch_norm, (x_, feature, *bn, 1e-5, *window)),
        (ops.pool_channels, (x_, feature, shift, True, True, *window)),
        (ops.pool_channels_backward, (pooled, *features, largest, both, *window)),
        (ops.pool_coordinates, (x_, feature, shift, True, *window)),
        (ops.pool_coordinates_backward, (rows, columns, *features, both, *window)),
    ]
    for gates in ((torch.rand(2, 4), pooled[:, 0]), (rows, columns)):
        gates_ = [gate.clone().requires_grad_(gradients) for gate in gates]
        inputs = (x_, feature, shift, True, *gates_, weight_, None, *window, groups)
        calls.append((ops.gated_conv, inputs))
        inputs = (y, *features, *gates, weight, [True] * 4, *window, groups)
        calls.append((ops.gated_conv_backward, inputs))
    return calls
