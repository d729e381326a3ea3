"""Rename the layers of a published checkpoint to this package's names."""

from pathlib import Path
from typing import NamedTuple

from rfa_mmdet.checkpoints.files import read_checkpoint, writable, write_checkpoint
from rfa_mmdet.errors import UserError
from rfa_mmdet.layers.warm_start.published_names import (
    PUBLISHED,
    find_published,
    published_weights,
    rename_published,
)


class ConvertedLayer(NamedTuple):
    """A renamed layer.

    Attributes:
        prefix (str): Prefix of its keys, including the dot.
        system (str): Name of its class.
        renamed (int): Number of renamed keys.
    """

    prefix: str
    system: str
    renamed: int


class Conversion(NamedTuple):
    """Result of a conversion.

    Attributes:
        layers (list[ConvertedLayer]): Renamed layers, in file order.
        kept (int): Number of unchanged keys of the state dict.
        warnings (list[str]): Caveats about using the new file.
    """

    layers: list[ConvertedLayer]
    kept: int
    warnings: list[str]


def convert_checkpoint(source: str, target: str | Path, overwrite: bool = False) -> Conversion:
    """Write a copy of a checkpoint in which all published layers have this package's names.

    Everything else in the file is kept. The copy is written atomically.

    Args:
        source (str): File or URL that MMEngine can load. Its state dict is under 'state_dict',
            under 'model', or the file itself.
        target (str | Path): File to write; missing folders are created.
        overwrite (bool): Whether to replace an existing ``target``. Defaults to False.

    Returns:
        Conversion: The renamed layers.

    Raises:
        UserError: A file cannot be read or written, or contains no published layer.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> names = ["mlp.0.weight", "mlp.2.weight", "conv.0.weight"]
        >>> torch.save({f"conv1.{name}": torch.ones(1) for name in names}, f"{folder}/in.pth")
        >>> convert_checkpoint(f"{folder}/in.pth", f"{folder}/out.pth").layers
        [ConvertedLayer(prefix='conv1.', system='CAMConv', renamed=3)]
    """
    target = writable(target, overwrite)
    checkpoint = read_checkpoint(source)
    state_dict = _state_dict(checkpoint)
    layers = [
        ConvertedLayer(prefix, system, rename_published(system, state_dict, prefix))
        for prefix, system in find_published(k for k in state_dict if isinstance(k, str)).items()
    ]
    if not layers:
        raise UserError(f"{source}: {_nothing_found()}")
    write_checkpoint(checkpoint, target)
    kept = len(state_dict) - sum(layer.renamed for layer in layers)
    return Conversion(layers, kept, _warnings(checkpoint, state_dict))


def _state_dict(checkpoint: dict) -> dict:
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            return checkpoint[key]
    return checkpoint


def _nothing_found() -> str:
    systems = [f"  {system}: {', '.join(published_weights(system))}" for system in PUBLISHED]
    return "\n".join(
        [
            "no layer with published names found. A layer needs all keys of one of these lines "
            "after a common prefix, and no others except their biases and statistics:",
            *systems,
        ]
    )


def _warnings(checkpoint: dict, state_dict: dict) -> list[str]:
    warnings = []
    if state_dict is checkpoint.get("model"):
        warnings.append(
            "the state dict is still under 'model'; MMEngine's load_from expects it under "
            "'state_dict' or as the file itself"
        )
    if "optimizer" in checkpoint:
        warnings.append(
            "the optimizer state is kept, but follows the parameter order of the published model: "
            "use the file with load_from, not to resume"
        )
    return warnings
