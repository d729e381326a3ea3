"""Crop the objects of the drawn shapes, as small images for a classifier."""

import json
import os
from pathlib import Path

import cv2
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
        UserError: ``size`` is not a positive int.

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
    counts = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        for name in CLASSES:
            (root / "crops" / split / name).mkdir(parents=True, exist_ok=True)
        coco = json.loads((root / "annotations" / f"{split}.json").read_text())
        files = {image["id"]: image["file_name"] for image in coco["images"]}
        for one in coco["annotations"]:
            image = cv2.imread(str(root / "JPEGImages" / files[one["image_id"]]))
            name = f"{Path(files[one['image_id']]).stem}_{one['id']}.png"
            path = root / "crops" / split / CLASSES[one["category_id"] - 1] / name
            _, png = cv2.imencode(".png", _crop(image, one["bbox"], size))
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
