"""What tools/train.py and tools/test.py have in common: arguments, config, errors."""

import inspect
import multiprocessing
import os
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from rfa_mmdet.cli.distributed import launched_rank, prepare_cpu_group
from rfa_mmdet.compat.whole_files import install as install_whole_files
from rfa_mmdet.config.check import check_config
from rfa_mmdet.data.check import check_data
from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.layers.warm_start.start import WarmStartError

# Keys of a config that a run reads besides the arguments of Runner itself.
_READ_KEYS = {
    *("auto_scale_lr", "custom_imports", "find_unused_parameters", "model_wrapper_cfg", "sync_bn"),
    *("tta_model", "tta_pipeline", "activation_checkpointing", "compile", "runner_type"),
}


def config_parser(description: str, example: str) -> ArgumentParser:
    """Return a parser with the arguments of every tool that reads a config.

    Args:
        description (str): What the tool does.
        example (str): A command that works.

    Returns:
        ArgumentParser: To be extended by the tool's own arguments.
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
        help='override entries of the config, such as train_cfg.max_epochs=24 or a="[1,2]"',
    )
    return parser


def run_parser(description: str, example: str) -> ArgumentParser:
    """Return a parser with the arguments of every run, which are more than those of every tool.

    Args:
        description (str): What the tool does.
        example (str): A command that works.

    Returns:
        ArgumentParser: To be extended by the tool's own arguments.
    """
    parser = config_parser(description, example)
    parser.add_argument("--work-dir", help="where to write; default: work_dirs/<config name>")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started several processes of this tool (default: %(default)s)",
    )
    return parser


def load_config(args: Namespace) -> Config:
    """Read the config file and lay the command line over it.

    Args:
        args (Namespace): Of a :func:`config_parser` or :func:`run_parser`.

    Returns:
        Config: With ``launcher`` and ``work_dir`` set.

    Raises:
        ConfigError: The file is missing or does not parse, or ``--cfg-options`` names what no run
            reads.
    """
    path = Path(args.config)
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"config={args.config!r}: no such file{hint}")
    try:
        cfg = Config.fromfile(path)
    except (ImportError, SyntaxError, ConfigParsingError) as error:
        raise ConfigError(f"config={args.config!r}: {error}") from error
    _check_options(cfg, args.cfg_options)
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = getattr(args, "launcher", "none")
    if getattr(args, "work_dir", None) is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", path.stem))
    # What is built before the Runner, such as the data sets that are checked, is looked up there.
    init_default_scope(cfg.get("default_scope") or "mmengine")
    return cfg


def prepare_run(cfg: Config, *splits: str) -> None:
    """Check all that can be known before a run, then set up what the Runner needs.

    Args:
        cfg (Config): From :func:`load_config`.
        *splits (str): Of 'train', 'val' and 'test', those whose data the run reads.

    Raises:
        UserError: The config or the data cannot be run.
    """
    check_config(cfg)
    if launched_rank(cfg.launcher) == 0:  # one look at the files is enough
        for warning in check_data(cfg, splits):
            print(f"warning: {warning}", file=sys.stderr)
    prepare_cpu_group(cfg)
    install_whole_files()


def _check_options(cfg: Config, options: dict) -> None:
    read = {*inspect.signature(Runner.__init__).parameters, *_READ_KEYS} - {"self", "cfg"}
    for key in options:
        top = key.split(".")[0]
        if top in read:
            continue
        if top in cfg:
            raise ConfigError(
                f"--cfg-options {key}=...: {top} is a variable of the config file; its value has "
                "been put to use already, and overriding it changes nothing. Override what it went "
                f"into, such as {_first_use(cfg, top)}"
            )
        near = get_close_matches(top, read, n=2)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"--cfg-options {key}=...: no run reads {top!r}{hint}")


def _first_use(cfg: Config, variable: str) -> str:
    value = cfg[variable]

    def find(node, path):
        if node == value and path:
            return ".".join(path)
        items = node.items() if isinstance(node, dict) else ()
        return next((hit for k, v in items if (hit := find(v, [*path, k]))), None)

    uses = (find(cfg[key], [key]) for key in ("train_dataloader", "model", "val_evaluator"))
    return next((use for use in uses if use), "train_dataloader.dataset.data_root")


@contextmanager
def user_errors(*errors: type[Exception]) -> Iterator[None]:
    """End the process with one message, ``error: ...``, and exit code 1 where the user is at fault.

    Ctrl-C ends it with one word, and the exit code that shells give it, 130.

    RFA_MMDET_TRACEBACK=1 in the environment shows the traceback as well.

    Args:
        *errors (type[Exception]): What to treat so. Default: what building a run from a config
            raises for a wrong one, with the place that raised it.
    """
    errors = errors or (ValueError, TypeError, KeyError, FileNotFoundError)
    # MMEngine's import of it, which is not the user's to mend.
    warnings.filterwarnings("ignore", "pkg_resources is deprecated as an API", UserWarning)
    shown, sys.excepthook = sys.excepthook, _hide_lost_readers(sys.excepthook)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if _is_interruption(error):
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        if not isinstance(error, errors):
            raise
        if os.environ.get("RFA_MMDET_TRACEBACK") == "1":
            traceback.print_exc()
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
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
    """Return a hook for uncaught errors: ``hook``, but for a worker whose reader went away.

    A data loader's worker inherits it. The thread there that hands tensors over fails where Ctrl-C
    ends the main process in the middle of one, and would print its traceback after that one's last
    word.
    """

    def show(kind, error, trace) -> None:
        in_worker = multiprocessing.parent_process() is not None
        if not (in_worker and isinstance(error, (ConnectionError, EOFError))):
            hook(kind, error, trace)

    return show


def _is_interruption(error: BaseException | None) -> bool:
    """Tell a Ctrl-C, also one that a library's ``except:`` took for an error of its own."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
