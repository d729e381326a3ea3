"""Read and write checkpoint files, with clear errors for user mistakes."""

from pathlib import Path

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints.pretrained import fetch
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole


def writable(target: str | Path, overwrite: bool) -> Path:
    """Return the path of a file to write, if that is allowed.

    Raises:
        UserError: It is a folder, or exists and ``overwrite`` is False.
    """
    target = Path(target)
    if target.is_dir():
        raise UserError(f"{target}: is a folder; name the file to write")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: already exists; use --overwrite to replace it")
    return target


def read_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint onto the CPU.

    Args:
        source (str | Path): File or URL that MMEngine can load.

    Returns:
        dict: The content.

    Raises:
        UserError: The file is missing, damaged, unsafe, or does not contain a dict.

    Example:
        >>> read_checkpoint("/no/such.pth")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: /no/such.pth: no such file
    """
    if "://" in str(source):
        fetch(str(source))
    try:
        content = CheckpointLoader.load_checkpoint(str(source), "cpu", logger="silent")
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file") from error
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: contains a {type(content).__name__}, not a dict")
    return content


def write_checkpoint(checkpoint: dict, target: Path) -> None:
    """Write a checkpoint atomically; missing folders are created.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        with written_whole(target) as part:
            torch.save(checkpoint, part)
    except RuntimeError as error:  # torch's writer raises it, e.g. for a full disk
        raise UserError(f"{target}: cannot be written: {error}") from error
