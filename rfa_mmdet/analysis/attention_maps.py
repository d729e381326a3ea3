"""Where the attention of a model's layers acts, as one map a layer."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def passed(attention: Tensor, x: Tensor) -> Tensor:
    """How much of a map its weights let through, in each cell.

    Weights of channels alone are the same in all cells; what they let through is not.

    Args:
        attention (Tensor): Broadcast to ``x``.
        x (Tensor): (B, C, H, W), the map that is weighed.

    Returns:
        Tensor: (B, H, W): mean of the weights over channels, each counted by the size of its value
        in the cell; the plain mean where all values are 0.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
        >>> passed(torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1), x)
        tensor([[[0.7500]]])
    """
    attention, size = attention.float().expand_as(x), x.float().abs()
    total = size.sum(1)
    weighed = (attention * size).sum(1) / total.clamp_min(1e-12)
    return torch.where(total > 0, weighed, attention.mean(1))


@dataclass(frozen=True)
class Heat:
    """Where one layer acts.

    Attributes:
        layer (str): Name in the model.
        kind (str): Class of the layer.
        values (Tensor): (h, w) on the CPU.
        meaning (str): What they are: 'focus', of RFAConv: see :func:`focus`; 'weight': the mean
            weight in the cell, see :func:`passed`.
    """

    layer: str
    kind: str
    values: Tensor
    meaning: str


def attention_layers(model: nn.Module, pattern: str = "") -> dict[str, nn.Module]:
    """Return the layers that can say what they weigh their input by.

    Those are the layers with ``attention_map``; one inside another is a part of that.

    Args:
        model (nn.Module): Any.
        pattern (str): Regular expression searched in the names. Defaults to every layer.

    Returns:
        dict[str, nn.Module]: By name.

    Raises:
        ValueError: The pattern is no regular expression, or no layer has a name that matches.

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
    """Run the model on an image and return where each layer with attention acts.

    Args:
        model (nn.Module): In evaluation mode.
        run (Callable): Runs the model once, on one image.
        pattern (str): As of :func:`attention_layers`.

    Returns:
        tuple[list[Heat], Any]: In the order in which the layers ran, every time that they did; not
        of maps that are no image's, such as those of regions. And what ``run`` returned.

    Raises:
        ValueError: As of :func:`attention_layers`.

    Example:
        >>> from rfa_mmdet.layers import SE
        >>> model = nn.Sequential(RFAConv(3, 8, 3), SE(8)).eval()
        >>> heats, _ = heat_maps(model, lambda: model(torch.rand(1, 3, 6, 9)))
        >>> [(heat.layer, heat.kind, heat.meaning, tuple(heat.values.shape)) for heat in heats]
        [('0', 'RFAConv', 'focus', (6, 9)), ('1', 'SE', 'weight', (6, 9))]
    """
    heats: list[Heat] = []

    def look(name: str, layer: Any, x: Tensor) -> None:
        if x.shape[0] != 1:
            return
        attention = layer.attention_map(x)
        if isinstance(layer, RFAConv):
            values, meaning = focus(attention.float()), "focus"
        else:
            meaning = "weight"
            # Of a window's features, which are not kept: all alike.
            windows = attention.dim() == 5
            values = attention.float().mean((1, 2)) if windows else passed(attention, x)
        heats.append(Heat(name, type(layer).__name__, values[0].cpu(), meaning))

    return heats, _watch(attention_layers(model, pattern), run, look)


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
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, RFAConv)}
    maps: dict[str, Tensor] = {}

    def look(name: str, layer: RFAConv, x: Tensor) -> None:
        maps[name] = layer.attention_map(x).cpu()

    return maps, _watch(_matching(layers, pattern, "RFAConv"), run, look)


def _matching(layers: Mapping[str, nn.Module], pattern: str, what: str) -> dict[str, nn.Module]:
    try:
        chosen = {name: layer for name, layer in layers.items() if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(f"pattern={pattern!r}: is no regular expression: {error}") from error
    if not chosen:
        raise ValueError(
            f"pattern={pattern!r} matches no {what}; the model has: {', '.join(layers) or 'none'}"
        )
    return chosen


@torch.no_grad()
def _watch(layers: dict[str, nn.Module], run: Callable[[], Any], look: Callable) -> Any:
    """Run, and show ``look`` the input of each layer."""

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
