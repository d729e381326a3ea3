"""Train a detector."""

from importlib.util import find_spec
from pathlib import Path

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.runner import Runner

from rfa_mmdet.checkpoints.weights import StartHook
from rfa_mmdet.cli.command_line import load_run, prepare_run, run_parser, user_errors
from rfa_mmdet.config.plain import type_name
from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.layers.warm_start.start import WarmStartError


def parse_args():
    """Read the command line."""
    parser = run_parser(
        "Train a detector. Logs and checkpoints go to the work dir.",
        "python tools/train.py configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py --tensorboard",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="PATH|auto",
        help="resume from a checkpoint; auto, or no value: from the latest one in the work dir",
    )
    parser.add_argument("--amp", action="store_true", help="use automatic mixed precision")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by batch size / auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write TensorBoard logs; view them with tensorboard --logdir <work dir>",
    )
    return parser.parse_args()


def add_tensorboard(cfg: Config) -> None:
    """Add TensorBoard to the visualizer's backends."""
    if find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard: tensorboard is not installed: pip install tensorboard")
    if cfg.get("visualizer") is None:
        # With its scope, because pure-Python configs have no default scope.
        cfg.visualizer = dict(type="mmdet.DetLocalVisualizer", name="visualizer")
    backends = cfg.visualizer.get("vis_backends") or [dict(type="LocalVisBackend")]
    if not any(type_name(backend["type"]) == "TensorboardVisBackend" for backend in backends):
        cfg.visualizer.vis_backends = [*backends, dict(type="TensorboardVisBackend")]


def keep_best(cfg: Config) -> None:
    """Keep the best checkpoint by the first metric, unless the config sets ``save_best``."""
    if cfg.get("val_evaluator") is None:
        return
    hooks = cfg.setdefault("default_hooks", {})
    hook = hooks.setdefault("checkpoint", dict(type="CheckpointHook", interval=1))
    known = hook is not None and type_name(hook.get("type", "CheckpointHook")) == "CheckpointHook"
    if known and "save_best" not in hook:
        # For some metrics, e.g. LVIS's bbox_AP, MMEngine does not know that higher is better.
        hook.update(save_best="auto", rule="greater")


def has_checkpoint(work_dir: str) -> bool:
    """Return whether a training in this work dir can resume.

    Raises:
        ConfigError: ``last_checkpoint`` names a missing file. MMEngine does not write it
            atomically, so a kill may leave it empty. It also removes checkpoints beyond
            ``max_keep_ckpts`` before it writes the next one.
    """
    path = Path(work_dir, "last_checkpoint")
    name = path.read_text().strip() if path.is_file() else None
    if name is None:
        return False
    if "://" in name or (name and Path(name).exists()):
        return True
    found = ", ".join(sorted(p.name for p in Path(work_dir).glob("[!.]*.pth"))) or "no checkpoint"
    raise ConfigError(
        f"--resume auto: {path} names {name!r}, which does not exist; pass another checkpoint with "
        f"--resume PATH (in {work_dir}: {found})"
    )


def apply_args(cfg: Config, args) -> None:
    """Apply this tool's own arguments to the config."""
    if type_name(cfg.get("runner_type") or "Runner") != "Runner":
        raise ConfigError(
            f"runner_type={cfg.runner_type!r}: this tool only supports MMEngine's Runner; remove "
            "runner_type, or use MMDetection's own tools/train.py"
        )
    if args.amp:
        kind = type_name(cfg.optim_wrapper.get("type", "OptimWrapper"))
        if kind not in ("OptimWrapper", "AmpOptimWrapper"):
            raise ConfigError(
                f"--amp: optim_wrapper.type={kind!r} is not supported; must be OptimWrapper or "
                "AmpOptimWrapper"
            )
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ConfigError(
                "--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the batch size "
                "that its learning rate is for; add e.g. auto_scale_lr = dict(base_batch_size=16)"
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        if args.resume != "auto" and not Path(args.resume).is_file():
            raise ConfigError(f"--resume {args.resume}: no such file")
        # A training that was killed before its first checkpoint starts again from load_from.
        cfg.resume = args.resume != "auto" or has_checkpoint(cfg.work_dir)
        if cfg.resume:
            cfg.load_from = None if args.resume == "auto" else args.resume
    if args.tensorboard:
        add_tensorboard(cfg)
    keep_best(cfg)


def build_run(cfg: Config) -> Runner:
    """Build everything a training needs, in the Runner's own order, before it starts."""
    runner = Runner.from_cfg(cfg)
    runner.register_hook(StartHook())
    _ = runner.train_loop
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    runner.auto_scale_lr = None  # already scaled
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    _ = runner.val_loop
    return runner


def main() -> None:
    """Check everything up front, then train."""
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    with user_errors():
        cfg = load_run(args, "train", "val")
        apply_args(cfg, args)
        prepare_run(cfg, "train", "val", images=args.check_data)
        runner = build_run(cfg)
    with user_errors(UserError, WarmStartError):
        runner.train()
