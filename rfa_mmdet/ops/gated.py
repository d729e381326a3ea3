"""Weigh a map by gates that are computed from it, keeping the map alone for the backward pass.

Autograd would keep a copy of the map for each gate that it is multiplied by, and all that the
gates are made of. They are cheap to make again: a few means, maxima and small products.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rfa_mmdet.ops.precision import no_autocast

Gates = Callable[..., tuple[Tensor, ...]]


def is_recorded() -> bool:
    """Whether a graph is recorded instead of computed.

    A tracer must see a formula that holds for every size, a compiler recomputes by itself, and
    transforms of torch.func differentiate the formula.

    Example:
        >>> is_recorded()
        False
    """
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return recorded or torch._C._are_functorch_transforms_active()


def recomputes() -> bool:
    """Whether what a backward pass needs is to be recomputed in it, here and now.

    Example:
        >>> recomputes(), torch.no_grad()(recomputes)()
        (True, False)
    """
    return torch.is_grad_enabled() and not is_recorded()


def weigh(x: Tensor, gates_of: Gates, *tensors: Tensor, first: Gates | None = None) -> Tensor:
    """Multiply a map by gates made from it.

    Not differentiable twice, unless a graph is recorded (:func:`is_recorded`).

    Args:
        x (Tensor): Any shape.
        gates_of (Callable): Makes one gate or two, each to be broadcast to ``x`` and in its dtype,
            from ``x`` and ``tensors``, and depends on nothing else; the second one shares no
            dimension but those of the batch and of groups with the first.
        *tensors (Tensor): Parameters and whatever else the gates need.
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
        return _Weigh.apply(gates_of, first, x, *tensors)
    for gate in (first or gates_of)(x, *tensors):
        x = x * gate
    return x


def contract(a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum ``a * b``, which is never made, to a shape.

    Args:
        a (Tensor): Of as many dimensions as ``shape``.
        b (Tensor): Is broadcast to ``a``.
        shape (tuple[int, ...]): Dimensions of 1 are summed over.

    Returns:
        Tensor: Of that shape.

    Example:
        >>> a, b = torch.rand(2, 3, 4), torch.rand(2, 1, 4)
        >>> torch.allclose(contract(a, b, (2, 3, 1)), (a * b).sum(2, keepdim=True))
        True
    """
    letters = "bcijyxuv"[: a.dim()]
    of_b = [d for d, n in enumerate(b.shape) if n != 1]
    kept = "".join(c for c, n in zip(letters, shape, strict=True) if n != 1)
    # Without autocast, which a backward pass may happen to run under.
    terms = f"{letters},{''.join(letters[d] for d in of_b)}->{kept}"
    with no_autocast(a):
        return torch.einsum(terms, a, b.reshape([b.shape[d] for d in of_b])).reshape(shape)


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates_of: Gates, first: Gates | None, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.gates_of = gates_of
        ctx.save_for_backward(x, *tensors)
        device = x.device.type
        ctx.autocast = dict(
            device_type=device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
        )
        gates = (first or gates_of)(x, *tensors)
        y = x * gates[0]
        return y if len(gates) == 1 else y.mul_(gates[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor) -> tuple:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            gates = ctx.gates_of(*inputs)
        x, values = inputs[0].detach(), [gate.detach() for gate in gates]
        products = grad_y * x
        if len(gates) == 1:
            of_gates = [products.sum_to_size(values[0].shape)]
        else:
            a, b = values
            of_gates = [contract(products, b, a.shape), contract(products, a, b.shape)]
        del products
        learnt = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(gates, learnt, of_gates, allow_unused=True))
        gradients = [next(found) if need else None for need in needed]
        if needed[0]:
            grad_x = grad_y * values[0]
            if len(values) == 2:
                grad_x.mul_(values[1])
            gradients[0] = grad_x if gradients[0] is None else grad_x.add_(gradients[0])
        return None, None, *gradients
