"""Parameter values that make learnt features and their norm the identity.

:class:`~rfa_mmdet.layers.conv.receptive_field.ReceptiveFieldConv` starts from them. The norm is the
identity on its running statistics, and on batch statistics once it is calibrated to them.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def identity_features(channels: int, kernel_size: tuple[int, int]) -> Tensor:
    """Return depthwise kernels, the i-th of which picks position i of the window.

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
    """Return why a norm cannot be made the identity; empty if it can.

    Example:
        >>> norm_obstacle(nn.GroupNorm(2, 4)).startswith("its norm, GroupNorm, removes the scale")
        True
        >>> norm_obstacle(nn.BatchNorm2d(4))
        ''
    """
    if isinstance(norm, nn.Identity):
        return ""
    if not isinstance(norm, _BatchNorm):
        return (
            f"its norm, {type(norm).__name__}, removes the scale of its input, so the layer cannot "
            "equal a convolution; use BN or norm_cfg=None"
        )
    if not (norm.affine and norm.track_running_stats):
        return "its BN needs affine=True and track_running_stats=True to be the identity"
    return ""


@torch.no_grad()
def identity_norm(norm: nn.Module, floor: float) -> dict[str, Tensor]:
    """Return values with which a norm, on its running statistics, only subtracts ``floor``.

    Args:
        norm (nn.Module): BN of C channels, or ``nn.Identity``.
        floor (float): Lowest value that must pass the ReLU after the norm; at most 0.

    Returns:
        dict[str, Tensor]: Values by name, (C,) each.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> _ = norm.load_state_dict(identity_norm(norm, floor=-1.0), strict=False)
        >>> norm.eval()(torch.full((1, 2, 1, 1), -0.75)).flatten().tolist()
        [0.25, 0.25]
    """
    if not isinstance(norm, _BatchNorm):
        return {}
    ones = torch.ones_like(norm.weight)
    return {
        "weight": (ones + norm.eps).sqrt(),
        "bias": torch.full_like(norm.bias, -floor),
        "running_mean": torch.zeros_like(norm.weight),
        "running_var": ones,
        "num_batches_tracked": torch.tensor(0),
    }
