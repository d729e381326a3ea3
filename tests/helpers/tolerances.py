"""How far each dtype may be from float64: the package's table, and what large maps add to it."""

from rfa_mmdet.ops.common.tolerances import TOLERANCES, Tolerance

__all__ = ["KINKS", "TOLERANCES", "Tolerance"]

# Of values within rounding of a ReLU's corner, some fall on its other side: of float32's some 1e-7,
# so gradients may differ by the root of that, as a share of their norm. Large maps have such
# values, in whatever dtype; small ones have none.
KINKS = 2e-3
