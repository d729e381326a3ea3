"""Tolerances of each dtype against float64: the package's table, plus those for large maps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rfa_mmdet.ops.common.tolerances import TOLERANCES, Tolerance

__all__ = ["KINKS", "TOLERANCES", "Tolerance", "without_tf32"]

# Rounding may move values across the kink of ReLU: about 1e-7 of them in float32, so gradients may
# differ by the square root of that, relative to their norm. Large maps have such values in any
# dtype, small maps have none.
KINKS = 2e-3


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keep cuDNN, and so our kernels, from rounding float32 operands to TF32, the default on GPUs.

    The tolerances of float32 are for full precision.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
