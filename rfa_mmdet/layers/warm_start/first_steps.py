"""How a norm that was started as the identity comes to use the statistics of batches.

A warm start makes it the identity on its running statistics, 0 and 1. On a batch's own it is one
where its weight is their deviation and its bias their mean. So it takes these, and the running
statistics with them, from the first batch that it is to train on. On the running statistics it is
still the identity, on every batch and in the backward pass too, and there it stays until an
optimizer has changed it: in the first step, with all its accumulated batches and recomputed
layers, the model and its gradients are the plain one's. Then it is batch norm as any other.

All of this is read off the values of the norm. Nothing else is saved, so that a run resumes in the
middle of it, and averages of weights, which copy them after the first step, are right.
"""

from collections.abc import Iterable

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rfa_mmdet.layers.warm_start.identity import norm_obstacle


def only_shifts(norm: nn.Module, floor: float) -> bool:
    """Whether a norm, on its running statistics, takes ``floor`` off and does nothing else.

    To the last bit: a step of an optimizer shows.

    Args:
        norm (nn.Module): Of C channels.
        floor (float): As of :func:`~rfa_mmdet.layers.warm_start.identity.identity_norm`.

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
    """Whether a norm was started, or trained, on the running statistics 0 and 1 alone.

    A new one has them too, but computes nothing yet that is worth keeping.

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
    """Give a norm a batch's statistics as the running ones, and keep what it computes on these.

    On that batch's own statistics it then computes the same. Without two values a channel, as of a
    batch without regions, it does nothing.

    Args:
        norm (_BatchNorm): Of C channels.
        responses (Iterable[Tensor]): Parts of its input, (N, C, ...) each. Over several processes
            the statistics are those of all parts, so every process has to call this.

    Example:
        >>> norm, x = nn.BatchNorm2d(3), 2 + 3 * torch.randn(8, 3, 4, 4)
        >>> before = norm.eval()(x)
        >>> take_statistics(norm, [x])
        >>> for training in (False, True):
        ...     torch.testing.assert_close(norm.train(training)(x), before, rtol=1e-4, atol=1e-4)
    """
    # Count, sum and sum of squares of each channel.
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
