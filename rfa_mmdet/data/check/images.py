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

MISSING = "missing"
NOT_DECODABLE = "not decodable"
_TAIL = 64
_PADDING = b"\0\r\n \t"
_JPEG_END = b"\xff\xd9"
_PNG_END = b"IEND\xaeB`\x82"
_NO_IMAGE = {
    b"version https://git-lfs": "a Git LFS pointer (run git lfs pull)",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


def image_damage(path: str) -> str | None:
    """Return what is wrong with an image file, or None.

    JPEG and PNG must end as they should; other formats are taken as they are.

    Example:
        >>> image_damage("/no/such/file.jpg")
        'missing'
    """
    try:
        with open(path, "rb") as file:
            head = file.read(32)
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(_TAIL, size), os.SEEK_END)
            tail = file.read()
            if not size:
                return "empty (0 bytes)"
            if head.startswith(b"\xff\xd8"):
                # Cameras append things to a picture, so it may end before the file does.
                whole = tail.rstrip(_PADDING).endswith(_JPEG_END)
                if not whole and not _jpeg_ends(path):
                    return f"truncated JPEG ({size:,} bytes, no end marker FFD9)"
            elif head.startswith(b"\x89PNG"):
                if _PNG_END not in tail and not _contains(path, _PNG_END):
                    return f"truncated PNG ({size:,} bytes, no IEND)"
            else:
                what = next((w for start, w in _NO_IMAGE.items() if head.startswith(start)), None)
                return what and f"no image but {what}"
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return None


def read_image(path: str) -> tuple[np.ndarray | None, str | None]:
    """Read an image as MMDetection does, turned by its EXIF orientation; never raises for a file.

    Args:
        path (str): The file.

    Returns:
        tuple[np.ndarray | None, str | None]: (H, W, 3) uint8 in BGR, or what is wrong: what
        :func:`image_damage` says, or that it is not decodable.

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


def _jpeg_ends(path: str) -> bool:
    """Look for the end marker behind the first scan; thumbnails before it have their own."""
    with open(path, "rb") as file:
        data = file.read()
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return _JPEG_END in data[at:]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _contains(path: str, mark: bytes) -> bool:
    with open(path, "rb") as file:
        return mark in file.read()


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
