"""Choose file names for the pictures of images."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

# Suffixes of formats that OpenCV writes in colour and every viewer shows.
_KEPT = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_LONGEST = 240  # bytes of a name; file systems allow 255


def picture_names(paths: Sequence[str], *endings: str) -> dict[str, list[Path]]:
    """Return file names for the pictures of images, relative to the folder of all pictures.

    Args:
        paths (Sequence[str]): Image files.
        *endings (str): Endings of the pictures of one image, e.g. '.png'. Default: one picture with
            the image's own suffix, or .png if that is not suitable.

    Returns:
        dict[str, list[Path]]: Image -> names, relative to the images' common folder. All names are
        different, none is a folder of another, and all are short enough for the file system.

    Example:
        >>> [str(one) for (one,) in picture_names(["/a/x.jpg", "/a/b/x.pgm", "/a/b/x"]).values()]
        ['x.jpg', 'b/x.pgm.png', 'b/x.png']
    """
    whole = {path: os.path.abspath(path) for path in paths}
    common = os.path.commonpath([os.path.dirname(path) for path in whole.values()])
    relative = {path: Path(os.path.relpath(one, common)) for path, one in whole.items()}
    taken = {folder for one in relative.values() for folder in one.parents}
    found: dict[str, list[Path]] = {}
    # Images that keep their name come first, so no other image takes it.
    for path in sorted(relative, key=lambda path: relative[path].suffix.lower() not in _KEPT):
        for names in _candidates(relative[path], endings):
            if not taken & set(names):
                break
        taken.update(names)
        found[path] = names
    return {path: found[path] for path in relative}


def _candidates(image: Path, endings: Sequence[str]) -> Iterator[list[Path]]:
    def named(stem: str, number: str = "") -> list[Path]:
        room = _LONGEST - max(len(ending) for ending in ends) - len(number)
        return [image.with_name(f"{_short(stem, room)}{number}{ending}") for ending in ends]

    kept = image.suffix.lower() in _KEPT
    ends = endings or (image.suffix if kept else ".png",)
    stem = image.stem if endings or kept else image.name
    yield named(stem)
    yield named(image.name)
    for number in range(2, 10**9):
        yield named(stem, f"-{number}")


def _short(name: str, most: int) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= most else raw[:most].decode("utf-8", "ignore")
