"""Check that image files exist and are complete, by their first and last bytes or by decoding."""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from typing import Any

import mmcv
import numpy as np
from rich.console import Console
from rich.progress import track

from rfa_mmdet.data.check.find import Leaf
from rfa_mmdet.data.check.loaded import Loaded
from rfa_mmdet.data.check.report import Findings, missing_path, some
from rfa_mmdet.files import MISSING, header_size, image_damage

NOT_DECODABLE = "not decodable"
SAMPLE = 300  # images per dataset that a quick check opens
_MIXING = ("Mosaic", "CachedMosaic", "MixUp", "CachedMixUp")
_RESIZING = (
    *("Resize", "FixScaleResize", "FixShapeResize", "ResizeShortestEdge"),
    *("RandomResize", "RandomChoiceResize", *_MIXING),
)
# After these, an image no longer has the size of its file.
_RESHAPING = ("Crop", "Pad", "Expand", "Affine")


def read_image(path: str) -> tuple[np.ndarray | None, str | None]:
    """Read an image as MMDetection does, with its EXIF orientation applied. Never raises.

    Args:
        path (str): The file.

    Returns:
        tuple[np.ndarray | None, str | None]: The image, (H, W, 3) uint8 in BGR, and None; or None
        and what is wrong: the result of :func:`~rfa_mmdet.files.image_damage`, or that it is not
        decodable.

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
    except Exception as error:  # decoders raise anything
        return None, f"{NOT_DECODABLE}: {error}"
    return (None, f"{NOT_DECODABLE} by OpenCV") if image is None else (image, None)


def damaged_images(paths: Sequence[str], threads: int = 16) -> dict[str, str]:
    """Return what is wrong with each damaged file.

    Args:
        paths (Sequence[str]): Image files.
        threads (int): Number of files to read in parallel; the work is I/O-bound. Defaults to 16.
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


def check_images(leaf: Leaf, loaded: Loaded, found: Findings, images: str = "full") -> None:
    """Report image files that are missing or damaged, or that resizing would shrink to nothing.

    Args:
        leaf (Leaf): The dataset.
        loaded (Loaded): Its image files, and their sizes if the annotations give them.
        found (Findings): Collects errors and warnings.
        images (str): 'full' opens every file; 'quick' opens a sample and only checks that the
            others exist. Defaults to 'full'.
    """
    paths, opened = loaded.images, loaded.images
    if paths and not leaf.reads_locally(paths[0]):
        found.warnings.append(
            f"{leaf.key}: images not checked, because they are on remote storage, e.g. {paths[0]}"
        )
        return
    if images == "quick" and len(paths) > SAMPLE:
        step = (len(paths) - 1) / (SAMPLE - 1)
        opened = [*{paths[round(i * step)]: 0 for i in range(SAMPLE)}]
        found.warnings.append(
            f"{leaf.key}: opened {len(opened)} of {len(paths)} images, and only checked that the "
            "others exist; --check-data full opens all of them"
        )
        opened = [*dict.fromkeys([*opened, *_no_files(paths)])]
    damages = damaged_images(opened)
    missing = [path for path, damage in damages.items() if damage == MISSING]
    if missing:
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in missing])
        names = some(os.path.relpath(path, folder) for path in missing)
        windows = sum("\\" in path for path in missing)
        hint = f" {windows} of the names contain '\\', which should be '/'." if windows else ""
        found.errors.append(
            f"{leaf.key}: {len(missing)} of {len(paths)} images are missing from {folder!r} "
            f"(data_prefix={dict(leaf.cfg.get('data_prefix') or {})}): {names}.{hint} "
            f"{missing_path(missing[0])}"
        )
    rest = [f"{path}: {damage}" for path, damage in damages.items() if damage != MISSING]
    if rest:
        found.errors.append(
            f"{leaf.key}: {len(rest)} of {len(paths)} images are damaged: {some(rest)}"
        )
    real = {path: size for path in opened if path not in damages and (size := header_size(path))}
    given = {path: size for path, size in zip(paths, loaded.sizes or (), strict=False) if size}
    _check_sizes(leaf, given, real, found)


def _no_files(paths: Sequence[str]) -> list[str]:
    """Return the paths of missing files, listing each folder once."""
    names: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        names[os.path.dirname(path)].append(path)
    rest = []
    for folder, own in names.items():
        files = set()
        with suppress(OSError), os.scandir(folder or ".") as entries:
            files = {entry.name for entry in entries if entry.is_file()}
        rest += [path for path in own if os.path.basename(path) not in files]
    return rest


def _check_sizes(leaf: Leaf, given: dict, real: dict, found: Findings) -> None:
    """Report images whose size is not the annotated one, or that resizing shrinks to nothing."""
    others = {path: size for path, size in real.items() if given.get(path, size) != size}
    if others:
        texts = (
            "{}: {} x {}, annotated {} x {}".format(path, *size, *given[path])
            for path, size in others.items()
        )
        found.warnings.append(
            f"{leaf.key}: {len(others)} of {len(real)} opened images differ from the width and "
            f"height in their annotations: {some(texts, 3)}"
        )
    sizes = given | real
    gone: dict[tuple[int, int], str] = {}
    for name, transform in resizings(leaf):
        for size in set(sizes.values()) - gone.keys():
            if shorter_side(size[0], size[1], name, transform) == 0:
                gone[size] = name
    lost = {path: size for path, size in sizes.items() if size in gone}
    if lost:
        texts = ("{} ({} x {})".format(path, *size) for path, size in lost.items())
        found.errors.append(
            f"{leaf.key}: {len(lost)} of {len(sizes)} images would have a side of 0 pixels after "
            f"{' and '.join(dict.fromkeys(gone.values()))} in the pipeline, which would crash the "
            f"run: {some(texts)}. Remove them from the annotations"
        )


def resizings(leaf: Leaf) -> Iterator[tuple[str, dict]]:
    """Yield the name and config of the transforms that resize an image first."""
    for name, transform in leaf.transforms():
        if any(word in name for word in _RESHAPING):
            return
        if name in _RESIZING:
            yield name, transform


def shorter_side(width: int, height: int, name: str, transform: dict) -> int:
    """Return the shortest side that an image may have after resizing.

    Args:
        width, height (int): Size of the image.
        name (str): Name of the transform, such as 'Resize'.
        transform (dict): Config of the transform.

    Example:
        >>> shorter_side(3000, 1, "Resize", dict(scale=(1333, 800), keep_ratio=True))
        0
        >>> shorter_side(3000, 1, "Resize", dict(scale=(1333, 800)))
        800
    """
    size = (width, height)
    if name in _MIXING:
        wide, high = transform.get("img_scale", (640, 640))
        return int(min(size) * min(wide / width, high / height))
    if name == "FixShapeResize":
        scales: Any = [(transform["width"], transform["height"])]
    elif name == "ResizeShortestEdge":
        edge, longest = transform["scale"], transform.get("max_size")
        scales = [(longest or math.inf, min(edge) if isinstance(edge, (tuple, list)) else edge)]
    else:
        scales = transform.get("scales", transform.get("scale"))
        several = isinstance(scales, (list, tuple)) and isinstance(scales[0], (list, tuple))
        scales = scales if several or "scales" in transform else [scales]
    if scales == [None]:
        factor = transform.get("scale_factor") or 1
        wide, high = factor if isinstance(factor, (tuple, list)) else (factor, factor)
        return min(int(width * wide + 0.5), int(height * high + 0.5))
    least = min(transform.get("ratio_range") or (1,))
    pairs = [s if isinstance(s, (tuple, list)) else (s, s) for s in scales]
    if name == "RandomResize":  # between the first and the last, or times a ratio
        pairs = [tuple(int(min(side) * least) for side in zip(*pairs, strict=True))]
    if not transform.get("keep_ratio") and name != "ResizeShortestEdge":
        return min(map(min, pairs))
    rescaled = [mmcv.rescale_size(size, tuple(p), return_scale=True) for p in pairs]
    if name == "FixScaleResize":  # does not round
        return min(int(min(size) * factor) for _, factor in rescaled)
    return min(min(new) for new, _ in rescaled)
