"""Keep the input of a formula alone for the backward pass, and run the formula again there.

For features whose norm or activation the operators do not know: they would keep some 24 times the
input's bytes. In the backward pass of one layer the features are there as a whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def keep_input_alone(layer: nn.Module, formula: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a layer's formula so that autograd keeps x, and nothing that was computed from it.

    Args:
        layer (nn.Module): Whose parameters and norms the formula uses. Running statistics are
            updated once.
        formula (Callable): Of x.
        x (Tensor): Any shape.

    Returns:
        Tensor: ``formula(x)``.

    Example:
        >>> import torch
        >>> norm, x = nn.BatchNorm2d(2), torch.rand(3, 2, 4, 4, requires_grad=True)
        >>> keep_input_alone(norm, lambda x: norm(x).relu(), x).sum().backward()
        >>> x.grad.shape, norm.num_batches_tracked.item()
        (torch.Size([3, 2, 4, 4]), 1)
    """
    # What is there now: between the passes a layer may change its mode, and
    # torch.func.functional_call takes its parameters away again.
    before = [(module, module.training, dict(module._parameters)) for module in layer.modules()]
    y: Tensor = checkpoint(
        formula, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _as_before(before))
    )
    return y


@contextmanager
def _as_before(before: list[tuple[nn.Module, bool, dict[str, Tensor | None]]]) -> Iterator[None]:
    """Give modules their modes and parameters again, and copies of their running statistics."""
    now = [dict(module.__dict__) for module, *_ in before]
    try:
        for module, training, parameters in before:
            buffers = {
                name: None if buffer is None else buffer.clone()
                for name, buffer in module._buffers.items()
            }
            module.__dict__.update(training=training, _parameters=parameters, _buffers=buffers)
        yield
    finally:
        for (module, *_), values in zip(before, now, strict=True):
            module.__dict__.update(values)
