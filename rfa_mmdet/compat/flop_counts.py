"""FLOP counts of operators in this package's layers that MMEngine's analyzers do not support."""

from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import elementwise_flop_counter


def _mean(inputs: list[Any], outputs: list[Any]) -> int:
    """Count one per input element, as MMEngine's adaptive pooling; nothing for a channel mean."""
    # Traced as mean(x, [dim, ...], keepdim, dtype); without a list, over all dimensions.
    dims = [dim.toIValue() for dim in inputs[1].node().inputs()]
    rank = len(inputs[0].type().sizes())
    if 1 in [dim % rank for dim in dims]:
        return 0
    return elementwise_flop_counter(1, 0)(inputs, outputs)


# Chosen to match the published numbers. None counts as nothing, as for ReLU and max in MMEngine.
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
    """Add the counts to the defaults of MMEngine's analyzers, keeping existing handles.

    Example:
        >>> from mmengine.analysis import get_model_complexity_info
        >>> from rfa_mmdet.layers import ECA
        >>> apply()
        >>> layer = ECA(64)
        >>> get_model_complexity_info(layer, (64, 7, 9), show_table=False, show_arch=False)["flops"]
        4224
    """
    # The tables are private, but get_model_complexity_info, which MMDetection's tool calls, creates
    # its own analyzers, out of reach of the public set_op_handle. It also counts activations, only
    # of convolutions and matrix products, and warns about every other operator.
    for op, handle in OP_COUNTS.items():
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.setdefault(op, handle)
    for op in (*OP_COUNTS, "aten::batch_norm", "aten::group_norm"):
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS.setdefault(op, None)
