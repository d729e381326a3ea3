"""Read and write checkpoint files, with the user's mistakes in words."""

from pathlib import Path

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints.pretrained import fetch
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole


def writable(target: str | Path, overwrite: bool) -> Path:
    """Return the path of a file to write, if it may be written.

    Raises:
        UserError: It is a folder, or exists and ``overwrite`` is off.
    """
    target = Path(target)
    if target.is_dir():
        raise UserError(f"{target}: is a folder; name the file to write")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; --overwrite replaces it")
    return target


def read_checkpoint(source: str | Path) -> dict:
    """Read a checkpoint onto the CPU.

    Args:
        source (str | Path): File or URL, of what MMEngine loads.

    Returns:
        dict: Its content.

    Raises:
        UserError: It is missing, damaged, unsafe, or holds no dict.

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
        raise UserError(f"{source}: holds a {type(content).__name__}, not a dict")
    return content


def write_checkpoint(checkpoint: dict, target: Path) -> None:
    """Write a file that appears only when it is complete; its folder is made.

    Raises:
        UserError: It cannot be written.
    """
    try:
        with written_whole(target) as part:
            torch.save(checkpoint, part)
    except RuntimeError as error:  # torch's writer raises it, for a full disk among others
        raise UserError(f"{target}: cannot be written: {error}") from error
