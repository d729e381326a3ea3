"""Move a norm that starts as the identity over to batch statistics.

A warm start makes the norm the identity on its running statistics, 0 and 1. To be the identity on
batch statistics, its weight must be their standard deviation and its bias their mean. It takes
both, and the running statistics, from the first training batch. It then keeps using the running
statistics, on which it is still the identity, until an optimizer has changed it: during the whole
first step, with accumulated batches and recomputed layers, the model and its gradients equal those
of the plain model. After that it is an ordinary batch norm. A norm whose parameters have no
gradient is one from the first batch on: its outputs on that batch are the plain model's.

The norm's values alone tell which phase it is in. No other state is saved, so a run can resume in
the middle, and weight averages, which copy the values after the first step, are correct.
"""

from collections.abc import Iterable

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rfa_mmdet.layers.warm_start.identity import norm_obstacle


def only_shifts(norm: nn.Module, floor: float) -> bool:
    """Return whether a norm, on its running statistics, subtracts ``floor`` and nothing else.

    Compares exactly, so any optimizer step is noticed.

    Args:
        norm (nn.Module): A norm of C channels.
        floor (float): See :func:`~rfa_mmdet.layers.warm_start.identity.identity_norm`.

    Example:
        >>> from rfa_mmdet.layers.warm_start.identity import identity_norm
        >>> norm = nn.BatchNorm2d(2)
        >>> only_shifts(norm, floor=0.0)
        False
        >>> _ = norm.load_state_dict(identity_norm(norm, floor=0.0))
        >>> only_shifts(norm, floor=0.0)
        True
    """
    if not isinstance(norm, _BatchNorm) or norm_obstacle(norm):
        return False
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    weight = (var + norm.eps).sqrt().to(norm.weight.dtype)
    return bool((norm.weight == weight).all() and (norm.bias == (mean - floor)).all())


def awaits_statistics(norm: nn.Module) -> bool:
    """Return whether a norm was warm-started or trained only on the running statistics 0 and 1.

    A new norm has these statistics as well, but no values worth keeping.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> awaits_statistics(norm)
        False
        >>> _ = norm.weight.data.mul_(2)
        >>> awaits_statistics(norm)
        True
    """
    if not isinstance(norm, _BatchNorm) or norm_obstacle(norm):
        return False
    seen, mean, var = (norm._buffers[name] for name in ("num_batches_tracked", *_RUNNING))
    assert mean is not None
    assert var is not None
    is_new = (norm.weight == 1).all() and (norm.bias == 0).all()
    return bool(
        not (seen is not None and seen.any()) and not mean.any() and (var == 1).all() and not is_new
    )


_RUNNING = ("running_mean", "running_var")


@torch.no_grad()
def take_statistics(norm: _BatchNorm, responses: Iterable[Tensor]) -> None:
    """Set a norm's running statistics to those of a batch without changing its outputs.

    Its outputs are then the same with the batch's own statistics. Does nothing with fewer than two
    values per channel, e.g. for a batch without regions.

    Args:
        norm (_BatchNorm): A norm of C channels.
        responses (Iterable[Tensor]): Parts of its input, (N, C, ...) each. The statistics are
            computed over the parts of all processes, so every process must call this function.

    Example:
        >>> norm, x = nn.BatchNorm2d(3), 2 + 3 * torch.randn(8, 3, 4, 4)
        >>> before = norm.eval()(x)
        >>> take_statistics(norm, [x])
        >>> for training in (False, True):
        ...     torch.testing.assert_close(norm.train(training)(x), before, rtol=1e-4, atol=1e-4)
    """
    # Per channel: count, sum and sum of squares.
    sums = torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.weight.device)
    for part in responses:
        values = part.double().transpose(0, 1).flatten(1)
        sums += torch.stack(
            [torch.full_like(sums[0], values.shape[1]), values.sum(1), values.square().sum(1)]
        )
    all_reduce(sums, op="sum")
    count = sums[0, 0].item()
    if count < 2:
        return
    batch_mean = sums[1] / count
    batch_var = (sums[2] / count - batch_mean.square()).clamp_min(0)
    mean, var = (norm.get_buffer(name) for name in _RUNNING)
    gain = norm.weight / (var + norm.eps).sqrt()
    shift = norm.bias - gain * mean
    mean.copy_(batch_mean)
    var.copy_(batch_var)
    norm.weight.copy_(gain * (var + norm.eps).sqrt())
    norm.bias.copy_(shift + gain * mean)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(1)
