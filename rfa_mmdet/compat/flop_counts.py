"""FLOP counts of the operators in this package's layers that MMEngine's analyzers do not know."""

from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter


def _mean(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a mean: one an input element, as MMEngine's adaptive pooling; over channels nothing."""
    # Traced as mean(x, [dim, ...], keepdim, dtype); without a list it goes over everything.
    dims = [dim.toIValue() for dim in inputs[1].node().inputs()]
    rank = len(inputs[0].type().sizes())
    if 1 in [dim % rank for dim in dims]:
        return 0
    return elementwise_flop_counter(1, 0)(inputs, outputs)


# The rule of the published numbers. None: counts as nothing, which MMEngine says of ReLU and max.
OP_COUNTS = {
    "aten::mean": _mean,
    "aten::avg_pool2d": elementwise_flop_counter(0, 1),
    **dict.fromkeys(
        (
            *("aten::add", "aten::add_", "aten::mul", "aten::div", "aten::reciprocal"),
            *("aten::sigmoid", "aten::softmax", "aten::hardswish", "aten::hardsigmoid_"),
            *("aten::silu_", "aten::exp"),
            *("aten::amax", "aten::max_pool2d"),
            *("aten::im2col", "aten::ones_like", "aten::pad", "aten::unflatten"),
        )
    ),
}


def apply() -> None:
    """Add the counts to the defaults of MMEngine's analyzers.

    Handles that are already set for these operators stay.

    Example:
        >>> from mmengine.analysis import get_model_complexity_info
        >>> from rfa_mmdet.layers import ECA
        >>> apply()
        >>> layer = ECA(64)
        >>> get_model_complexity_info(layer, (64, 7, 9), show_table=False, show_arch=False)["flops"]
        4224
    """
    # Private tables: get_model_complexity_info, which MMDetection's tool calls, creates its
    # analyzers itself, so the public set_op_handle is out of reach. It also counts activations, of
    # convolutions and matrix products only, and warns about every other operator.
    for op, handle in OP_COUNTS.items():
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(op, handle)
    for op in (*OP_COUNTS, "aten::batch_norm", "aten::group_norm"):
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS.setdefault(op, None)
