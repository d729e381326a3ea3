"""Convert modules to plain tensors and numbers for the kernels.

The operators support batch norm and ReLU. Other norms and activations (GroupNorm, SiLU, ...), and
modules that must be called (untouched.py), use the formula.
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
        operators (tuple[str, ...]): Operators that the layer calls.
        norm, act (nn.Module): Norm and activation of the features.

    Returns:
        str: The backend.

    Raises:
        ValueError: The backend is unknown, or does not support an operator, the norm or the
            activation.
        RuntimeError: The backend is not available in this process.

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
                f"backend={backend!r}: does not support {module}, only batch norm or no norm and "
                "ReLU or no activation, without hooks; use backend='auto'"
            )


def _check_convs(backend: str, convs: Convs) -> None:
    for module, known in convs:
        if not known:
            raise ValueError(
                f"backend={backend!r}: does not support {module}, only plain convolutions without "
                "hooks; use backend='auto'"
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
    """Return lazily computed features, and update the norm's running statistics.

    Args:
        backend (str): The chosen backend.
        operators (tuple[str, ...]): Operators that the layer applies to the features.
        x (Tensor): (B, C, H, W).
        window (Window): Window of the features.
        pad (Callable): Applies non-zero padding to x; returns x and the remaining zero padding.
        convs (list[tuple[nn.Module, bool]]): Convolutions whose weights are read, and whether that
            is allowed.
        feature (nn.Conv2d | None): Depthwise convolution before the norm; None: raw windows.
        norm, act (nn.Module): Norm and activation of the features. The norm's own ``training``
            counts.
        conv (nn.Conv2d): Final convolution.

    Returns:
        WindowFeatures | None: The features, or None if the layer must call its modules.

    Raises:
        ValueError, TypeError, RuntimeError: The chosen backend does not support this.
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
    # torch handles an empty batch, and one value per channel, which has no variance; but ranks that
    # reduce together must all take the same path.
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


# Norm -> the group that it reduces over, and whether its ranks use the formula.
_AGREED: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def _agree(norm: nn.Module, group: Any, formula: bool, backend: str, device: torch.device) -> bool:
    """Use the formula on all ranks of SyncBatchNorm if one of them must.

    The formula reduces other tensors than the operators, so ranks that differ would wait for each
    other forever. The ranks agree in the first forward pass of each norm.

    Raises:
        RuntimeError: The ranks cannot agree, or this rank can no longer do as agreed.
    """
    known, agreed = _AGREED.get(norm, (None, False))
    if known is not group:
        named = backend not in ("auto", "reference")
        choice = torch.tensor([formula, named and not formula], device=device, dtype=torch.uint8)
        choices = [torch.empty_like(choice) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(choices, choice, group=group)
        formulas, forced = ([r for r, c in enumerate(choices) if c[i]] for i in (0, 1))
        if formulas and forced:
            raise RuntimeError(
                f"SyncBatchNorm: ranks {formulas} of its group must use the formula "
                "(backend='reference', another dtype, a hook or a replaced module), but ranks "
                f"{forced} force kernels; use the same backend on all ranks, or 'auto'"
            )
        agreed = bool(formulas)
        _AGREED[norm] = group, agreed
    if formula and not agreed:
        raise RuntimeError(
            "SyncBatchNorm: this rank must now use the formula (backend='reference', another "
            "dtype, a hook or a replaced module), but its group started with the operators; make "
            "such changes on every rank before the first forward pass"
        )
    return agreed


def _window_values(x: Tensor, window: Window) -> Tensor:
    """Return depthwise kernels (C * K, 1, kh, kw) that give the window's own values."""
    identity = torch.eye(window.positions, device=x.device).view(-1, 1, *window.kernel_size)
    return identity.repeat(x.shape[1], 1, 1, 1)


def is_batch_norm(norm: nn.Module) -> bool:
    """Return whether a module computes batch norm and has no hooks.

    True for subclasses that only check their input differently.

    Example:
        >>> is_batch_norm(nn.BatchNorm2d(4)), is_batch_norm(nn.GroupNorm(2, 4))
        (True, False)
    """
    known = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    # A parametrization inside would compute its weight.
    return known and not norm.__dict__["_modules"] and not must_be_called(norm)


def is_no_norm(norm: nn.Module) -> bool:
    """Return whether a module is the placeholder for no norm, and has no hooks.

    Example:
        >>> is_no_norm(nn.Identity()), is_no_norm(nn.BatchNorm2d(4))
        (True, False)
    """
    return type(norm) is nn.Identity and not must_be_called(norm)


def is_plain_act(act: nn.Module) -> bool:
    """Return whether an activation is ReLU or none, and has no hooks.

    Example:
        >>> is_plain_act(nn.ReLU()), is_plain_act(nn.Identity()), is_plain_act(nn.SiLU())
        (True, True, False)
    """
    return type(act) in (nn.ReLU, nn.Identity) and not must_be_called(act)


def _knows_norm(norm: nn.Module) -> bool:
    return is_batch_norm(norm) or is_no_norm(norm)


def knows(norm: nn.Module, act: nn.Module) -> bool:
    """Return whether the operators support a norm and an activation.

    Example:
        >>> knows(nn.BatchNorm2d(4), nn.ReLU()), knows(nn.GroupNorm(2, 4), nn.ReLU())
        (True, False)
    """
    return _knows_norm(norm) and is_plain_act(act)


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Return whether a norm uses the statistics of the batch.

    Example:
        >>> uses_batch_statistics(nn.BatchNorm2d(4)), uses_batch_statistics(nn.Identity())
        (True, False)
    """
    return isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)


def fixed_scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the scale and shift of batch norm on its running statistics.

    Args:
        norm (_BatchNorm): Batch norm of N channels.

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
    """Return a weight and bias that fold a norm into the convolution before it.

    Args:
        conv (nn.Conv2d): The convolution.
        norm (nn.Module): The norm after it.

    Returns:
        tuple[Tensor, Tensor | None] | None: Weight and bias in the convolution's dtype, or None if
        the modules must be called: the norm has no fixed statistics, the convolution has a bias,
        one of them has hooks, or a graph is being recorded.

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
    """Return the process group that SyncBatchNorm currently reduces over, or None.

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
    """Update batch norm's running statistics as its own forward pass does.

    Args:
        norm (nn.Module): Batch norm of N channels.
        mean, var (Tensor): Mean and unbiased variance of the batch, (N,).

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
