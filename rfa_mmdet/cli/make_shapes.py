"""Draw a small dataset of shapes, in COCO and VOC format, and optionally as crops."""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import cv2
import mmcv
import numpy as np

from rfa_mmdet.cli.command_line import user_errors, within
from rfa_mmdet.data.crops import write_crops
from rfa_mmdet.data.shapes import (
    CLASSES,
    NUMBERS,
    OBJECTS,
    SEEDS,
    SIDES,
    SIZE_LIMITS,
    ShapesSummary,
    make_shapes,
)
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

COLOURS = ((0, 200, 255), (255, 160, 0), (80, 255, 80), (255, 80, 255))  # BGR, by class
CELL = 320  # of the contact sheet, in pixels


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example:\n"
        "  python tools/make_shapes.py data/shapes --train 960 --val 120 --size 160 --seed 0",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", help="output folder; created if missing")
    add = parser.add_argument
    add(
        "--train",
        type=within(*NUMBERS),
        default=960,
        metavar="N",
        help="number of training images (default: %(default)s)",
    )
    add(
        "--val",
        type=within(*NUMBERS),
        default=120,
        metavar="N",
        help="number of validation images (default: %(default)s)",
    )
    add(
        "--size",
        type=within(*SIDES),
        default=160,
        help="image width and height in pixels (default: %(default)s)",
    )
    add(
        "--seed",
        type=within(*SEEDS),
        default=0,
        help="random seed; the same seed gives the same images (default: %(default)s)",
    )
    add(
        "--max-objects",
        type=within(*OBJECTS),
        default=8,
        metavar="N",
        help="largest number of objects in one image (default: %(default)s)",
    )
    add(
        "--crops",
        type=within(1),
        metavar="SIZE",
        help="also write each object as an image of this width and height into "
        "crops/<split>/<class>, for a classifier",
    )
    return parser.parse_args()


def print_table(summary: ShapesSummary) -> None:
    """Print the number of boxes of each class and size."""
    print(f"{'split':<7}{'images':>7}  {'class':<10}{'boxes':>6}", end="")
    print("".join(f"{size:>8}" for size in SIZE_LIMITS))
    for split, classes in summary.boxes.items():
        total = {size: sum(row[size] for row in classes.values()) for size in SIZE_LIMITS}
        for name, row in [*classes.items(), ("all", total)]:
            lead = f"{split:<7}{summary.images[split]:>7}" if name == "all" else " " * 14
            print(f"{lead}  {name:<10}{sum(row.values()):>6}", end="")
            print("".join(f"{row[size]:>8}" for size in SIZE_LIMITS))


def write_contact_sheet(root: Path, rows: int = 4, columns: int = 4) -> Path:
    """Write the first training images, with their boxes, into one picture."""
    coco = json.loads((root / "annotations" / "train.json").read_text())
    sheet = np.full((rows * CELL, columns * CELL, 3), 255, np.uint8)
    for cell, info in enumerate(coco["images"][: rows * columns]):
        picture = mmcv.imread(root / "JPEGImages" / info["file_name"])
        scale = CELL / max(picture.shape[:2])
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        for annotation in coco["annotations"]:
            if annotation["image_id"] == info["id"]:
                draw_box(picture, annotation, scale)
        y, x = cell // columns * CELL, cell % columns * CELL
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    sheet[::CELL] = sheet[:, ::CELL] = 255  # lines between the images
    path = root / "contact_sheet.png"
    with written_whole(path) as part:
        cv2.imwrite(str(part), sheet)
    return path


def draw_box(picture: np.ndarray, annotation: dict, scale: float) -> None:
    """Draw an annotation's box and the name of its class."""
    x, y, width, height = (round(value * scale) for value in annotation["bbox"])
    label = annotation["category_id"] - 1
    cv2.rectangle(picture, (x - 1, y - 1), (x + width, y + height), COLOURS[label], 1)
    name, font = CLASSES[label], (cv2.FONT_HERSHEY_SIMPLEX, 0.4)
    (text, _), _ = cv2.getTextSize(name, *font, 1)
    left, top = min(x - 1, CELL - text - 4), max(y - 14, 0)
    cv2.rectangle(picture, (left, top), (left + text + 3, top + 13), COLOURS[label], -1)
    cv2.putText(picture, name, (left + 2, top + 10), *font, (0, 0, 0), 1, cv2.LINE_AA)


def main() -> None:
    """Run the command line."""
    args = parse_args()
    with user_errors(UserError):
        summary = make_shapes(
            args.root,
            num_train=args.train,
            num_val=args.val,
            image_size=(args.size, args.size),
            seed=args.seed,
            max_objects=args.max_objects,
        )
        print_table(summary)
        print(f"{'wrote' if summary.drawn else 'already there:'} {summary.root}")
        print(f"contact sheet: {write_contact_sheet(summary.root)}")
        if args.crops is not None:
            counts = write_crops(summary.root, args.crops)
            print(f"crops: {', '.join(f'{n} in {split}' for split, n in counts.items())}")
