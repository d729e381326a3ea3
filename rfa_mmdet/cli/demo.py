"""Draw a dataset, train a small detector with RFAConv on it, evaluate it and show it.

Every step is a command that you could type yourself. Needs no download and no GPU.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mmcv import imread
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.structures import InstanceData
from rich.console import Console
from rich.table import Table

from rfa_mmdet.analysis.attention_maps import attention_maps
from rfa_mmdet.analysis.pictures import save_attention, save_curves, save_detections
from rfa_mmdet.cli.command_line import user_errors, within
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py"
DATA = "data/shapes"
WORK_DIR = "work_dirs/demo"
EPOCHS = 8  # of CONFIG
NEEDED_AP50 = 0.9  # after these
console = Console(highlight=False, soft_wrap=True)


def run(*command: str) -> float:
    """Print and run a command in the checkout; exit with its exit code if it fails.

    Returns:
        float: Seconds that it took.
    """
    console.print(f"\n[bold]$ python {shlex.join(command)}[/bold]")
    start = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)
    return time.monotonic() - start


def newest(folder: Path, pattern: str) -> Path:
    """Return the newest file below ``folder`` that matches."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder}: nothing there matches {pattern}")
    return found[-1]


def print_metrics(metrics: dict[str, float]) -> None:
    """Print COCO's bbox metrics as a table."""
    table = Table(title="COCO metrics on the validation images")
    names = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75"}
    names |= {"mAP_s": "AP small", "mAP_m": "AP medium", "mAP_l": "AP large"}
    for title in names.values():
        table.add_column(title, justify="right")
    values = (metrics[f"coco/bbox_{name}"] for name in names)
    # COCO's -1: no object of that size.
    table.add_row(*("-" if value < 0 else f"{value:.3f}" for value in values))
    console.print(table)


def draw(work_dir: Path, checkpoint: Path, scalars: Path) -> None:
    """Write the three pictures of the demo."""
    cfg = Config.fromfile(ROOT / CONFIG)
    # One box an object: second guesses of its class serve the metrics alone.
    cfg.model.test_cfg.nms.class_agnostic = True
    model = init_detector(cfg, str(checkpoint), device="cpu")
    dataset = DATASETS.build({**cfg.val_dataloader.dataset, "data_root": str(ROOT / DATA)})
    infos = [dataset.get_data_info(i) for i in range(4)]
    images = [imread(info["img_path"], channel_order="rgb") for info in infos]
    samples = inference_detector(model, [info["img_path"] for info in infos])
    for info, sample in zip(infos, samples, strict=True):
        boxes = [instance["bbox"] for instance in info["instances"]]
        labels = [instance["bbox_label"] for instance in info["instances"]]
        sample.gt_instances = InstanceData(
            bboxes=sample.pred_instances.bboxes.new_tensor(boxes),
            labels=sample.pred_instances.labels.new_tensor(labels),
        )
    with written_whole(work_dir / "detections.png") as part:
        save_detections(images, samples, dataset.metainfo["classes"], part)
    with written_whole(work_dir / "curves.png") as part:
        save_curves(scalars, part)
    last_blocks = r"layer[2-4]\.1\.conv1$"
    path = infos[0]["img_path"]
    maps, _ = attention_maps(model, lambda: inference_detector(model, path), last_blocks)
    with written_whole(work_dir / "attention.png") as part:
        save_attention(images[0], maps, part)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: make demo", allow_abbrev=False
    )
    parser.add_argument(
        "--epochs",
        type=within(1),
        default=EPOCHS,
        metavar="N",
        help="train for N epochs; AP50 is only checked with the default (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Run the demo."""
    args = parse_args()
    with user_errors(UserError):
        run_demo(args.epochs)


def run_demo(epochs: int) -> None:
    """Draw, train, evaluate and show."""
    if not (ROOT / CONFIG).is_file():
        raise UserError("the demo needs a checkout of the repository; run `make demo` there")
    work_dir = ROOT / WORK_DIR
    shutil.rmtree(work_dir, ignore_errors=True)  # an earlier demo's
    run("tools/make_shapes.py", DATA, "--train", "960", "--val", "120", "--seed", "0")
    keys = ("train_cfg.max_epochs", "param_scheduler.1.T_max", "param_scheduler.1.end")
    options = ["--cfg-options", *(f"{key}={epochs}" for key in keys)] if epochs != EPOCHS else []
    seconds = run("tools/train.py", CONFIG, "--work-dir", WORK_DIR, *options)
    scalars = newest(work_dir, "*/vis_data/scalars.json")
    checkpoint = newest(work_dir, "best_coco_bbox_mAP_epoch_*.pth").relative_to(ROOT)
    run("tools/test.py", CONFIG, str(checkpoint), "--work-dir", f"{WORK_DIR}/test")
    metrics = json.loads(newest(work_dir / "test", "*/*.json").read_text())
    draw(work_dir, ROOT / checkpoint, scalars)

    console.rule("done")
    console.print(f"trained in {seconds:.0f} s")
    print_metrics(metrics)
    console.print("pictures:")
    for name in ("detections.png", "curves.png", "attention.png"):
        console.print(f"  {WORK_DIR}/{name}")
    # As it was typed, not where a virtual environment's link leads.
    python = Path(os.path.abspath(sys.executable))
    if python.is_relative_to(ROOT):
        python = python.relative_to(ROOT)
    console.print("\nnext, try")
    for command in (
        # Every picture of the validation set; the same without RFAConv; data of one's own.
        f"{python} tools/test.py {CONFIG} {checkpoint} --show-dir {WORK_DIR}/pictures",
        f"{python} tools/train.py {CONFIG} --cfg-options model.backbone.rfa=None "
        "model.backbone.stage_with_rfa=None --work-dir work_dirs/demo_plain",
        f"DATA_ROOT={DATA} CLASSES=circle,square,triangle,star {python} tools/train.py "
        "configs/custom/retinanet_r18-rfaconv_fpn_50e_custom-voc.py",
    ):
        console.print(f"  {command}", style="cyan")
    ap50 = metrics["coco/bbox_mAP_50"]
    if epochs == EPOCHS and ap50 < NEEDED_AP50:
        sys.exit(f"AP50 is {ap50:.3f}; expected at least {NEEDED_AP50:.2f}")
