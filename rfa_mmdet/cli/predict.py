"""Detect on images: annotated pictures, and all detections as COCO-format JSON.

An image that fails costs no other its results; the last line counts those left out.
"""

from argparse import Namespace
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_mmdet.cli.command_line import config_parser, print_left_out, progress, user_errors
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.read import load_config
from rfa_mmdet.inference.detector import Detector
from rfa_mmdet.inference.images import find_images
from rfa_mmdet.inference.predict import Predictions, predict
from rfa_mmdet.texts import printable

console = Console(highlight=False, soft_wrap=True)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = config_parser(
        __doc__,
        "python tools/predict.py configs/demo/retinanet_r18-rfaconv_fpn_6e_shapes.py "
        "work_dirs/demo/epoch_6.pth 'data/shapes/JPEGImages/val_*.jpg' --out work_dirs/found",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file or URL")
    add("inputs", nargs="+", metavar="INPUT", help="image, folder, or pattern in quotes")
    add("--out", help="folder to write; default: work_dirs/<config name>/predictions")
    add("--score", type=float, default=0.3, help="draw detections from here on (%(default)s)")
    add("--batch-size", type=int, default=1, metavar="N", help="images at a time (%(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: must be at least 1")
    if not 0 <= args.score <= 1:
        parser.error(f"--score {args.score}: must be from 0 to 1")
    return args


def print_table(found: Predictions, score: float) -> None:
    """Print how much was found of each class."""
    table = Table("class", title=f"detections on {len(found.coco['images']):,} images")
    table.add_column("all", justify="right")
    table.add_column(f"score >= {score:g}", justify="right")
    total = Counter(a["category_id"] for a in found.coco["annotations"])
    sure = Counter(a["category_id"] for a in found.coco["annotations"] if a["score"] >= score)
    for category in found.coco["categories"]:
        number = category["id"]
        name = Text(printable(category["name"]))
        if total[number]:
            table.add_row(name, f"{total[number]:,}", f"{sure[number]:,}")
    table.add_section()
    table.add_row("all", f"{total.total():,}", f"{sure.total():,}")
    console.print(table)


def main() -> None:
    """Detect, write, and say what was found."""
    args = parse_args()
    out = Path(args.out or Path("work_dirs", Path(args.config).stem, "predictions"))
    with user_errors():
        cfg = load_config(args.config, args.cfg_options)
        check_config(cfg)
        paths = find_images(args.inputs, without=out)
        detector = Detector(cfg, args.checkpoint, args.device)
        found = predict(
            detector,
            paths,
            out,
            args.score,
            args.batch_size,
            progress("detecting"),
        )
    print_table(found, args.score)
    print(f"pictures:   {printable(out / 'pictures')}")
    print(f"detections: {printable(out / 'predictions.json')}")
    if found.not_finite:
        print(f"left out {found.not_finite:,} detections whose box or score is no number")
    print_left_out(len(paths), found.skipped, found.undrawn)
