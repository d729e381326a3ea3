"""Write files atomically, and check that image files are complete."""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from rfa_mmdet.errors import UserError

MISSING = "missing"
# An image of this many pixels takes 0.8 GB when decoded. OpenCV reads the same variable for its own
# limit, whose default is four times as high.
MAX_PIXELS = int(os.environ.get("OPENCV_IO_MAX_IMAGE_PIXELS") or 2**28)
_MAX_BYTES = 2**31 - 1  # decoders count in int
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
# How complete image files end, and how files start that are images by name only.
_TAIL = 64
_PADDING = b"\0\r\n \t"
_JPEG_END = b"\xff\xd9"
_PNG_END = b"IEND\xaeB`\x82"
_KNOWN = {
    b"version https://git-lfs": "a Git LFS pointer (run git lfs pull)",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"\x1f\x8b": "compressed (run gunzip)",
    b"BZh": "compressed (run bunzip2)",
    b"\xfd7zXZ": "compressed (run unxz)",
    b"\x28\xb5\x2f\xfd": "compressed (run unzstd)",
    b"PK\x03\x04": "a zip archive (run unzip)",
}


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, and move it to ``path`` at the end.

    After an error or an interruption, the temporary file is gone and ``path`` is unchanged.

    Args:
        path (str | os.PathLike): The file to write; its folder is created.

    Yields:
        Path: The temporary path, with the same suffix, by which many libraries choose the format.

    Raises:
        UserError: The file cannot be written there.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a.txt")) as part:
        ...         _ = part.write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    name, suffix = path.stem, path.suffix
    if len(os.fsencode(path.name)) > 200:  # file systems allow 255 bytes
        name = hashlib.sha1(os.fsencode(path.name), usedforsecurity=False).hexdigest()
        suffix = suffix if len(os.fsencode(suffix)) < 100 else ""
    part = path.with_name(f".{name}.{os.getpid()}.part{suffix}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name the file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # moved, never written, or its folder is missing
            part.unlink()


def check_folder(folder: str | os.PathLike, what: str) -> None:
    """Raise an error if a folder is not writable, before anything is computed for it.

    Args:
        folder (str | os.PathLike): The folder; it may be missing, and is not created.
        what (str): Name of the option or key that sets it, for the error.

    Raises:
        UserError: The folder, or its closest existing parent, is not a folder or not writable.

    Example:
        >>> check_folder("/dev/null/runs", "--work-dir")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: --work-dir=/dev/null/runs: /dev/null is not a folder
    """
    place = Path(folder).absolute()
    try:
        while not place.exists() and not place.is_symlink():
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{what}={folder}: {place} is not a folder")
        with TemporaryFile(dir=place):  # permissions miss full disks, and mean nothing to root
            pass
    except OSError as error:
        raise UserError(f"{what}={folder}: cannot be written: {error.strerror}") from error


def file_kind(path: str | os.PathLike) -> str:
    """Return the kind of a path without opening it, since opening a FIFO blocks.

    Raises:
        OSError: The path does not exist, or one of its folders cannot be read.

    Example:
        >>> file_kind("/"), file_kind("/dev/null")
        ('a folder', 'a device')
    """
    return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a device")


def known_as(head: bytes) -> str | None:
    """Return what a file really is that has the name of an image or text file, by its first bytes.

    Example:
        >>> known_as(b"<!DOCTYPE html>")
        'a web page'
    """
    return next((what for start, what in _KNOWN.items() if head.startswith(start)), None)


def header_size(path: str) -> tuple[int, int] | None:
    """Return the width and height of an image from its header, without decoding it.

    For JPEG, the EXIF orientation is applied, as decoders do.

    Args:
        path (str): An existing file.

    Returns:
        tuple[int, int] | None: None for formats other than BMP, GIF, JPEG, JPEG 2000, PNG, PPM and
        TIFF, and for damaged headers.
    """
    from PIL import (  # lazily, because `rfa_mmdet.ops` only needs torch
        BmpImagePlugin,
        GifImagePlugin,
        Jpeg2KImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
    )

    # Image.open refuses or warns about large images before it gives their size.
    for kind in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        PpmImagePlugin.PpmImageFile,
        GifImagePlugin.GifImageFile,
        Jpeg2KImagePlugin.Jpeg2KImageFile,
    ):
        size = None
        with suppress(Exception), kind(path) as image:  # damaged headers raise anything
            size = image.size
            if kind is JpegImagePlugin.JpegImageFile and image.getexif().get(0x0112, 1) > 4:
                size = size[::-1]
        if size:
            return size
    return None


def image_damage(path: str) -> str | None:
    """Return what is wrong with an image file, or None.

    JPEG and PNG files must have their end markers; other formats are not checked for them. No
    image may have more than ``MAX_PIXELS`` pixels.

    Example:
        >>> image_damage("/no/such/file.jpg")
        'missing'
        >>> image_damage("/dev/zero")
        'a device, not a file'
    """
    try:
        kind = file_kind(path)
        if kind != "a file":
            return f"{kind}, not a file"
        with open(path, "rb") as file:
            head = file.read(32)
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(_TAIL, size), os.SEEK_END)
            tail = file.read()
        if not size:
            return "empty (0 bytes)"
        if size > _MAX_BYTES:
            return f"{size:,} bytes, above the limit of {_MAX_BYTES:,}"
        if head.startswith(b"\xff\xd8"):
            # Cameras append data, so the image may end before the file does.
            whole = tail.rstrip(_PADDING).endswith(_JPEG_END)
            if not whole and not _jpeg_ends(path):
                return f"truncated JPEG ({size:,} bytes, no end marker FFD9)"
        elif head.startswith(b"\x89PNG"):
            if _PNG_END not in tail and not _contains(path, _PNG_END):
                return f"truncated PNG ({size:,} bytes, no IEND)"
        elif what := known_as(head):
            return f"{what}, not an image"
        width, height = header_size(path) or (1, 1)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    except OSError as error:
        return f"unreadable ({error.strerror})"
    except ValueError:  # a NUL in the name, or half a character
        return f"{MISSING} (no file can have this name)"
    if width * height > MAX_PIXELS:
        return (
            f"{width} x {height} pixels, above the limit of {MAX_PIXELS:,}; set the environment "
            "variable OPENCV_IO_MAX_IMAGE_PIXELS to raise it"
        )
    return None if width and height else f"{width} x {height} pixels"


def _jpeg_ends(path: str) -> bool:
    """Look for the end marker after the first scan; thumbnails before it have their own."""
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
