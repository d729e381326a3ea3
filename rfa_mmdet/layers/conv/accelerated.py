"""RFAConv's modules as plain tensors and numbers, for the accelerated backends.

They know batch norm and ReLU. What else a config may name (GroupNorm, SiLU, ...), and modules with
hooks, which must be called to be seen, run in the reference.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rfa_mmdet.layers.conv.norms import is_batch_norm, is_no_norm, is_plain_act
from rfa_mmdet.ops.receptive_field import Norm, fused_rfa_conv
from rfa_mmdet.ops.receptive_field.dispatch import check_backend, choose_backend
from rfa_mmdet.ops.receptive_field.schema import output_size


def check_choice(backend: str, norm: nn.Module, act: nn.Module) -> str:
    """Check the choice of a backend when a layer is built.

    Args:
        backend (str): 'auto', 'reference', 'cpu' or 'triton'.
        norm, act (nn.Module): Of the features.

    Returns:
        str: The backend.

    Raises:
        ValueError: There is no such backend, or it does not know the norm or the activation.
        RuntimeError: It is not available in this process.

    Example:
        >>> check_choice("auto", nn.GroupNorm(2, 8), nn.SiLU())
        'auto'
    """
    check_backend(backend)
    if backend not in ("auto", "reference"):
        _check_modules(backend, norm, act)
    return backend


def _check_modules(backend: str, norm: nn.Module, act: nn.Module) -> None:
    for module, known in ((norm, _knows_norm(norm)), (act, is_plain_act(act))):
        if not known:
            raise ValueError(
                f"backend={backend!r}: computes batch norm or none and ReLU or none, without "
                f"hooks on them, not {module}; choose backend='auto'"
            )


def accelerated_rfa_conv(
    backend: str,
    x: Tensor,
    attention_weight: Tensor,
    feature_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: nn.Module,
    act: nn.Module,
    **window,
) -> Tensor | None:
    """Compute RFAConv in an accelerated backend, and update the norm's running statistics.

    Args:
        backend (str): The user's choice.
        x, attention_weight, feature_weight, weight, bias: As of
            :func:`~rfa_mmdet.ops.receptive_field.rfa_conv`.
        norm, act (nn.Module): Of the features. It is the norm's own ``training`` that counts.
        **window: stride, padding, dilation and groups, as of the same.

    Returns:
        Tensor | None: (B, O, h, w). None: this is for the reference.

    Raises:
        ValueError, TypeError: A backend asked for by name cannot compute this.
    """
    chosen = choose_backend(backend, x, weight)
    if chosen == "reference":
        return None
    if not (_knows_norm(norm) and is_plain_act(act)):
        if backend != "auto":
            _check_modules(backend, norm, act)
        return None
    plain = _plain_norm(norm)
    if plain is None or plain.group is None:  # ranks that reduce together must all go one way
        height, width = output_size(x, weight.shape[2:], *_window(**window))
        count = x.shape[0] * height * width
        # An empty batch, and one value a channel, of which there is no variance: torch has its own
        # words for them.
        if count == 0 or (count == 1 and plain is not None and plain.mean is None):
            return None
    y, mean, var = fused_rfa_conv(
        x,
        attention_weight,
        feature_weight,
        weight,
        bias,
        norm=plain,
        relu=isinstance(act, nn.ReLU),
        backend=chosen,
        **window,
    )
    if mean is not None:
        update_running(norm, mean, var)
    return y


def _window(stride, padding, dilation, groups) -> tuple:
    return stride, padding, dilation


def _knows_norm(norm: nn.Module) -> bool:
    return is_batch_norm(norm) or is_no_norm(norm)


def _plain_norm(norm: nn.Module) -> Norm | None:
    if isinstance(norm, nn.Identity):
        return None
    of_batch = norm.training or norm.running_mean is None
    mean, var = (None, None) if of_batch else (norm.running_mean, norm.running_var)
    group = reduces_over(norm) if of_batch else None
    return Norm(norm.weight, norm.bias, mean, var, norm.eps, group)


def reduces_over(norm: nn.Module) -> Any:
    """Return the process group that SyncBatchNorm reduces over, if it does now.

    Example:
        >>> reduces_over(nn.SyncBatchNorm(4))
    """
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return None
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


@torch.no_grad()
def update_running(norm: nn.Module, mean: Tensor, var: Tensor) -> None:
    """Update batch norm's running statistics, where it keeps any, as its own call would.

    Args:
        norm (nn.Module): Batch norm of N channels.
        mean, var (Tensor): (N,), of the batch; the variance is unbiased.

    Example:
        >>> norm = nn.BatchNorm2d(1)
        >>> update_running(norm, torch.ones(1), torch.ones(1))
        >>> norm.running_mean.item(), norm.num_batches_tracked.item()
        (0.10000000149011612, 1)
    """
    if not (norm.training and norm.track_running_stats):
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if norm.running_mean is None:
        return
    factor = norm.momentum
    if factor is None:  # cumulative average
        factor = 1 / norm.num_batches_tracked.to(mean.dtype)
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        running.copy_(running * (1 - factor) + new * factor)
