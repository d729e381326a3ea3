"""Run a detector on images; write annotated pictures and all detections as COCO-format JSON.

Images that fail are skipped and do not affect the others; the last line counts them.
"""

from argparse import Namespace
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_mmdet.cli.command_line import config_parser, print_left_out, progress, user_errors, within
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.read import load_config
from rfa_mmdet.files import check_folder
from rfa_mmdet.inference.detector import Detector
from rfa_mmdet.inference.images import find_images
from rfa_mmdet.inference.predict import Predictions, predict
from rfa_mmdet.texts import printable

console = Console(highlight=False, soft_wrap=True)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = config_parser(
        __doc__,
        "python tools/predict.py configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py "
        "work_dirs/demo/epoch_8.pth 'data/shapes/JPEGImages/val_*.jpg' --out work_dirs/found",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file or URL")
    add("inputs", nargs="+", metavar="INPUT", help="image, folder or quoted glob pattern")
    add("--out", help="output folder; default: work_dirs/<config name>/predictions")
    add(
        "--score",
        type=within(0.0, 1.0),
        default=0.3,
        help="lowest score to draw (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=within(1),
        default=1,
        metavar="N",
        help="batch size (default: %(default)s)",
    )
    add("--device", help="device, e.g. cpu or cuda:1; default: the GPU if there is one")
    return parser.parse_args()


def print_table(found: Predictions, score: float) -> None:
    """Print the number of detections of each class."""
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
    """Run the command line."""
    args = parse_args()
    out = Path(args.out or Path("work_dirs", Path(args.config).stem, "predictions"))
    with user_errors():
        cfg = load_config(args.config, args.cfg_options)
        check_config(cfg)
        check_folder(out, "--out")
        paths = find_images(args.inputs, without=Path(out, "pictures"))
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
        print(f"dropped {found.not_finite:,} detections with a NaN or infinite box or score")
    print_left_out(len(paths), found.skipped, found.undrawn)
