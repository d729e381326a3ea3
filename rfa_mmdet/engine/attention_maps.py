"""Where the attention of a model's layers acts, as one map a layer."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rfa_mmdet.layers import RFAConv


def focus(attention: Tensor) -> Tensor:
    """How far the attention over K positions is from weighing all alike, 0, towards one, 1.

    Args:
        attention (Tensor): (B, C, K, h, w), sums to 1 over K.

    Returns:
        Tensor: (B, h, w), 1 - entropy / log K, mean over channels.

    Example:
        >>> uniform = torch.full((1, 2, 9, 3, 3), 1 / 9)
        >>> bool(focus(uniform).abs().max() < 1e-6)
        True
    """
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(2)
    return (1 - entropy / math.log(attention.shape[2])).mean(1)


@torch.no_grad()
def attention_maps(
    model: nn.Module, run: Callable[[], Any], pattern: str = ""
) -> tuple[dict[str, Tensor], Any]:
    """Run the model and return the attention of each RFAConv whose name matches.

    Args:
        model (nn.Module): Any model that holds RFAConv layers.
        run (Callable): Runs the model once, on the images to be looked at.
        pattern (str): Regular expression searched in the layers' names. Defaults to every layer.

    Returns:
        tuple[dict[str, Tensor], Any]: Layer name to (B, C, K, h, w) on the CPU, in the order in
        which the layers ran; and what ``run`` returned.

    Raises:
        ValueError: No RFAConv has a name that matches.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), RFAConv(8, 8, 3))
        >>> maps, _ = attention_maps(model, lambda: model(torch.rand(1, 3, 8, 8)))
        >>> {name: tuple(attention.shape) for name, attention in maps.items()}
        {'2': (1, 8, 9, 6, 6)}
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, RFAConv) and not layer.is_pointwise
    }
    chosen = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    if not chosen:
        raise ValueError(
            f"pattern={pattern!r} matches no RFAConv; the model has: {', '.join(layers) or 'none'}"
        )
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(layer: RFAConv, inputs: tuple[Tensor]) -> None:
            maps[name] = layer.attention_map(inputs[0]).cpu()

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in chosen.items()]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return maps, result
