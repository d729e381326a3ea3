"""Size-preserving convolutions with few channels, and their gradients.

On a CPU, oneDNN would be several times slower. These functions do not support autograd.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import no_autocast


def same_conv_gradients(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of a size-preserving convolution with an odd square kernel.

    Args:
        grad_y (Tensor): (B, O, H, W).
        x (Tensor): (B, C, H, W).
        weight (Tensor): (O, C, k, k), k odd.

    Returns:
        tuple[Tensor, Tensor]: Gradients of x and weight.

    Example:
        >>> x, weight = torch.rand(1, 2, 5, 4), torch.rand(3, 2, 7, 7)
        >>> found = same_conv_gradients(torch.rand(1, 3, 5, 4), x, weight)
        >>> [tuple(gradient.shape) for gradient in found]
        [(1, 2, 5, 4), (3, 2, 7, 7)]
    """
    padding = weight.shape[2] // 2
    with no_autocast(x):
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(grad_y, x, weight, None),
            *((1, 1), (padding, padding), (1, 1), False, (0, 0), 1),
            (False, True, False),
        )
        # As a forward convolution: with two channels, oneDNN's backward takes 2 to 13 times longer.
        grad_x = F.conv2d(grad_y, weight.flip(2, 3).transpose(0, 1), padding=padding)
    return grad_x, grad_weight


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve with a 1x1 kernel.

    Args:
        x (Tensor): (B, C, L).
        weight (Tensor): (O, C, 1, 1).
        bias (Tensor | None): (O,).

    Returns:
        Tensor: (B, O, L).

    Example:
        >>> pointwise(torch.rand(2, 4, 5), torch.rand(3, 4, 1, 1), torch.rand(3)).shape
        torch.Size([2, 3, 5])
    """
    kernel = weight.flatten(1).expand(len(x), -1, -1)
    return torch.bmm(kernel, x) if bias is None else torch.baddbmm(bias.unsqueeze(1), kernel, x)


def pointwise_gradients(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`pointwise` for x, weight and bias.

    Example:
        >>> x, weight = torch.rand(2, 4, 5), torch.rand(3, 4, 1, 1)
        >>> [tuple(g.shape) for g in pointwise_gradients(torch.rand(2, 3, 5), x, weight)]
        [(2, 4, 5), (3, 4, 1, 1), (3,)]
    """
    grad_x = torch.bmm(weight.flatten(1).T.expand(len(x), -1, -1), grad_y)
    return grad_x, torch.bmm(grad_y, x.mT).sum(0).view_as(weight), grad_y.sum((0, 2))


def conv_to_one(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve to one channel with a size-preserving 3x3 kernel.

    Args:
        x (Tensor): (B, C, H, W).
        weight (Tensor): (1, C, 3, 3).

    Returns:
        Tensor: (B, 1, H, W).

    Example:
        >>> x, weight = torch.rand(2, 4, 5, 6), torch.rand(1, 4, 3, 3)
        >>> torch.allclose(conv_to_one(x, weight), F.conv2d(x, weight, padding=1), atol=1e-5)
        True
    """
    if x.device.type != "cpu":
        return F.conv2d(x, weight, padding=1)
    # One map per kernel position, shifted and added up: a fifth of oneDNN's time.
    maps = torch.bmm(weight[0].flatten(1).T.expand(x.shape[0], -1, -1), x.flatten(2))
    left, middle, right = maps.view(-1, 3, 3, *x.shape[2:]).unbind(2)
    middle[..., 1:] += left[..., :-1]
    middle[..., :-1] += right[..., 1:]
    above, out, below = middle.unbind(1)
    out[:, 1:] += above[:, :-1]
    out[:, :-1] += below[:, 1:]
    return out.unsqueeze(1)


def conv_to_one_gradients(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`conv_to_one` for x and weight.

    Example:
        >>> x, weight = torch.rand(2, 4, 5, 6), torch.rand(1, 4, 3, 3)
        >>> found = conv_to_one_gradients(torch.rand(2, 1, 5, 6), x, weight)
        >>> [tuple(gradient.shape) for gradient in found]
        [(2, 4, 5, 6), (1, 4, 3, 3)]
    """
    if x.device.type != "cpu":
        return same_conv_gradients(grad_y, x, weight)
    padded = F.pad(grad_y[:, 0], (1, 1, 1, 1))
    # (B, 9, H * W): the outputs that each kernel position, in reverse order, contributes to.
    cells = padded.unfold(1, x.shape[2], 1).unfold(2, x.shape[3], 1).flatten(3).flatten(1, 2)
    kernel = weight[0].flatten(1).flip(1)  # (C, 9)
    grad_x = torch.bmm(kernel.expand(x.shape[0], -1, -1), cells).view_as(x)
    grad_weight = torch.bmm(x.flatten(2), cells.mT).sum(0).flip(1).view_as(weight)
    return grad_x, grad_weight
