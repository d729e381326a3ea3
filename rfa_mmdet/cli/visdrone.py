"""Convert VisDrone2019-DET annotations to COCO JSON, for configs/_base_/datasets/visdrone.py.

Ignored regions, other objects (category 11) and objects with score 0 become iscrowd annotations:
training ignores them, and detections there do not count as false positives. --ignored drop removes
them.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rfa_mmdet.cli.command_line import progress, user_errors
from rfa_mmdet.data.converters.visdrone import CLASSES, IGNORED, SPLITS, Summary, convert
from rfa_mmdet.errors import UserError

console = Console(highlight=False, soft_wrap=True)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example:\n  python tools/dataset_converters/visdrone.py data/VisDrone",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("root", help="folder with the unpacked VisDrone2019-DET-train, -val and -test-dev")
    add("--splits", nargs="+", choices=SPLITS, help="splits to convert; default: all in ROOT")
    add("--ignored", choices=IGNORED, default="crowd", help="see above (default: %(default)s)")
    return parser.parse_args()


def print_table(summaries: dict[str, Summary]) -> None:
    """Print what was converted, by split."""
    table = Table("", *summaries, title="VisDrone2019-DET")
    for column in table.columns[1:]:
        column.justify = "right"
    every = summaries.values()
    table.add_row("images", *(f"{one.images:,}" for one in every))
    for name in CLASSES:
        table.add_row(name, *(f"{one.boxes[name]:,}" for one in every))
    table.add_section()
    table.add_row("boxes of all classes", *(f"{sum(one.boxes.values()):,}" for one in every))
    table.add_row("ignored annotations", *(f"{one.ignored:,}" for one in every))
    table.add_row("boxes clipped to the image", *(f"{one.clipped:,}" for one in every))
    table.add_row("empty boxes dropped", *(f"{one.dropped:,}" for one in every))
    table.add_row("images skipped", *(f"{len(one.skipped):,}" for one in every))
    console.print(table)


def main() -> None:
    """Run the command line."""
    args = parse_args()
    summaries = {}
    with user_errors(UserError):
        there = [s for s in SPLITS if Path(args.root, f"VisDrone2019-DET-{s}").is_dir()]
        if not there and not args.splits:
            raise UserError(
                f"{args.root}: no folder VisDrone2019-DET-train, -val or -test-dev found"
            )
        for split in args.splits or there:
            summaries[split] = convert(
                args.root,
                split,
                args.ignored,
                progress(f"reading {split}"),
            )
    print_table(summaries)
    for summary in summaries.values():
        for path, damage in summary.skipped.items():
            print(f"warning: skipped {path}: {damage}", file=sys.stderr)
        console.print(f"wrote: {summary.path}")
