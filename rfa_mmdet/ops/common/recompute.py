"""Weigh a map by gates that are computed from it, keeping the map alone for the backward pass.

Autograd would keep a copy of the map for each gate that it is multiplied by, and all that the
gates are made of. They are cheap to make again: a few means, maxima and small products.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rfa_mmdet.ops.common.torch_versions import autocast_dtype_on, is_compiling, is_exporting

Gates = Callable[..., tuple[Tensor, ...]]


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


def weigh(
    x: Tensor, gates_of: Gates, *tensors: Tensor | None, first: Gates | None = None
) -> Tensor:
    """Multiply a map by gates made from it.

    Not differentiable twice, unless a graph is recorded (:func:`is_recorded`).

    Args:
        x (Tensor): Any shape.
        gates_of (Callable): Makes one gate or two, each to be broadcast to ``x`` and in its dtype,
            from ``x`` and ``tensors``, and depends on nothing else.
        *tensors (Tensor | None): Parameters and whatever else the gates need.
        first (Callable | None): Called in place of ``gates_of`` in the forward pass: it gives the
            same and may have side effects, such as to update statistics.

    Returns:
        Tensor: x's shape and dtype.

    Example:
        >>> x = torch.rand(2, 3, 4, 5, requires_grad=True)
        >>> y = weigh(x, lambda x: (x.mean(3, keepdim=True), x.mean(2, keepdim=True)))
        >>> torch.equal(y, x * x.mean(3, keepdim=True) * x.mean(2, keepdim=True))
        True
    """
    if recomputes():
        weighed: Tensor = _WeighByGates.apply(gates_of, first, x, *tensors)
        return weighed
    for gate in (gates_of if first is None else first)(x, *tensors):
        x = x * gate
    return x


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


class _WeighByGates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates_of: Gates, first: Gates | None, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.gates_of = gates_of
        ctx.save_for_backward(x, *tensors)
        device = x.device.type
        lowered = autocast_dtype_on(device)
        ctx.autocast = dict(device_type=device, dtype=lowered, enabled=lowered is not None)
        gates = (first or gates_of)(x, *tensors)
        y = x * gates[0]
        return y if len(gates) == 1 else y.mul_(gates[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs: list[Any] = [
            tensor if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            gates = ctx.gates_of(*inputs)
        x, values = inputs[0].detach(), [gate.detach() for gate in gates]
        products = grad_y * x
        of_gates: tuple[Tensor, ...]
        if len(gates) == 1:
            of_gates = (products.sum_to_size(values[0].shape),)
        else:
            of_gates = gradients_of_gates(products, *values)
        del products
        learnt = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(gates, learnt, of_gates, allow_unused=True))
        gradients = [next(found) if need else None for need in needed]
        if needed[0]:
            grad_x = grad_y * values[0]
            if len(values) == 2:
                grad_x.mul_(values[1])
            gradients[0] = grad_x if gradients[0] is None else grad_x.add_(gradients[0])
        return None, None, *gradients
