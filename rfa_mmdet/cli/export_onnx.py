"""Export a detector's backbone, neck and head to ONNX, and verify them with ONNX Runtime.

The graph maps normalised, padded images of any batch size, height and width to the raw outputs of
the heads. Faster, Mask and Cascade R-CNN get additional files for the heads on pooled regions:
.roi.onnx (.roi_0.onnx, .roi_1.onnx, ... for the stages of a cascade) and .mask.onnx. The files are
written only if MMDetection's post-processing gives the same detections on the compared images.
"""

import sys
from argparse import Namespace
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from rfa_mmdet.cli.command_line import config_parser, progress, user_errors, within
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.read import load_config
from rfa_mmdet.data.check.audit import dataset_images
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.export import Comparison, export_onnx
from rfa_mmdet.inference.detector import Detector
from rfa_mmdet.inference.images import find_images
from rfa_mmdet.texts import printable

console = Console(highlight=False, soft_wrap=True)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = config_parser(
        __doc__,
        "python tools/export_onnx.py configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py "
        "work_dirs/demo/epoch_8.pth --out work_dirs/demo/detector.onnx",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file or URL")
    add("--out", help="file to write; default: work_dirs/<config name>/<checkpoint name>.onnx")
    add(
        "--images",
        nargs="+",
        metavar="INPUT",
        help="images, folders or patterns to compare on; default: the config's test data",
    )
    add("--number", type=within(1), default=8, metavar="N",
        help="number of images to compare on (default: %(default)s)")  # fmt: skip
    add("--opset", type=int, default=17, help="ONNX operator set (default: %(default)s)")
    return parser.parse_args()


def images_to_compare(cfg: Config, args: Namespace) -> list[str]:
    """Return the images from the command line, or else those of the test data."""
    if args.images:
        return find_images(args.images)[: args.number]
    paths = dataset_images(cfg, "test", args.number)
    if not paths:
        raise ConfigError(
            f"config={args.config!r}: cannot read its test data; pass images to compare on with "
            "--images"
        )
    return paths


def print_table(found: Comparison) -> None:
    """Print how far ONNX Runtime deviates from PyTorch."""
    table = Table("compared", "largest difference", title="ONNX Runtime against PyTorch")
    for name, difference in found.raw.items():
        table.add_row(f"outputs on {name}", f"{difference:.2g} of the largest value")
    what = f"{found.detections:,} detections on {found.images} images"
    table.add_row(f"boxes of {what}", f"{found.box:.2g} pixels")
    table.add_row("their scores", f"{found.score:.2g}")
    if found.masks:
        table.add_row("their masks", f"{found.mask:.2g} of the masks' pixels")
    table.add_row("detections not in both", f"{found.unmatched}")
    console.print(table)


def main() -> None:
    """Run the command line."""
    args = parse_args()
    name = f"{Path(args.checkpoint).stem}.onnx"
    out = Path(args.out or Path("work_dirs", Path(args.config).stem, name))
    with user_errors():
        cfg = load_config(args.config, args.cfg_options)
        check_config(cfg)
        paths = images_to_compare(cfg, args)
        detector = Detector(cfg, args.checkpoint, "cpu")
        files, found = export_onnx(
            detector,
            paths,
            out,
            args.opset,
            progress("comparing"),
        )
    print_table(found)
    if not found.detections:
        print(
            "warning: no detections on these images, so only raw outputs were compared; pass other "
            "images with --images",
            file=sys.stderr,
        )
    for path, damage in found.skipped.items():
        print(f"warning: skipped {printable(path)}: {printable(damage)}", file=sys.stderr)
    if found.skipped:
        print(f"skipped {len(found.skipped)} of {len(paths)} images")
    for file, content in files:
        print(f"wrote: {printable(file)} ({content})")
