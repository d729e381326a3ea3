"""Find image files from a command line, and report unreadable ones."""

import glob
import os
from collections.abc import Callable, Sequence
from typing import Any

import mmcv
from mmdet.apis.det_inferencer import IMG_EXTENSIONS

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import file_kind


class ImageError(UserError):
    """An image file cannot be read. The message gives the reason without the path."""


def transformed(transform: Callable, results: dict) -> dict:
    """Apply a transform of a pipeline to an image.

    Args:
        transform (Callable): A transform of mmcv or MMDetection.
        results (dict): Its input; 'img' is the image.

    Raises:
        ImageError: Resizing to the pipeline's scale would make a side of the image 0.
    """
    try:
        return transform(results)
    except Exception as error:  # from the library that resizes
        height, width = results["img"].shape[:2] if "img" in results else (1, 1)
        scale = results.get("scale")
        left: Any = (1, 1)
        if isinstance(scale, tuple):
            left = scale if min(scale) == 0 else mmcv.rescale_size((width, height), scale)
        if min(left) == 0:
            text = f"{width} x {height} pixels; resizing to {scale} would make a side 0"
            raise ImageError(text) from error
        raise


def none_readable(skipped: dict[str, str]) -> UserError:
    """Return the error to raise when no image could be read.

    Args:
        skipped (dict[str, str]): Path of each image -> what is wrong with it.

    Example:
        >>> print(none_readable({"a.jpg": "missing"}))
        none of the 1 images can be read, e.g. a.jpg: missing
    """
    path, damage = next(iter(skipped.items()))
    return UserError(f"none of the {len(skipped)} images can be read, e.g. {path}: {damage}")


def find_images(inputs: Sequence[str], without: str | os.PathLike | None = None) -> list[str]:
    """Return the image files for the inputs of a command line.

    Args:
        inputs (Sequence[str]): Files, folders (searched recursively) and patterns such as
            'data/**/*.png'.
        without (str | os.PathLike | None): Folder that results are written to, whose images are
            left out. Defaults to None.

    Returns:
        list[str]: Every file once, in the order of the inputs; files of a folder are sorted.

    Raises:
        UserError: An input matches no image, or is a file in ``without``.

    Example:
        >>> find_images(["/no/such/*.jpg"])
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: input '/no/such/*.jpg': no file matches
    """
    found: dict[str, str] = {}
    own = os.path.realpath(without) + os.sep if without else None
    for one in inputs:
        if os.path.isfile(one):
            files = [one]
        elif os.path.isdir(one):
            files = _images_below(one)
            if not files:
                raise UserError(f"input {one!r}: contains no images (*{', *'.join(_ENDINGS)})")
        else:
            names = sorted(glob.glob(one, recursive=True))
            files = [n for n in names if os.path.isfile(n) and n.lower().endswith(_ENDINGS)]
            if os.path.exists(one):
                raise UserError(f"input {one!r}: is {file_kind(one)}, not a file")
            if not files:
                pattern = glob.has_magic(one)
                raise UserError(f"input {one!r}: no {'file matches' if pattern else 'such file'}")
        for file in files:
            real = os.path.realpath(file)
            if not (own and real.startswith(own)):
                found.setdefault(real, file)
            elif file == one:
                raise UserError(f"input {one!r}: is in {_name(without)}; choose another --out")
    if not found:
        raise UserError(
            f"input {inputs[0]!r}: all images are in {_name(without)}; choose another --out"
        )
    return list(found.values())


def _name(folder: str | os.PathLike | None) -> str:
    return f"{os.fspath(folder or '')!r}, where results are written"


# Other suffixes of JPEG, and GIF; files with any other suffix are read if named explicitly.
_ENDINGS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")


def _images_below(folder: str) -> list[str]:
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above it, or two links to one folder
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of two links to one folder, always the same one counts
        found += [
            os.path.join(root, name)
            for name in names
            if name.lower().endswith(_ENDINGS) and not name.startswith(".")
        ]
    return sorted(found)
