"""Check every image and box that a config loads, and report all problems.

Prints a table, and writes a list of all problems and a contact sheet of the worst images. The exit
status is 1 if training or evaluation would fail.
"""

import csv
import sys
from argparse import Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_mmdet.cli.command_line import config_parser, progress, user_errors, within
from rfa_mmdet.config.read import load_config
from rfa_mmdet.data.check import find_problems
from rfa_mmdet.data.check.audit import FATAL, KINDS, Audit, audit
from rfa_mmdet.data.check.contact_sheet import save_contact_sheet
from rfa_mmdet.data.check.images import NOT_DECODABLE
from rfa_mmdet.data.check.report import some
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.files import written_whole
from rfa_mmdet.texts import cell, printable

SPLITS = ("train", "val", "test")
console = Console(highlight=False, soft_wrap=True)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = config_parser(
        __doc__,
        "python tools/check_data.py configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py",
    )
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, help="splits to check; default: all in the config"
    )
    parser.add_argument(
        "--out",
        help="folder for problems.csv and worst.png; default: work_dirs/<config name>/data",
    )
    parser.add_argument(
        "--check-data",
        choices=["full", "quick"],
        default="full",
        help="full: decode every image; quick: read the annotations and look at a sample of the "
        "images, as every run does before it starts (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=within(1), help="images to decode in parallel; default: number of CPUs"
    )
    args = parser.parse_args()
    if args.check_data == "quick":
        for option in ("threads", "out"):
            if getattr(args, option) is not None:
                parser.error(f"--{option}: has no effect with --check-data quick")
    return args


def print_tables(found: Audit) -> None:
    """Print the problems by kind and split, and the boxes by class and split."""
    splits = list(found.images)
    table = Table("", *splits, title="images, boxes and problems")
    table.add_row("images", *(f"{found.images[split]:,}" for split in splits))
    table.add_row("boxes", *(f"{found.boxes[split].total():,}" for split in splits))
    table.add_section()
    for kind in KINDS:
        counts = [found.count(kind, split) for split in splits]
        colour = "red" if kind in FATAL else "yellow"
        cells = (f"[{colour}]{count:,}[/]" if count else "0" for count in counts)
        table.add_row(kind, *cells)
    classes = Table("class", *splits, title="boxes by class")
    for name in dict.fromkeys(name for counts in found.boxes.values() for name in counts):
        boxes = [found.boxes[split].get(name) for split in splits]
        cells = ("-" if n is None else f"{n:,}" if n else "[yellow]0[/]" for n in boxes)
        classes.add_row(Text(printable(name)), *cells)
    for one in (table, classes):
        for column in one.columns[1:]:
            column.justify = "right"
        console.print(one)


def write_list(found: Audit, path: Path) -> None:
    """Write all problems as CSV, worst kinds first."""
    with (
        written_whole(path) as part,
        part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("kind", "split", "image", "what"))
        for problem in sorted(found.problems, key=lambda p: KINDS.index(p.kind)):
            writer.writerow(map(cell, (problem.kind, problem.split, problem.path, problem.text)))


def main() -> int:
    """Check the data, print and write the results; return the exit status."""
    args = parse_args()
    with user_errors():
        cfg = load_config(args.config, args.cfg_options)
        splits = args.splits or [s for s in SPLITS if cfg.get(f"{s}_dataloader")]
        absent = [split for split in splits if not cfg.get(f"{split}_dataloader")]
        if absent or not splits:
            keys = ", ".join(f"{split}_dataloader" for split in absent or SPLITS)
            raise ConfigError(f"config={args.config!r}: has no {keys}")
        problems = find_problems(cfg, splits, args.check_data)
        found = Audit()
        if args.check_data == "full":
            found = audit(cfg, splits, args.threads, progress("decoding images"))
        out = Path(args.out or Path("work_dirs", Path(args.config).stem, "data"))
        if found.images:
            print_tables(found)
        if args.check_data == "full":
            for name in ("problems.csv", "worst.png"):  # an earlier check's, which may be fixed now
                (out / name).unlink(missing_ok=True)
        if found.problems:
            write_list(found, out / "problems.csv")
            print(f"all problems: {printable(out / 'problems.csv')}")
        if save_contact_sheet(found, out / "worst.png"):
            print(f"worst images: {printable(out / 'worst.png')}")
    for key in found.skipped:
        print(f"warning: {key}: images not checked one by one", file=sys.stderr)
    for warning in problems.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    bad = [p for p in found.problems if p.kind == NOT_DECODABLE and p.path in problems.read]
    if bad:
        problems.errors.append(
            f"{len(bad)} images cannot be decoded: {some(problem.path for problem in bad)}"
        )
    for error in problems.errors:
        print(f"error: {error}", file=sys.stderr)
    if problems.errors:
        print("a run on this data would fail")
        return 1
    print("OK; the items listed above will be skipped" if found.problems else "OK: a run can start")
    return 0
