"""Rename the layers of a published checkpoint to this package's names.

Models of this package load published names directly. Use this tool for other consumers of the
file, or to see which layers a file contains.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_mmdet.checkpoints.convert import Conversion, convert_checkpoint
from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.errors import UserError
from rfa_mmdet.texts import shown


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="for a file published.pth with published names, for example:\n"
        "  python tools/convert_checkpoint.py published.pth converted.pth --overwrite",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="IN", help="checkpoint with published names, a file or URL"
    )
    parser.add_argument("target", metavar="OUT", help="file to write; missing folders are created")
    parser.add_argument("--overwrite", action="store_true", help="overwrite OUT if it exists")
    return parser.parse_args()


def print_table(conversion: Conversion) -> None:
    """Print which layers were renamed."""
    table = Table("layer", "system")
    table.columns[0].overflow = "fold"
    table.add_column("keys renamed", justify="right")
    for layer in conversion.layers:
        prefix = layer.prefix.removesuffix(".") or "(the whole file)"
        table.add_row(Text(shown(prefix, 500)), layer.system, str(layer.renamed))
    Console().print(table)


def main() -> None:
    """Run the command line."""
    args = parse_args()
    with user_errors(UserError):
        conversion = convert_checkpoint(args.source, args.target, args.overwrite)
    print_table(conversion)
    for warning in conversion.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    renamed = sum(layer.renamed for layer in conversion.layers)
    print(f"renamed {renamed} keys, kept {conversion.kept}")
    print(f"wrote: {args.target}")
