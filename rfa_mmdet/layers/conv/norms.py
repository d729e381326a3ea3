"""Which norms and activations may be computed without calling their module, and how."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from rfa_mmdet.ops.common.precision import at_least_float32
from rfa_mmdet.ops.common.recompute import is_recorded


def must_be_called(module: nn.Module) -> bool:
    """Whether somebody looks on, by a hook on the module or on all, or has put another forward in.

    Example:
        >>> must_be_called(nn.ReLU())
        False
    """
    return bool(
        _has_any_global_hook()
        or "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether a module computes what batch norm does, and nothing looks on.

    Subclasses that check their input otherwise do; those that compute otherwise do not.

    Example:
        >>> is_batch_norm(nn.BatchNorm2d(4)), is_batch_norm(nn.GroupNorm(2, 4))
        (True, False)
    """
    known = type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return known and not must_be_called(norm)


def is_no_norm(norm: nn.Module) -> bool:
    """Whether a module stands in for a norm that is not there, and nothing looks on.

    Example:
        >>> is_no_norm(nn.Identity()), is_no_norm(nn.BatchNorm2d(4))
        (True, False)
    """
    return type(norm) is nn.Identity and not must_be_called(norm)


def is_plain_act(act: nn.Module) -> bool:
    """Whether an activation is ReLU or none, and nothing looks on.

    Example:
        >>> is_plain_act(nn.ReLU()), is_plain_act(nn.Identity()), is_plain_act(nn.SiLU())
        (True, True, False)
    """
    return type(act) in (nn.ReLU, nn.Identity) and not must_be_called(act)


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias under which ``conv`` computes its norm as well.

    Args:
        conv (nn.Conv2d): The convolution.
        norm (nn.Module): What follows.

    Returns:
        tuple[Tensor, Tensor | None] | None: Of the convolution's dtype. None: the modules are to be
        called, as the norm is none on fixed statistics, the convolution has a bias, somebody
        looks on at either, or a graph is recorded.

    Example:
        >>> conv, norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4).eval()
        >>> x = torch.rand(1, 2, 5, 5)
        >>> both = nn.functional.conv2d(x, *fold_norm(conv, norm))
        >>> torch.allclose(both, norm(conv(x)), atol=1e-6)
        True
        >>> fold_norm(conv, norm.train()) is None
        True
    """
    if type(conv) is not nn.Conv2d or conv.bias is not None or must_be_called(conv):
        return None
    if is_recorded():
        return None
    if is_no_norm(norm):
        return conv.weight, None
    if not is_batch_norm(norm) or norm.training or norm.running_mean is None:
        return None
    scale = torch.rsqrt(at_least_float32(norm.running_var) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -scale * norm.running_mean
    if norm.bias is not None:
        shift = shift + norm.bias
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)
