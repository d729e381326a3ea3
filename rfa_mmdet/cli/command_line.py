"""Shared by the tools: arguments, the checks before a run, error handling."""

import math
import multiprocessing
import os
import sys
import traceback
import warnings
from argparse import (
    SUPPRESS,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from mmengine.config import Config, DictAction
from rich.console import Console
from rich.progress import track

from rfa_mmdet.checkpoints.pretrained import fetch_all
from rfa_mmdet.cli.distributed import launched_rank, prepare_group
from rfa_mmdet.config.check import check_config, check_run
from rfa_mmdet.config.read import load_config
from rfa_mmdet.data.check import check_data
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import check_folder
from rfa_mmdet.layers.warm_start.start import WarmStartError
from rfa_mmdet.texts import printable


def config_parser(description: str, example: str) -> ArgumentParser:
    """Return a parser with the arguments of every tool that reads a config.

    Args:
        description (str): What the tool does.
        example (str): A working command.

    Returns:
        ArgumentParser: The parser, to which the tool adds its own arguments.
    """
    parser = ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help='override config entries, e.g. train_dataloader.batch_size=4 or a="[1,2]"',
    )
    return parser


def run_parser(description: str, example: str) -> ArgumentParser:
    """Return a :func:`config_parser` with the additional arguments of training and testing.

    Args:
        description (str): What the tool does.
        example (str): A working command.

    Returns:
        ArgumentParser: The parser, to which the tool adds its own arguments.
    """
    parser = config_parser(description, example)
    parser.add_argument(
        "--work-dir",
        help="output folder; default: the config's work_dir, or else work_dirs/<config name>",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="launcher that started the processes of this run (default: %(default)s)",
    )
    # torch.distributed.launch, which mim uses, passes it; the environment has the same number.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=SUPPRESS)
    parser.add_argument(
        "--check-data",
        choices=["full", "quick", "off"],
        default="quick",
        help="check the data before the run; full: annotations and every image; quick: annotations "
        "and a sample of the images; off: nothing (default: %(default)s)",
    )
    return parser


def within(low: float, high: float | None = None) -> Callable[[str], float]:
    """Return the argparse type of an option that takes a number from a range.

    Args:
        low (int | float): Smallest number; the option takes integers if this is one.
        high (int | float | None): Largest number. Defaults to None: no limit.

    Returns:
        Callable[[str], int | float]: Value of ``type`` in ``add_argument``.

    Example:
        >>> within(1)("8"), within(0.0, 1.0)("0.3")
        (8, 0.3)
    """
    kind = type(low)
    name = "an integer" if kind is int else "a number"
    valid = f"of at least {low}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= (math.inf if high is None else high):
            raise ArgumentTypeError(f"must be {name} {valid}, got {text!r}")
        return value

    return parse


def load_run(args: Namespace, *splits: str) -> Config:
    """Read the config of a run, and check that it is complete.

    Args:
        args (Namespace): Parsed by :func:`run_parser`.
        *splits (str): The splits that the run reads: 'train', 'val' or 'test'.

    Returns:
        Config: The config, with the common arguments of a run applied.

    Raises:
        UserError: The config cannot be read, or is incomplete.
    """
    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    check_config(cfg)
    warnings = check_run(cfg, splits)
    check_folder(cfg.work_dir, "work_dir")
    if launched_rank(cfg.launcher) == 0:
        _print_warnings(warnings)
    return cfg


def prepare_run(cfg: Config, *splits: str, images: str = "quick") -> None:
    """Check config, weights and data before a run, then create its process group.

    Args:
        cfg (Config): From :func:`load_run`.
        *splits (str): The splits that the run reads: 'train', 'val' or 'test'.
        images (str): Value of --check-data: 'full' or 'quick', see
            :func:`~rfa_mmdet.data.check.check_data`, or 'off'.

    Raises:
        UserError: The config or the data is invalid, or pretrained weights are unavailable.
    """
    check_config(cfg)
    if launched_rank(cfg.launcher) == 0:  # one rank checks for all
        fetch_all(cfg, "train" in splits)
        if images != "off":
            _print_warnings(check_data(cfg, splits, images))
    prepare_group(cfg)


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def progress(what: str) -> Callable[..., Iterable]:
    """Return a function that wraps an iterable in a progress bar on stderr.

    Args:
        what (str): Label of the progress bar.

    Example:
        >>> list(progress("counting")([1, 2], total=2))
        [1, 2]
    """
    console = Console(stderr=True)
    return lambda items, total=None: track(items, what, total=total, console=console)


def print_left_out(
    number: int, skipped: Mapping[str, str], undrawn: Mapping[str, str] | None = None
) -> None:
    """Print the reason for each skipped image on stderr, then a line with their number.

    Args:
        number (int): Number of all images.
        skipped (Mapping[str, str]): Path of each image without results -> reason.
        undrawn (Mapping[str, str] | None): Path of each other image without a picture -> reason.
            Defaults to None.

    Example:
        >>> print_left_out(3, {"a.jpg": "missing"})
        skipped 1 of 3 images
    """
    for what, images in (("skipped", skipped), ("no picture written for", undrawn or {})):
        for path, reason in images.items():
            print(f"warning: {what} {printable(path)}: {printable(reason)}", file=sys.stderr)
    said = [f"skipped {len(skipped)} of {number} images"] if skipped else []
    said += [f"no picture written for {len(undrawn)} of {number} images"] if undrawn else []
    if said:
        print("; ".join(said))


_OF_A_WRONG_CONFIG = (
    *(AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, TypeError),
    *(ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
)


@contextmanager
def user_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn user errors into one ``error: ...`` line and exit status 1.

    Ctrl-C prints ``interrupted`` and exits with status 130, as shells do.

    Set RFA_MMDET_TRACEBACK=1 in the environment to see the traceback as well.

    Args:
        *errors (type[Exception]): Exceptions to treat as user errors. Default: those that building
            a run from a wrong config raises; the message then names the line that raised it.
    """
    errors = errors or _OF_A_WRONG_CONFIG
    # MMEngine imports it; the user cannot fix that.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated as an API", UserWarning)
    shown, sys.excepthook = sys.excepthook, _hide_lost_readers(sys.excepthook)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if _is_interruption(error):
            # Objects that Ctrl-C left half initialized fail in their __del__.
            sys.unraisablehook = lambda _: None
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        if not isinstance(error, errors):
            raise
        if os.environ.get("RFA_MMDET_TRACEBACK") == "1":
            traceback.print_exc()
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        message = message if str(message).strip() else type(error).__name__
        rank = os.environ.get("RANK")
        who = f"[rank {rank}] " if rank not in (None, "0") else ""
        print(f"{who}error: {message}", file=sys.stderr)
        if not isinstance(error, (UserError, WarmStartError)):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            print(f"{who}  raised in {frame.filename}:{frame.lineno}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        sys.excepthook = shown


def _hide_lost_readers(hook: Callable) -> Callable:
    """Wrap an excepthook so that it ignores a data loader worker's lost connection.

    Workers inherit the hook. If Ctrl-C ends the main process in the middle of a transfer, the
    worker's feeder thread fails and would print its traceback after our last message.
    """

    def show(kind, error, trace) -> None:
        in_worker = multiprocessing.parent_process() is not None
        if not (in_worker and isinstance(error, (ConnectionError, EOFError))):
            hook(kind, error, trace)

    return show


def _is_interruption(error: BaseException | None) -> bool:
    """Return whether this is Ctrl-C, even if a library re-raised it as another error."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
