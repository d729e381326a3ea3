"""Save only a formula's input for the backward pass, and recompute the rest there.

Used for features whose norm or activation the operators do not support: autograd would save about
24 times the size of the input. During the backward pass, one layer's features are in memory.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def keep_input_alone(layer: nn.Module, formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a layer's formula so that autograd only saves ``x``.

    Args:
        layer (nn.Module): The layer with the parameters and norms that the formula uses. Its
            running statistics are updated once.
        formula (Callable): Function of ``x``.
        x (Tensor): A tensor of any shape.

    Returns:
        Tensor: ``formula(x)``.

    Example:
        >>> import torch
        >>> norm, x = nn.BatchNorm2d(2), torch.rand(3, 2, 4, 4, requires_grad=True)
        >>> keep_input_alone(norm, lambda x: norm(x).relu(), x).sum().backward()
        >>> x.grad.shape, norm.num_batches_tracked.item()
        (torch.Size([3, 2, 4, 4]), 1)
    """
    # Record the current state: before the backward pass, a layer may change its mode, and
    # torch.func.functional_call removes its parameters.
    before = _AsBefore(layer)
    y: Tensor = checkpoint(
        formula, x, use_reentrant=False, context_fn=lambda: (nullcontext(), before)
    )
    return y


class _AsBefore:
    """Restores modes and parameters of modules, and copies of their running statistics.

    Entered in every backward pass through the same graph; there may be several.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.before = [(m, m.training, dict(m._parameters)) for m in layer.modules()]
        self.now: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self.now = [dict(module.__dict__) for module, *_ in self.before]
        for module, training, parameters in self.before:
            buffers = {
                name: None if buffer is None else buffer.clone()
                for name, buffer in module._buffers.items()
            }
            module.__dict__.update(training=training, _parameters=parameters, _buffers=buffers)

    def __exit__(self, *raised: object) -> None:
        for (module, _, _), values in zip(self.before, self.now, strict=True):
            module.__dict__.update(values)
