"""Count a config's parameters and GFLOPs, and those of its plain base without our layers.

Alternatively, check the counts against the RFAConv paper (--table), or print what each layer adds
to RetinaNet R50-FPN as a markdown table (--systems). A multiply-add counts as one operation.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter

from mmengine.config import DictAction
from mmengine.hub import get_config
from rich.console import Console
from rich.table import Table

from rfa_mmdet.analysis.complexity import (
    PUBLISHED,
    Complexity,
    classifier_complexity,
    detector_complexity,
    system_extras,
)
from rfa_mmdet.cli.command_line import user_errors, within
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.config.read import load_config
from rfa_mmdet.errors import ConfigError

DETECTOR = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example:\n  python tools/analysis/complexity.py "
        "configs/rfaconv/retinanet_r50-rfaconv_fpn_1x_coco.py",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        help="config of a single-stage detector or of Faster, Mask or Cascade R-CNN",
    )
    add(
        "--table",
        action="store_true",
        help="check the paper's classifiers; exit status 1 if one deviates",
    )
    add(
        "--systems",
        action="store_true",
        help="print what each layer adds; takes a minute or two",
    )
    add(
        "--image-size",
        nargs=2,
        type=within(1),
        metavar=("H", "W"),
        help="input size; the config's data_preprocessor pads it (default: 800 1333)",
    )
    add(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="override config entries, e.g. model.backbone.depth=101",
    )
    args = parser.parse_args()
    if (args.config is not None) + args.table + args.systems != 1:
        parser.error("give exactly one of CONFIG, --table and --systems")
    if args.cfg_options and args.config is None:
        parser.error("--cfg-options: needs CONFIG")
    if args.image_size and args.table:
        parser.error("--image-size: has no effect with --table, whose numbers are for 224 x 224")
    args.image_size = tuple(args.image_size or (800, 1333))
    return args


def print_config(args: Namespace) -> None:
    """Print the cost of a config and of its plain base."""
    cfg = load_config(args.config, args.cfg_options)
    check_config(cfg)
    if cfg.get("model") is None:
        raise ConfigError(f"config={args.config!r}: has no model")
    base = plain_base(cfg)
    found = detector_complexity(cfg, args.image_size)
    plain = base and detector_complexity(base, args.image_size)
    table = Table("")
    table.add_column("parameters", justify="right")
    table.add_column("GFLOPs", justify="right")
    table.add_row("config", f"{found.parameters:,}", f"{found.gflops:.3f}")
    if plain:
        parameters, gflops = found.parameters - plain.parameters, found.gflops - plain.gflops
        table.add_row("plain base", f"{plain.parameters:,}", f"{plain.gflops:.3f}")
        table.add_row("difference", f"{parameters:+,}", f"{gflops:+.3f}")
        table.add_row(
            "",
            f"{parameters / plain.parameters:+.2%}",
            f"{gflops / plain.gflops:+.2%}",
        )
    print(f"{args.config}, {args.image_size[0]} x {args.image_size[1]}")
    Console().print(table)
    if not plain:
        print("The model has no layer of this package, so there is no plain base to compare with.")
    _print_uncounted(found)


def _print_uncounted(found: Complexity) -> None:
    if found.uncounted:
        ops = ", ".join(f"{op} ({times} times)" for op, times in found.uncounted.items())
        print(f"Not counted, because MMEngine has no formula for them: {ops}")


def print_table() -> bool:
    """Print our counts next to the published ones; return whether all agree."""
    table = Table(title="ResNet with the layer in every BasicBlock, ImageNet, 224 x 224")
    table.add_column("depth")
    table.add_column("conv")
    for title in ("parameters", "published", "GFLOPs", "published"):
        table.add_column(title, justify="right")
    table.add_column("")
    deviating = 0
    for (depth, conv), published in PUBLISHED.items():
        found = classifier_complexity(depth, conv)
        agrees = found.agrees(published)
        deviating += not agrees
        table.add_row(
            str(depth),
            conv or "plain",
            f"{found.parameters:,}",
            f"{published.parameters:,}",
            f"{found.gflops:.3f}",
            "-" if published.gflops is None else f"{published.gflops:.3f}",
            "agrees" if agrees else "DEVIATES",
        )
    Console().print(table)
    print(f"{len(PUBLISHED) - deviating} of {len(PUBLISHED)} agree with arXiv 2304.03198")
    return not deviating


def print_systems(image_size: tuple[int, int]) -> None:
    """Print what each layer adds to RetinaNet R50-FPN, as rows of a markdown table."""
    plain = detector_complexity(get_config(DETECTOR), image_size)
    print("| RetinaNet R50-FPN with | parameters | GFLOPs |\n|---|---:|---:|")
    print(f"| nothing | {plain.parameters:,} | {plain.gflops:.2f} |", flush=True)
    for name, extra in system_extras(image_size):
        print(f"| `{name}` | {extra.parameters:+,} | {extra.gflops:+.2f} |", flush=True)


def main() -> None:
    """Run the command line."""
    args = parse_args()
    with user_errors():
        if args.table:
            raise SystemExit(0 if print_table() else 1)
        if args.systems:
            print_systems(args.image_size)
        else:
            print_config(args)
