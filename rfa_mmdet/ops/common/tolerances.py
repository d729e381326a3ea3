"""How far each dtype may be from float64: the one table, for self-checks, tests and benchmarks.

An error is a share of the exact values' size, largest by largest or norm by norm. Where a
comparison rounds more often than the table supposes, it says so beside its factor.
"""

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """Of one dtype, by what is compared with its formula in float64.

    Args:
        output (float): What a forward pass returns; under autocast too.
        gradient (float): What a backward pass returns, where no value lies at a corner of ReLU.
        layer_gradient (float): The same of a whole layer in any use: sums over a batch's positions,
            autocast, and values at corners that rounding moves to the other side.
        statistics (float): Means and covariances over positions, and what they give back to the
            input's gradient. Half precision is only stored: they are computed in float32.

    Example:
        >>> TOLERANCES[torch.bfloat16].output == torch.finfo(torch.bfloat16).eps
        True
    """

    output: float
    gradient: float
    layer_gradient: float
    statistics: float


TOLERANCES = {
    # Thousands of eps, 2e-16, for what other orders of summation and nearly cancelled sums leave:
    # less by far than any other formula would differ by. A gradient sums up once more.
    torch.float64: Tolerance(1e-12, 1e-11, 1e-11, 1e-12),
    # Some 100 eps, 1e-7: sums of up to some thousand products, and on GPUs products of which three
    # in TF32 make up one. Batch norm's two more sums over all positions make it ten times that.
    # Statistics are summed in blocks, so that their error hardly grows with the map: 10 eps where
    # vectors hold 16 numbers; where they hold 8, each of these sums up twice as many.
    torch.float32: Tolerance(1e-5, 1e-5, 1e-4, 2e-6),
    # One eps: operands or upstream gradient, and the result, are each rounded by half of one; sums
    # between are of float32. Under autocast every gradient that passes from one operation to the
    # next is rounded, and what a corner lets through with it: 5 and 10 eps.
    torch.bfloat16: Tolerance(2**-7, 2**-7, 4e-2, 2e-6),
    torch.float16: Tolerance(2**-10, 2**-10, 1e-2, 2e-6),
}
