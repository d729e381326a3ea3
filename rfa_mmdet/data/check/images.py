"""Are the image files there, and whole? By their first and last bytes, or by decoding them."""

import os
import sys
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool

import mmcv
import numpy as np
from rich.console import Console
from rich.progress import track

from rfa_mmdet.data.check.find import Leaf
from rfa_mmdet.data.check.report import Findings, missing_path, some
from rfa_mmdet.files import MISSING, image_damage

NOT_DECODABLE = "not decodable"


def read_image(path: str) -> tuple[np.ndarray | None, str | None]:
    """Read an image as MMDetection does, turned by its EXIF orientation; never raises for a file.

    Args:
        path (str): The file.

    Returns:
        tuple[np.ndarray | None, str | None]: (H, W, 3) uint8 in BGR, or what is wrong: what
        :func:`~rfa_mmdet.files.image_damage` says, or that it is not decodable.

    Example:
        >>> read_image("/no/such/file.jpg")
        (None, 'missing')
    """
    damage = image_damage(path)
    if damage:
        return None, damage
    try:
        with open(path, "rb") as file:
            image = mmcv.imfrombytes(file.read())
    except Exception as error:  # decoders raise what they like
        return None, f"{NOT_DECODABLE}: {error}"
    return (None, f"{NOT_DECODABLE} by OpenCV") if image is None else (image, None)


def damaged_images(paths: Sequence[str], threads: int = 16) -> dict[str, str]:
    """Return what is wrong with each damaged file.

    Args:
        paths (Sequence[str]): Image files.
        threads (int): How many are looked at at a time; it is waiting, not computing.
    """
    few = len(paths) < 5000
    with ThreadPool(threads) as pool:
        damages = track(
            pool.imap(image_damage, paths, chunksize=64),
            "Checking images",
            total=len(paths),
            console=Console(stderr=True),
            transient=True,
            disable=few or not sys.stderr.isatty(),
        )
        return {path: damage for path, damage in zip(paths, damages, strict=True) if damage}


def check_images(leaf: Leaf, paths: Sequence[str], found: Findings) -> None:
    """Report the files that are missing or damaged.

    Args:
        leaf (Leaf): The dataset.
        paths (Sequence[str]): Its image files.
        found (Findings): Takes the errors.
    """
    damages = damaged_images(paths)
    missing = [path for path, damage in damages.items() if damage == MISSING]
    if missing:
        folder = os.path.commonpath([os.path.dirname(path) for path in missing])
        names = some(os.path.relpath(path, folder) for path in missing)
        found.errors.append(
            f"{leaf.key}: {len(missing)} of {len(paths)} images are missing from {folder!r} "
            f"(data_prefix={dict(leaf.cfg.get('data_prefix') or {})}): {names}. "
            f"{missing_path(missing[0])}"
        )
    rest = [f"{path}: {damage}" for path, damage in damages.items() if damage != MISSING]
    if rest:
        found.errors.append(
            f"{leaf.key}: {len(rest)} of {len(paths)} images are damaged: {some(rest)}"
        )
