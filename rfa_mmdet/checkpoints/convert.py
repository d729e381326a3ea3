"""Rename the layers of a published checkpoint, so that the file itself carries our names."""

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
    """A layer that has our names now.

    Attributes:
        prefix (str): Of its keys, with the dot.
        system (str): Name of its class.
        renamed (int): How many keys changed.
    """

    prefix: str
    system: str
    renamed: int


class Conversion(NamedTuple):
    """What was done to a checkpoint.

    Attributes:
        layers (list[ConvertedLayer]): In the order of the file.
        kept (int): How many keys of the state dict stayed as they were.
        warnings (list[str]): What to know before the new file is used.
    """

    layers: list[ConvertedLayer]
    kept: int
    warnings: list[str]


def convert_checkpoint(source: str, target: str | Path, overwrite: bool = False) -> Conversion:
    """Write a copy of a checkpoint in which every published layer has our names.

    Everything else in the file stays as it is. The copy appears only when it is complete.

    Args:
        source (str): File or URL, of what MMEngine loads. Its state dict stands under 'state_dict',
            under 'model', or is the file.
        target (str | Path): File to write; its folder is made if it is missing.
        overwrite (bool): Whether ``target`` may exist. Defaults to False.

    Returns:
        Conversion: What was done.

    Raises:
        UserError: A file cannot be read or written, or holds no published layer.

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
            "no layer with published names; looked for keys that, after a common prefix, are",
            *systems,
            "all of one line, with the biases and statistics that go with them and nothing else",
        ]
    )


def _warnings(checkpoint: dict, state_dict: dict) -> list[str]:
    warnings = []
    if state_dict is checkpoint.get("model"):
        warnings.append(
            "the state dict stands under 'model', as it did; MMEngine's load_from reads it under "
            "'state_dict' or as the file itself"
        )
    if "optimizer" in checkpoint:
        warnings.append(
            "the optimizer's state is kept, but counts parameters in the published model's order: "
            "use the file as load_from, not to resume"
        )
    return warnings
