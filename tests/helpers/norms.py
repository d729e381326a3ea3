"""Batch norms with random values."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomise_norms(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give all batch norms of a module random values, so none is the identity by chance."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            if norm.affine:
                norm.weight.data.uniform_(0.5, 1.5, generator=generator)
                norm.bias.data.normal_(std=0.2, generator=generator)
            if norm.running_mean is not None:
                norm.running_mean.normal_(std=0.2, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
    return module
