"""Rename the layers of a published checkpoint, so that the file itself carries our names."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.engine.errors import UserError
from rfa_mmdet.layers.checkpoint_keys import (
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
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> names = ["mlp.0.weight", "mlp.2.weight", "conv.0.weight"]
        >>> torch.save({f"conv1.{name}": torch.ones(1) for name in names}, f"{folder}/in.pth")
        >>> convert_checkpoint(f"{folder}/in.pth", f"{folder}/out.pth").layers
        [ConvertedLayer(prefix='conv1.', system='CAMConv', renamed=3)]
    """
    target = Path(target)
    if target.is_dir():
        raise UserError(f"{target}: is a folder; name the file to write")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; --overwrite replaces it")
    try:
        checkpoint = CheckpointLoader.load_checkpoint(str(source), "cpu", logger="silent")
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file") from error
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error

    state_dict = _state_dict(source, checkpoint)
    layers = [
        ConvertedLayer(prefix, system, rename_published(system, state_dict, prefix))
        for prefix, system in find_published(k for k in state_dict if isinstance(k, str)).items()
    ]
    if not layers:
        raise UserError(f"{source}: {_nothing_found()}")
    _save(checkpoint, target)
    kept = len(state_dict) - sum(layer.renamed for layer in layers)
    return Conversion(layers, kept, _warnings(checkpoint, state_dict))


def _state_dict(source: str, checkpoint: object) -> dict:
    if not isinstance(checkpoint, dict):
        raise UserError(f"{source}: holds a {type(checkpoint).__name__}, where a dict is right")
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


def _save(checkpoint: dict, target: Path) -> None:
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, part)
        part.replace(target)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
        raise UserError(f"{target}: cannot be written: {error}") from error
    finally:
        with suppress(OSError):  # none there, or no folder for it
            part.unlink()
