"""Evaluate a detector on the config's test data."""

from pathlib import Path

from mmdet.datasets.transforms import PackDetInputs
from mmdet.evaluation import DumpDetResults
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.fileio import dump
from mmengine.logging import print_log

from rfa_mmdet.checkpoints.weights import OwnWeightsRunner
from rfa_mmdet.cli.command_line import load_run, prepare_run, run_parser, user_errors
from rfa_mmdet.data.check.find import Leaf, leaves
from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.files import check_folder, written_whole
from rfa_mmdet.inference.truth_and_detections import TruthAndDetectionsHook
from rfa_mmdet.layers.warm_start.start import WarmStartError

PACK = PackDetInputs.__name__


class DumpWhole(DumpDetResults):
    """MMDetection's dump of predictions, written atomically."""

    def compute_metrics(self, results: list) -> dict:
        """Write the predictions of all ranks."""
        with written_whole(self.out_file_path) as part:
            dump(results, str(part))
        print_log(f"predictions: {self.out_file_path}", logger="current")
        return {}


def parse_args():
    """Read the command line."""
    parser = run_parser(
        "Evaluate a checkpoint with the config's test data and metrics.",
        "python tools/test.py configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py "
        "work_dirs/demo/epoch_8.pth --show-dir work_dirs/demo/pictures",
    )
    parser.add_argument("checkpoint", help="checkpoint file or URL")
    parser.add_argument("--show-dir", help="folder for pictures of ground truth next to detections")
    parser.add_argument("--out", help="write the predictions to this .pkl file")
    parser.add_argument(
        "--tta",
        action="store_true",
        help="use test-time augmentation: the config's tta_model and tta_pipeline",
    )
    return parser.parse_args()


def apply_args(cfg: Config, args) -> None:
    """Apply this tool's own arguments to the config."""
    if "://" not in args.checkpoint and not Path(args.checkpoint).is_file():
        raise ConfigError(f"checkpoint={args.checkpoint!r}: no such file")
    cfg.load_from = args.checkpoint
    cfg.resume = False  # True in the config that a resumed training leaves in its work dir
    if args.out is not None:
        if Path(args.out).suffix not in (".pkl", ".pickle"):
            raise ConfigError(f"--out {args.out}: must end in .pkl or .pickle")
        if Path(args.out).is_dir():
            raise ConfigError(f"--out {args.out}: is a folder")
        check_folder(Path(args.out).parent, "--out")  # fail now rather than after the evaluation
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    missing = [key for key in ("tta_model", "tta_pipeline") if key not in cfg]
    if args.tta and missing:
        raise ConfigError(
            f"--tta: the config has no {' and no '.join(missing)}; for example, add mmdet's "
            "configs/retinanet/retinanet_tta.py to _base_"
        )
    if args.show_dir is not None:
        check_folder(args.show_dir, "--show-dir")


def augment(cfg: Config) -> None:
    """Wrap the detector and the test pipeline in test-time augmentation.

    The pipeline also packs what the original one packs: evaluators may need it.
    """
    own = [t for leaf in leaves(cfg, "test") for name, t in leaf.transforms() if name == PACK]
    packed = [key for transform in own for key in transform.get("meta_keys", ())]
    for name, transform in Leaf("tta_pipeline", {}, (cfg.tta_pipeline,)).transforms():
        if name == PACK:
            given = transform.get("meta_keys") or PackDetInputs().meta_keys
            transform["meta_keys"] = tuple(dict.fromkeys([*given, *packed]))

    def replace(dataset: dict) -> None:
        inner = [dataset["dataset"]] if "dataset" in dataset else dataset.get("datasets", [])
        if not inner:
            dataset["pipeline"] = cfg.tta_pipeline
        elif "pipeline" in dataset:  # the inner pipeline already gives complete images
            dataset["pipeline"] = []
        for one in inner:
            replace(one)

    replace(cfg.test_dataloader.dataset)
    cfg.model = dict(**cfg.tta_model, module=cfg.model)


def main() -> None:
    """Check everything up front, then evaluate."""
    args = parse_args()
    setup_cache_size_limit_of_dynamo()
    with user_errors():
        cfg = load_run(args, "test")
        apply_args(cfg, args)
        prepare_run(cfg, "test", images=args.check_data)
        if args.tta:
            augment(cfg)
        runner = OwnWeightsRunner.from_cfg(cfg)
        if args.out is not None:
            runner.test_evaluator.metrics.append(DumpWhole(out_file_path=args.out))
        if args.show_dir is not None:
            own = cfg.get("default_hooks", {}).get("visualization") or {}
            runner.register_hook(TruthAndDetectionsHook(args.show_dir, own.get("score_thr", 0.3)))
    with user_errors(UserError, WarmStartError):
        runner.test()
