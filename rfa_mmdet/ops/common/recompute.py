"""When to recompute gates in the backward pass, and helpers for doing so.

Autograd would save a copy of the feature map for each gate, and all intermediate values of the
gates. Gates are cheap to recompute: a few means, maxima and small products.
"""

import torch
from torch import Tensor

from rfa_mmdet.ops.common.torch_versions import is_compiling, is_exporting


def needs_plain_operators() -> bool:
    """Return whether the current context only supports PyTorch's own operators.

    True for tracers (``torch.jit.trace``, MMEngine's complexity analysis, ONNX export), whose
    result must not depend on this package, and for ``torch.func`` transforms and forward-mode
    differentiation, which our autograd functions do not support.

    Example:
        >>> needs_plain_operators()
        False
    """
    if is_compiling():
        return is_exporting()
    return (
        torch.jit.is_tracing()
        or torch.onnx.is_in_onnx_export()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_recorded() -> bool:
    """Return whether a graph is being recorded rather than executed.

    Tracers need a formula that holds for every size, compilers decide for themselves what to
    recompute, and torch.func transforms and forward-mode differentiation transform the formula.

    Example:
        >>> is_recorded()
        False
    """
    return is_compiling() or needs_plain_operators()


def recomputes() -> bool:
    """Return whether the backward pass should recompute intermediate values.

    Example:
        >>> recomputes(), torch.no_grad()(recomputes)()
        (True, False)
    """
    return torch.is_grad_enabled() and not is_recorded()


def gradients_of_gates(products: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of two gates that a map is multiplied by; overwrites ``products``.

    Args:
        products (Tensor): The map times the gradient of the weighted map.
        first, second (Tensor): The gates, broadcastable to the map.

    Returns:
        tuple[Tensor, Tensor]: Gradients with the shapes of the gates.

    Example:
        >>> products, a, b = torch.ones(2, 3, 4), torch.ones(2, 1, 4), torch.ones(2, 3, 1)
        >>> [gradient.unique().item() for gradient in gradients_of_gates(products, a, b)]
        [3.0, 4.0]
    """
    # einsum would avoid the products, but takes five times longer on a CPU.
    grad_first = (products * second).sum_to_size(first.shape)
    return grad_first, products.mul_(first).sum_to_size(second.shape)
