"""Read and write whole checkpoint files, with the user's mistakes in words."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.errors import UserError


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


def read_checkpoint(source: str | Path) -> object:
    """Return what a file or URL, of what MMEngine loads, holds.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return CheckpointLoader.load_checkpoint(str(source), "cpu", logger="silent")
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file") from error
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error


def write_checkpoint(checkpoint: dict, target: Path) -> None:
    """Write a file that appears only when it is complete; its folder is made.

    Raises:
        UserError: It cannot be written.
    """
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
