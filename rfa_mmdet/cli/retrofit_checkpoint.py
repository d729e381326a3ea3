"""Convert a plain detector's checkpoint into a warm-started one of the retrofitted detector.

Runs both detectors on an image and writes the file only if they agree, apart from plug-ins that do
not start as the identity. To start a training, this tool is not needed: ``load_from`` with the
plain checkpoint does the same.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import mmcv
import torch
from rich.console import Console
from rich.table import Table

from rfa_mmdet.checkpoints.retrofit import retrofit_checkpoint
from rfa_mmdet.cli.command_line import user_errors, within
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.config.read import load_config
from rfa_mmdet.errors import ConfigError, UserError

LONGEST_SIDE = 640


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example, with the checkpoint of a plain detector:\n"
        "  python tools/retrofit_checkpoint.py "
        "configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py work_dirs/demo_plain/epoch_8.pth "
        "work_dirs/warm.pth",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config of the retrofitted detector")
    parser.add_argument("source", metavar="PLAIN", help="checkpoint of the plain detector")
    parser.add_argument("target", metavar="OUT", help="file to write; missing folders are created")
    parser.add_argument("--image", help="image to compare on (default: noise)")
    parser.add_argument(
        "--tolerance",
        type=within(0.0),
        default=1e-3,
        help="largest accepted relative difference of the raw outputs; not checked with "
        "convolutions of other packages (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="overwrite OUT if it exists")
    return parser.parse_args()


def read_image(path: str) -> torch.Tensor:
    """Read an image as (3, H, W), scaled down to what the comparison needs."""
    try:
        image = mmcv.imread(path) if Path(path).is_file() else None
    except OSError as error:
        raise UserError(f"--image {path}: {error}") from error
    if image is None:
        raise UserError(f"--image {path}: cannot be read as an image")
    image = mmcv.imrescale(image, (LONGEST_SIDE, LONGEST_SIDE))
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def main() -> None:
    """Run the command line."""
    args = parse_args()
    with user_errors():
        cfg = load_config(args.config)
        check_config(cfg)
        plain = plain_base(cfg)
        if plain is None:
            raise ConfigError(f"config={args.config!r}: has no layer of this package to warm-start")
        image = None if args.image is None else read_image(args.image)
        found = retrofit_checkpoint(
            plain, cfg, args.source, args.target, image, args.tolerance, args.overwrite
        )
    table = Table("raw outputs of", "largest relative difference from the plain detector")
    for part, difference in found.outputs.items():
        table.add_row(part, f"{difference:.1e}")
    Console().print(table)
    if found.changing:
        print(
            f"warning: {len(found.changing)} new layers (e.g. {min(found.changing)}) may change "
            "the outputs until they are trained: plug-ins that do not start as the identity, or "
            "convolutions of other packages",
            file=sys.stderr,
        )
    print(f"wrote: {args.target}")
