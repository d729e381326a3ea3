"""Whether a layer keeps its map alone for the backward pass, and what such passes share.

Autograd would keep a copy of the map for each gate that it is multiplied by, and all that the
gates are made of. They are cheap to make again: a few means, maxima and small products.
"""

import torch
from torch import Tensor

from rfa_mmdet.ops.common.torch_versions import is_compiling, is_exporting


def needs_plain_operators() -> bool:
    """Whether what runs now understands PyTorch's own operators only.

    Tracers (``torch.jit.trace``, MMEngine's complexity analysis, exports to ONNX) do, since their
    product must not depend on this package; so do the transforms of ``torch.func`` and forward-mode
    differentiation, for which an autograd function has no rule.

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
    """Whether a graph is recorded instead of computed.

    A tracer must see a formula that holds for every size, a compiler recomputes by itself, and
    transforms of torch.func and forward-mode differentiation take the formula apart.

    Example:
        >>> is_recorded()
        False
    """
    return is_compiling() or needs_plain_operators()


def recomputes() -> bool:
    """Whether the backward pass should recompute what it needs, here and now.

    Example:
        >>> recomputes(), torch.no_grad()(recomputes)()
        (True, False)
    """
    return torch.is_grad_enabled() and not is_recorded()


def gradients_of_gates(products: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of two gates by which a map is multiplied; overwrites ``products``.

    Args:
        products (Tensor): The map times the gradient of the weighed map.
        first, second (Tensor): The gates, each to be broadcast to the map.

    Returns:
        tuple[Tensor, Tensor]: Of the gates' shapes.

    Example:
        >>> products, a, b = torch.ones(2, 3, 4), torch.ones(2, 1, 4), torch.ones(2, 3, 1)
        >>> [gradient.unique().item() for gradient in gradients_of_gates(products, a, b)]
        [3.0, 4.0]
    """
    # An einsum would not make the products of each, but takes five times as long on a CPU.
    of_first = (products * second).sum_to_size(first.shape)
    return of_first, products.mul_(first).sum_to_size(second.shape)
