"""Modules as plain tensors and numbers, so that kernels need not call them.

The operators know batch norm and ReLU. What else a config may name (GroupNorm, SiLU, ...), and
modules that must be called (untouched.py), run by the formula.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rfa_mmdet.layers.untouched import are_plain, must_be_called
from rfa_mmdet.ops.common.precision import at_least_float32, autocast_dtype, compute_dtype
from rfa_mmdet.ops.common.recompute import is_recorded
from rfa_mmdet.ops.common.windows import Pair, Window
from rfa_mmdet.ops.receptive_field import WindowFeatures, fold_batch_norm
from rfa_mmdet.ops.receptive_field.backends import check_backend, use_operators

Convs = list[tuple[nn.Module, bool]]


def check_choice(backend: str, operators: tuple[str, ...], norm: nn.Module, act: nn.Module) -> str:
    """Check the choice of a backend when a layer is built.

    Args:
        backend (str): 'auto', 'reference', 'cpu' or 'triton'.
        operators (tuple[str, ...]): What the layer calls.
        norm, act (nn.Module): Of the features.

    Returns:
        str: The backend.

    Raises:
        ValueError: There is no such backend, it has no kernel of an operator, or it does not know
            the norm or the activation.
        RuntimeError: It is not available in this process.

    Example:
        >>> check_choice("auto", ("rfa_conv",), nn.GroupNorm(2, 8), nn.SiLU())
        'auto'
    """
    check_backend(backend, operators)
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


def _check_convs(backend: str, convs: Convs) -> None:
    for module, known in convs:
        if not known:
            raise ValueError(
                f"backend={backend!r}: computes with the weights of plain convolutions, without "
                f"hooks on them, not {module}; choose backend='auto'"
            )


def window_features(
    backend: str,
    operators: tuple[str, ...],
    x: Tensor,
    window: Window,
    pad: Callable[[Tensor], tuple[Tensor, Pair]],
    convs: Convs,
    feature: nn.Conv2d | None,
    norm: nn.Module,
    act: nn.Module,
    conv: nn.Conv2d,
) -> WindowFeatures | None:
    """Return features without making them, and update the norm's running statistics.

    Args:
        backend (str): The user's choice.
        operators (tuple[str, ...]): What the layer makes of the features.
        x (Tensor): (B, C, H, W).
        window (Window): Of the features.
        pad (Callable): Pads x where that is not by zeros; returns it, and the zeros to be added.
        convs (list[tuple[nn.Module, bool]]): Whose weights are read, and whether they may be.
        feature (nn.Conv2d | None): Depthwise; what comes before the norm. None: nothing does.
        norm, act (nn.Module): Of the features. It is the norm's own ``training`` that counts.
        conv (nn.Conv2d): Of the features.

    Returns:
        WindowFeatures | None: None: the layer must compute them with its modules.

    Raises:
        ValueError, TypeError, RuntimeError: A backend asked for by name cannot compute this.
    """
    # A module of another class may have no weight.
    formula = type(conv) is nn.Conv2d and not use_operators(backend, operators, x, conv.weight)
    if not formula and not (knows(norm, act) and all(known for _, known in convs)):
        if backend not in ("auto", "reference"):
            _check_modules(backend, norm, act)
            _check_convs(backend, convs)
        formula = True
    of_batch = uses_batch_statistics(norm)
    group = reduces_over(norm) if of_batch else None
    if group is not None and not is_recorded():
        formula = _agree(norm, group, formula, backend, x.device)
    if formula:
        return None
    # An empty batch, and one value a channel, which has no variance, are for torch to treat; but
    # ranks that reduce together must all take the same path.
    if group is None and window.count(x) < (2 if of_batch else 1):
        return None
    x, padding = pad(x)
    window = window._replace(padding=padding)
    dtype = autocast_dtype(x)
    x = x if x.dtype == dtype else x.to(dtype)
    dtype = compute_dtype(x.dtype)
    kernels = _window_values(x, window) if feature is None else feature.weight
    kernels = kernels if kernels.dtype == dtype else kernels.to(dtype)
    if not isinstance(norm, _BatchNorm):
        shift = kernels.new_zeros(len(kernels))
    elif of_batch:
        scale, offset = (None if t is None else t.to(dtype) for t in (norm.weight, norm.bias))
        x, kernels, shift, mean, var = fold_batch_norm(
            x, kernels, scale, offset, norm.eps, window, group
        )
        update_running(norm, mean, var)
    else:
        scale, shift = fixed_scale_and_shift(norm)
        if scale.dtype != dtype:
            scale, shift = scale.to(dtype), shift.to(dtype)
        kernels = kernels * scale.view(-1, 1, 1, 1)
    return WindowFeatures(x, kernels, shift, type(act) is nn.ReLU, window)


# By norm, the group that it reduces over and whether its ranks take the formula.
_AGREED: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def _agree(norm: nn.Module, group: Any, formula: bool, backend: str, device: torch.device) -> bool:
    """Take the formula on all ranks of SyncBatchNorm if one of them must.

    It reduces other tensors than the operators do, and ranks that differ would wait for each other
    without end. The ranks are asked in the first forward pass of each norm.

    Raises:
        RuntimeError: Not all can take it, or one that could do without no longer can.
    """
    known, agreed = _AGREED.get(norm, (None, False))
    if known is not group:
        named = backend not in ("auto", "reference")
        choice = torch.tensor([formula, named and not formula], device=device, dtype=torch.uint8)
        choices = [torch.empty_like(choice) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(choices, choice, group=group)
        formulas, insisting = ([r for r, c in enumerate(choices) if c[i]] for i in (0, 1))
        if formulas and insisting:
            raise RuntimeError(
                f"SyncBatchNorm: ranks {formulas} of its group take the formula "
                "(backend='reference', another dtype, a hook or a replaced module), and ranks "
                f"{insisting} ask for kernels by name; do the same on all, or choose 'auto'"
            )
        agreed = bool(formulas)
        _AGREED[norm] = group, agreed
    if formula and not agreed:
        raise RuntimeError(
            "SyncBatchNorm: this rank must now take the formula (backend='reference', another "
            "dtype, a hook or a replaced module), and its group began with the operators; make "
            "such changes on every rank before the first forward pass"
        )
    return agreed


def _window_values(x: Tensor, window: Window) -> Tensor:
    """Return depthwise kernels (C * K, 1, kh, kw) whose features are the window's own values."""
    identity = torch.eye(window.positions, device=x.device).view(-1, 1, *window.kernel_size)
    return identity.repeat(x.shape[1], 1, 1, 1)


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a module computes what batch norm does, and no hook is on it.

    Subclasses that check their input otherwise do; those that compute otherwise do not.

    Example:
        >>> is_batch_norm(nn.BatchNorm2d(4)), is_batch_norm(nn.GroupNorm(2, 4))
        (True, False)
    """
    known = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    # One inside makes its weight.
    return known and not norm.__dict__["_modules"] and not must_be_called(norm)


def is_no_norm(norm: nn.Module) -> bool:
    """Whether a module stands in for a norm that is not there, and no hook is on it.

    Example:
        >>> is_no_norm(nn.Identity()), is_no_norm(nn.BatchNorm2d(4))
        (True, False)
    """
    return type(norm) is nn.Identity and not must_be_called(norm)


def is_plain_act(act: nn.Module) -> bool:
    """Whether an activation is ReLU or none, and no hook is on it.

    Example:
        >>> is_plain_act(nn.ReLU()), is_plain_act(nn.Identity()), is_plain_act(nn.SiLU())
        (True, True, False)
    """
    return type(act) in (nn.ReLU, nn.Identity) and not must_be_called(act)


def _knows_norm(norm: nn.Module) -> bool:
    return is_batch_norm(norm) or is_no_norm(norm)


def knows(norm: nn.Module, act: nn.Module) -> bool:
    """Whether the operators compute what a norm and an activation do.

    Example:
        >>> knows(nn.BatchNorm2d(4), nn.ReLU()), knows(nn.GroupNorm(2, 4), nn.ReLU())
        (True, False)
    """
    return _knows_norm(norm) and is_plain_act(act)


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batch.

    Example:
        >>> uses_batch_statistics(nn.BatchNorm2d(4)), uses_batch_statistics(nn.Identity())
        (True, False)
    """
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def fixed_scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return what batch norm on its running statistics multiplies by, and what it adds.

    Args:
        norm (_BatchNorm): Of N channels.

    Returns:
        tuple[Tensor, Tensor]: (N,) each, at least float32.

    Example:
        >>> scale, shift = fixed_scale_and_shift(nn.BatchNorm2d(1, eps=0.0))
        >>> scale.tolist(), shift.tolist()
        ([1.0], [0.0])
    """
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(at_least_float32(var) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    if norm.bias is None:
        return scale, -scale * mean
    return scale, torch.addcmul(at_least_float32(norm.bias), scale, mean, value=-1)


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias under which ``conv`` computes its norm as well.

    Args:
        conv (nn.Conv2d): The convolution.
        norm (nn.Module): What follows.

    Returns:
        tuple[Tensor, Tensor | None] | None: Of the convolution's dtype. None: call the modules
        instead, as the norm is none on fixed statistics, the convolution has a bias, a hook is on
        either, or a graph is recorded.

    Example:
        >>> conv, norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4).eval()
        >>> x = torch.rand(1, 2, 5, 5)
        >>> both = nn.functional.conv2d(x, *fold_norm(conv, norm))
        >>> torch.allclose(both, norm(conv(x)), atol=1e-6)
        True
        >>> fold_norm(conv, norm.train()) is None
        True
    """
    if is_recorded() or not are_plain(nn.Conv2d, conv) or conv.bias is not None:
        return None
    if is_no_norm(norm):
        return conv.weight, None
    if not (isinstance(norm, _BatchNorm) and is_batch_norm(norm)) or uses_batch_statistics(norm):
        return None
    scale, shift = fixed_scale_and_shift(norm)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


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
def update_running(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
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
    count = norm.num_batches_tracked
    if count is not None:
        count.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    factor: float | Tensor | None = norm.momentum
    if factor is None:  # cumulative average
        factor = 1 / count.to(mean.dtype) if count is not None else 0.0
    for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
        running.lerp_(new.to(running.dtype), factor)
