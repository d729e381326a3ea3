"""Tolerances of each dtype against float64, for self-checks, tests and benchmarks.

Errors are relative to the exact result, by its largest value or its norm. Comparisons that involve
more rounding apply a factor and explain it.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Tolerances of one dtype, relative to the formula in float64.

    Args:
        output (float): For results of a forward pass, including autocast.
        gradient (float): For results of a backward pass in which no value is near ReLU's kink.
        layer_gradient (float): For gradients of whole layers: sums over all positions of a batch,
            autocast, and values that rounding moves across ReLU's kink.
        statistics (float): For means and covariances over positions, and their contribution to the
            input's gradient. They are computed in float32 even for half precision.

    Example:
        >>> TOLERANCES[torch.bfloat16].output == torch.finfo(torch.bfloat16).eps
        True
    """

    output: float
    gradient: float
    layer_gradient: float
    statistics: float


TOLERANCES = {
    # Thousands of eps (2e-16), to allow for summation order and cancellation; still far smaller
    # than the error of any wrong formula. Gradients have one more summation.
    torch.float64: Tolerance(1e-12, 1e-11, 1e-11, 1e-12),
    # About 100 eps (1e-7): sums of up to a few thousand products, and on GPUs products emulated by
    # three TF32 ones. Batch norm adds two sums over all positions: ten times as much.
    # Statistics are summed in blocks, so their error hardly grows with the map: 10 eps with vectors
    # of 16 numbers, twice that with vectors of 8, whose lanes each add up twice as many.
    torch.float32: Tolerance(1e-5, 1e-5, 1e-4, 2e-6),
    # One eps: the operands (or upstream gradient) and the result are each rounded by half an eps;
    # sums in between are in float32. Autocast also rounds every gradient passed between operations,
    # which moves more values across kinks: 5 and 10 eps.
    torch.bfloat16: Tolerance(2**-7, 2**-7, 4e-2, 2e-6),
    torch.float16: Tolerance(2**-10, 2**-10, 1e-2, 2e-6),
}
