"""Crop the objects of the drawn shapes, as small images for a classifier."""

import json
import os
from collections import defaultdict
from pathlib import Path

import cv2
import mmcv
import numpy as np

from rfa_mmdet.data.shapes import CLASSES, SPLITS
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

CONTEXT = 1.25  # side of a crop, in sides of its object


def write_crops(root: str | os.PathLike, size: int = 32) -> dict[str, int]:
    """Write each object as a square image into ``crops/<split>/<class>``.

    Args:
        root (str | os.PathLike): Folder of :func:`~rfa_mmdet.data.shapes.make_shapes`.
        size (int): Width and height of a crop in pixels. Defaults to 32.

    Returns:
        dict[str, int]: Number of crops in each split.

    Raises:
        UserError: ``size`` is not a positive int, or ``make_shapes`` has not written the folder.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from rfa_mmdet.data.shapes import make_shapes
        >>> with TemporaryDirectory() as folder:
        ...     _ = make_shapes(folder, num_train=2, num_val=1, max_objects=1)
        ...     write_crops(folder)
        {'train': 2, 'val': 1}
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"size={size!r}: must be a positive int")
    root = Path(root)
    if not (root / "shapes.json").is_file():
        raise UserError(f"root={str(root)!r}: has no shapes.json; must be a folder of make_shapes")
    counts = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for name in CLASSES:
            (root / "crops" / split / name).mkdir(parents=True, exist_ok=True)
        coco = json.loads((root / "annotations" / f"{split}.json").read_text())
        annotations = defaultdict(list)
        for annotation in coco["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        for info in coco["images"]:
            image = mmcv.imread(root / "JPEGImages" / info["file_name"])
            for annotation in annotations[info["id"]]:
                folder = root / "crops" / split / CLASSES[annotation["category_id"] - 1]
                _, png = cv2.imencode(".png", _crop(image, annotation["bbox"], size))
                path = folder / f"{Path(info['file_name']).stem}_{annotation['id']}.png"
                with written_whole(path) as part:
                    part.write_bytes(png.tobytes())
                counts[split] += 1
    return counts


def _crop(image: np.ndarray, bbox: list[float], size: int) -> np.ndarray:
    x, y, width, height = bbox
    side = round(CONTEXT * max(width, height))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    border = cv2.copyMakeBorder(image, side, side, side, side, cv2.BORDER_REPLICATE)
    crop = border[side + top : 2 * side + top, side + left : 2 * side + left]
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(crop, (size, size), interpolation=how)
