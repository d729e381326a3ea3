"""Values under which learnt features, and the norm behind them, leave the window's values alone.

:class:`~rfa_mmdet.layers.conv.receptive_field.ReceptiveFieldConv` starts from them. On its running
statistics the norm is the identity at once; on those of a batch, once it is calibrated to them.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def identity_features(channels: int, kernel_size: tuple[int, int]) -> Tensor:
    """Return depthwise kernels of which number i picks position i of the window.

    Args:
        channels (int): C.
        kernel_size (tuple[int, int]): (kh, kw), K = kh * kw.

    Returns:
        Tensor: (C * K, 1, kh, kw).

    Example:
        >>> identity_features(3, (1, 2)).flatten(1)[:2]
        tensor([[1., 0.],
                [0., 1.]])
    """
    positions = kernel_size[0] * kernel_size[1]
    one_hot = torch.eye(positions).reshape(positions, 1, *kernel_size)
    return one_hot.repeat(channels, 1, 1, 1)


def norm_obstacle(norm: nn.Module) -> str:
    """Say why a norm cannot be made the identity; empty if it can.

    Example:
        >>> norm_obstacle(nn.GroupNorm(2, 4))
        'its norm, GroupNorm, cannot be the identity; BN can'
        >>> norm_obstacle(nn.BatchNorm2d(4))
        ''
    """
    if isinstance(norm, nn.Identity):
        return ""
    if not isinstance(norm, _BatchNorm):
        return f"its norm, {type(norm).__name__}, cannot be the identity; BN can"
    if not (norm.affine and norm.track_running_stats):
        return "its BN has no parameters or no statistics, which the identity needs"
    return ""


@torch.no_grad()
def identity_norm(norm: nn.Module, floor: float) -> dict[str, Tensor]:
    """Return values under which a norm on its running statistics only takes ``floor`` off.

    Args:
        norm (nn.Module): BN of C channels, or ``nn.Identity``.
        floor (float): Lowest value that the ReLU behind the norm shall let through; at most 0.

    Returns:
        dict[str, Tensor]: By name, (C,) each.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> _ = norm.load_state_dict(identity_norm(norm, floor=-1.0), strict=False)
        >>> norm.eval()(torch.full((1, 2, 1, 1), -0.75)).flatten().tolist()
        [0.25, 0.25]
    """
    if not isinstance(norm, _BatchNorm):
        return {}
    return {
        "weight": torch.full_like(norm.weight, (1 + norm.eps) ** 0.5),
        "bias": torch.full_like(norm.bias, -floor),
        "running_mean": torch.zeros_like(norm.weight),
        "running_var": torch.ones_like(norm.weight),
        "num_batches_tracked": torch.tensor(0),
    }


def is_uncalibrated(norm: nn.Module, floor: float) -> bool:
    """Whether a norm has the values of :func:`identity_norm`, so is no identity on batches.

    Example:
        >>> is_uncalibrated(nn.BatchNorm2d(2), floor=0.0)
        False
    """
    if not isinstance(norm, _BatchNorm) or norm_obstacle(norm):
        return False
    own = norm.state_dict()
    return all(
        bool((own[name] == value).all())
        for name, value in identity_norm(norm, floor).items()
        if name != "num_batches_tracked"
    )


@torch.no_grad()
def calibrate_norm(norm: _BatchNorm, mean: Tensor, variance: Tensor, floor: float) -> None:
    """Make a norm the identity, less ``floor``, on batches with these statistics.

    Args:
        norm (_BatchNorm): Of C channels.
        mean, variance (Tensor): (C,), of its input; biased, as batch norm divides by it.
        floor (float): As of :func:`identity_norm`.

    Example:
        >>> norm, x = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
        >>> calibrate_norm(norm, x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), floor=0.0)
        >>> bool((norm.train()(x) - x).abs().max() < 1e-5)
        True
    """
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean - floor)
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)
