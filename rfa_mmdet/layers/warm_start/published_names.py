"""Map the parameter names of the papers' published code to ours.

Layers load both: published names are renamed on the fly.
"""

from collections.abc import Iterable
from typing import Any

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _conv(published: str, ours: str) -> dict[str, str]:
    return {f"{published}.{name}": f"{ours}.{name}" for name in ("weight", "bias")}


def _norm(published: str, ours: str) -> dict[str, str]:
    return {f"{published}.{name}": f"{ours}.{name}" for name in _NORM}


def _coordinate(ours: str) -> dict[str, str]:
    convs = [_conv(name, f"{ours}.{name}") for name in ("conv1", "conv_h", "conv_w")]
    return {**convs[0], **_norm("bn1", f"{ours}.bn1"), **convs[1], **convs[2]}


_GENERATE = {"generate.0.weight": "feature.weight", **_norm("generate.1", "norm")}
_FINAL = _conv("conv.0", "conv")

# All published names of each layer, including those that are the same as ours. Names that end in
# 'weight' are in every file; the others depend on the layer's bias and norm.
# EMA (gn, conv1x1, conv3x3) and ConAM (linear1, linear2) keep the published names.
PUBLISHED: dict[str, dict[str, str]] = {
    "RFAConv": {
        "get_weight.1.weight": "attention.weight",
        "generate_feature.0.weight": "feature.weight",
        **_norm("generate_feature.1", "norm"),
        **_FINAL,
    },
    "RFCBAMConv": {
        **_GENERATE,
        "get_weight.0.weight": "spatial.weight",
        "se.fc.0.weight": "se.fc.0.weight",
        "se.fc.2.weight": "se.fc.2.weight",
        **_FINAL,
    },
    "RFCAConv": {**_GENERATE, **_coordinate("coordinate"), **_FINAL},
    "CAMConv": {
        "mlp.0.weight": "attention.mlp.0.weight",
        "mlp.2.weight": "attention.mlp.2.weight",
        **_FINAL,
    },
    "CBAMConv": {
        "mlp.0.weight": "attention.channel.mlp.0.weight",
        "mlp.2.weight": "attention.channel.mlp.2.weight",
        "spatital.weight": "attention.spatial.weight",  # sic
        **_FINAL,
    },
    "CAConv": {**_coordinate("attention"), **_FINAL},
}


def published_weights(layer: str) -> list[str]:
    """Return the published names that every file with this layer contains.

    Args:
        layer (str): Name of the layer's class, a key of :data:`PUBLISHED`.

    Returns:
        list[str]: The names without the layer's prefix.

    Example:
        >>> published_weights("CAMConv")
        ['mlp.0.weight', 'mlp.2.weight', 'conv.0.weight']
    """
    return [name for name in PUBLISHED[layer] if name.endswith("weight")]


def rename_published(layer: str, state_dict: dict[str, Any], prefix: str) -> int:
    """Rename a layer's published names to ours, in place; do nothing unless all are present.

    Only looks up the names in :data:`PUBLISHED`, so the cost does not depend on the size of the
    file, and a ResNet's own ``conv1`` next to a layer without prefix is left alone.

    Args:
        layer (str): Name of the layer's class.
        state_dict (dict[str, Any]): State dict of the layer, or of a model that contains it.
        prefix (str): The layer's prefix, including the dot.

    Returns:
        int: Number of renamed keys.

    Example:
        >>> state = {"a.mlp.0.weight": 1, "a.mlp.2.weight": 2, "a.conv.0.weight": 3, "conv.bias": 4}
        >>> rename_published("CAMConv", state, "a."), sorted(state)
        (3, ['a.attention.mlp.0.weight', 'a.attention.mlp.2.weight', 'a.conv.weight', 'conv.bias'])
    """
    if layer not in PUBLISHED:
        return 0
    if not all(prefix + name in state_dict for name in published_weights(layer)):
        return 0
    changed = 0
    for published, ours in PUBLISHED[layer].items():
        # If a file has both names, keep both: loading it then reports the leftover.
        if prefix + published in state_dict and prefix + ours not in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + published)
            changed += 1
    return changed


def find_published(keys: Iterable[str]) -> dict[str, str]:
    """Find the layers with published names in a state dict.

    A prefix is a layer if the names below it are those of one published layer: all of its weights
    and nothing else. Other modules with an ``mlp.0.weight`` or ``conv.0.weight`` do not match.

    Args:
        keys (Iterable[str]): Keys of the state dict.

    Returns:
        dict[str, str]: Prefix of each layer, including the dot -> name of its class.

    Example:
        >>> find_published(["a.mlp.0.weight", "a.mlp.2.weight", "a.conv.0.weight", "b.weight"])
        {'a.': 'CAMConv'}
    """
    keys = list(keys)
    common = "conv.0.weight"  # every layer has it
    prefixes = [key.removesuffix(common) for key in keys if f".{key}".endswith(f".{common}")]
    layers = {}
    for prefix in prefixes:
        names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
        for layer, published in PUBLISHED.items():
            if names.issuperset(published_weights(layer)) and names <= published.keys():
                layers[prefix] = layer
    return layers
