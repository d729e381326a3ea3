"""Tolerances of each dtype against float64: the package's table, plus those for large maps."""

from rfa_mmdet.ops.common.tolerances import TOLERANCES, Tolerance

__all__ = ["KINKS", "TOLERANCES", "Tolerance"]

# Rounding may move values across the kink of ReLU: about 1e-7 of them in float32, so gradients may
# differ by the square root of that, relative to their norm. Large maps have such values in any
# dtype, small maps have none.
KINKS = 2e-3
