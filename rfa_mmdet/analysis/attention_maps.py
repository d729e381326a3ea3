"""Extract attention maps from a model's layers, one map per layer."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfa_mmdet.layers import RFAConv


def focus(attention: Tensor) -> Tensor:
    """Return how focused the attention over K positions is: 0 if uniform, 1 if on one position.

    Args:
        attention (Tensor): (B, C, K, h, w); sums to 1 over K.

    Returns:
        Tensor: 1 - entropy / log K, averaged over channels, (B, h, w).

    Example:
        >>> uniform = torch.full((1, 2, 9, 3, 3), 1 / 9)
        >>> bool(focus(uniform).abs().max() < 1e-6)
        True
    """
    entropy = -(attention * attention.clamp_min(1e-12).log()).sum(2)
    return (1 - entropy / math.log(attention.shape[2])).mean(1)


def passed(attention: Tensor, x: Tensor) -> Tensor:
    """Return how much of a feature map passes its attention weights, at every position.

    Channel weights are the same everywhere, but how much of the map they let through is not.

    Args:
        attention (Tensor): Attention weights, broadcastable to ``x``.
        x (Tensor): The feature map, (B, C, H, W).

    Returns:
        Tensor: Mean of the weights over channels, weighted by the magnitude of the features,
        (B, H, W); the plain mean where all features are 0.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> passed(torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1), x)
        tensor([[[0.7500]]])
    """
    attention, size = attention.float().expand_as(x), x.float().abs()
    total = size.sum(1)
    weighted = (attention * size).sum(1) / total.clamp_min(1e-12)
    return torch.where(total > 0, weighted, attention.mean(1))


@dataclass(frozen=True)
class Heat:
    """Heat map of one layer.

    Attributes:
        layer (str): Name of the layer in the model.
        kind (str): Class of the layer.
        values (Tensor): (h, w), on the CPU.
        meaning (str): 'focus' for RFAConv, see :func:`focus`; 'weight' for all others: the mean
            weight at each position, see :func:`passed`.
    """

    layer: str
    kind: str
    values: Tensor
    meaning: str


def attention_layers(model: nn.Module, pattern: str = "") -> dict[str, nn.Module]:
    """Return the layers with an ``attention_map`` method, without those nested in another one.

    Args:
        model (nn.Module): Any model.
        pattern (str): Regular expression to search in the names. Defaults to '': all layers.

    Returns:
        dict[str, nn.Module]: Layers by name.

    Raises:
        ValueError: The pattern is not a regular expression, or matches no layer.

    Example:
        >>> from rfa_mmdet.layers import CBAM
        >>> list(attention_layers(nn.Sequential(nn.ReLU(), CBAM(8))))
        ['1']
    """
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer in layers)
        if hasattr(layer, "attention_map") and not inside:
            layers[name] = layer
    return _matching(layers, pattern, "layer with attention")


def heat_maps(
    model: nn.Module, run: Callable[[], Any], pattern: str = ""
) -> tuple[list[Heat], Any]:
    """Run the model on an image and return the heat map of each attention layer.

    Args:
        model (nn.Module): The model, in eval mode.
        run (Callable): Runs the model once on one image.
        pattern (str): See :func:`attention_layers`. Defaults to ''.

    Returns:
        tuple[list[Heat], Any]: Heat maps in execution order, one per call of a layer on the whole
        image, not on regions; and the result of ``run``.

    Raises:
        ValueError: See :func:`attention_layers`.

    Example:
        >>> from rfa_mmdet.layers import SE
        >>> model = nn.Sequential(RFAConv(3, 8, 3), SE(8)).eval()
        >>> heats, _ = heat_maps(model, lambda: model(torch.rand(1, 3, 6, 9)))
        >>> [(heat.layer, heat.kind, heat.meaning, tuple(heat.values.shape)) for heat in heats]
        [('0', 'RFAConv', 'focus', (6, 9)), ('1', 'SE', 'weight', (6, 9))]
    """
    heats: list[Heat] = []

    def look(name: str, layer: Any, x: Tensor) -> None:
        if x.shape[0] != 1 or "roi_head" in name.split("."):
            return
        attention = layer.attention_map(x)
        if isinstance(layer, RFAConv):
            values, meaning = focus(attention.float()), "focus"
        else:
            meaning = "weight"
            # The features of windows are not available, so weight them equally.
            windows = attention.dim() == 5
            values = attention.float().mean((1, 2)) if windows else passed(attention, x)
        heats.append(Heat(name, type(layer).__name__, values[0].cpu(), meaning))

    return heats, _watch(attention_layers(model, pattern), run, look)


def attention_maps(
    model: nn.Module, run: Callable[[], Any], pattern: str = ""
) -> tuple[dict[str, Tensor], Any]:
    """Run the model and return the attention of each RFAConv whose name matches.

    Args:
        model (nn.Module): Any model with RFAConv layers.
        run (Callable): Runs the model once on some images.
        pattern (str): Regular expression to search in the names. Defaults to '': all layers.

    Returns:
        tuple[dict[str, Tensor], Any]: Layer name -> attention (B, C, K, h, w) on the CPU, in
        execution order; and the result of ``run``.

    Raises:
        ValueError: The pattern is not a regular expression, or matches no RFAConv.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), RFAConv(8, 8, 3))
        >>> maps, _ = attention_maps(model, lambda: model(torch.rand(1, 3, 8, 8)))
        >>> {name: tuple(attention.shape) for name, attention in maps.items()}
        {'2': (1, 8, 9, 6, 6)}
    """
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, RFAConv)}
    maps: dict[str, Tensor] = {}

    def look(name: str, layer: RFAConv, x: Tensor) -> None:
        maps[name] = layer.attention_map(x).cpu()

    return maps, _watch(_matching(layers, pattern, "RFAConv"), run, look)


def _matching(layers: Mapping[str, nn.Module], pattern: str, what: str) -> dict[str, nn.Module]:
    try:
        chosen = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}") from error
    if not layers:
        raise ValueError(f"the model has no {what}")
    if not chosen:
        raise ValueError(
            f"pattern={pattern!r} matches no {what}; the model has: {', '.join(layers)}"
        )
    return chosen


@torch.no_grad()
def _watch(layers: dict[str, nn.Module], run: Callable[[], Any], look: Callable) -> Any:
    """Run the model, and call ``look`` with the input of each layer."""

    def watcher(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            look(name, layer, inputs[0])

        return hook

    handles = [layer.register_forward_pre_hook(watcher(n)) for n, layer in layers.items()]
    try:
        return run()
    finally:
        for handle in handles:
            handle.remove()
