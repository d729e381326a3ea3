"""tools/train.py and tools/test.py as a user runs them: real processes, real files."""

import json
import pickle
import shutil
import signal
import sys

import cv2
import pandas as pd
import pytest
import torch
from mmengine.config import Config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rfa_mmdet.cli.train import add_tensorboard, keep_best
from tests.helpers.ports import free_port
from tests.helpers.run_logs import losses, weights


def test_train_writes_checkpoints_config_and_metrics(trained):
    for name in ("epoch_1.pth", "epoch_3.pth", "last_checkpoint", "tiny.py"):
        assert (trained / name).is_file()
    assert list(trained.glob("best_coco_bbox_mAP_epoch_*.pth"))
    log = pd.read_json(next(trained.glob("*/vis_data/scalars.json")), lines=True)
    assert log["coco/bbox_mAP_50"].notna().sum() == 3
    assert len(losses(trained)) == 9


def test_test_prints_metrics_draws_and_dumps(trained, tiny_config, run_tool, tmp_path):
    done = run_tool(
        *(sys.executable, "tools/test.py", tiny_config, trained / "epoch_3.pth"),
        *("--work-dir", tmp_path / "work", "--show-dir", tmp_path / "shown"),
        *("--out", tmp_path / "predictions.pkl"),
    )
    assert done.returncode == 0, done.stdout
    assert "coco/bbox_mAP_50" in done.stdout
    pictures = list((tmp_path / "shown").rglob("*.jpg"))
    assert len(pictures) == 4
    # Ground truth and detections are side by side.
    assert cv2.imread(str(pictures[0])).shape == (64, 128, 3)
    predictions = pickle.loads((tmp_path / "predictions.pkl").read_bytes())
    assert len(predictions) == 4
    assert f"predictions: {tmp_path / 'predictions.pkl'}" in done.stdout
    assert not list(tmp_path.glob(".*"))
    assert predictions[0]["pred_instances"]["bboxes"].shape[1] == 4
    # The test matches the validation after the same epoch.
    tested = json.loads(next((tmp_path / "work").glob("*/*.json")).read_text())
    log = pd.read_json(next(trained.glob("*/vis_data/scalars.json")), lines=True)
    assert tested["coco/bbox_mAP"] == log["coco/bbox_mAP"].dropna().iloc[-1]


def test_every_image_gets_a_picture_with_any_name(trained, tiny_config, shapes, run_tool, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "data")
    content = json.loads((root / "annotations" / "val.json").read_text())
    # The same name in another folder, and a name that OpenCV cannot write.
    for image, name in zip(
        content["images"], ("a/x.jpg", "b/x.jpg", "x.jfif", "y.jpg"), strict=True
    ):
        (root / "JPEGImages" / name).parent.mkdir(exist_ok=True)
        (root / "JPEGImages" / image["file_name"]).rename(root / "JPEGImages" / name)
        image["file_name"] = name
    content["categories"][0]["name"] = "$x$ [red]"
    (root / "annotations" / "val.json").write_text(json.dumps(content))
    names = ["$x$ [red]", *(category["name"] for category in content["categories"][1:])]
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(tiny_config)!r}\n"
        f"metainfo = dict(classes={tuple(names)!r}, palette=[(9, 9, 9)])\n"
        "test_dataloader = dict(dataset=dict(metainfo=metainfo))\n"
    )
    done = run_tool(
        *(sys.executable, "tools/test.py", config, trained / "epoch_3.pth"),
        *("--work-dir", tmp_path / "work", "--show-dir", tmp_path / "shown"),
        DATA_ROOT=str(root),
    )
    assert done.returncode == 0, done.stdout
    shown = sorted(
        str(p.relative_to(tmp_path / "shown")) for p in (tmp_path / "shown").rglob("*.*")
    )
    assert shown == ["a/x.jpg", "b/x.jpg", "x.jfif.png", "y.jpg"]


@pytest.mark.parametrize(
    ("hook", "expected"),
    [
        (dict(interval=2), ("auto", "greater")),
        (dict(save_best="coco/bbox_mAP_50"), ("coco/bbox_mAP_50", None)),
        (dict(save_best=None), (None, None)),
    ],
)
def test_save_best_in_the_config_is_respected(hook, expected):
    cfg = Config(dict(val_evaluator=dict(type="CocoMetric"), default_hooks=dict(checkpoint=hook)))
    keep_best(cfg)
    found = cfg.default_hooks.checkpoint
    assert (found.get("save_best"), found.get("rule")) == expected


def test_no_best_checkpoint_without_validation():
    cfg = Config(dict(val_evaluator=None))
    keep_best(cfg)
    assert "default_hooks" not in cfg


def test_tensorboard_is_added_once():
    cfg = Config(dict())
    for _ in range(2):
        add_tensorboard(cfg)
        types = [backend.type for backend in cfg.visualizer.vis_backends]
        assert types == ["LocalVisBackend", "TensorboardVisBackend"]
    cfg = Config(dict(visualizer=dict(type="X", vis_backends=[dict(type="WandbVisBackend")])))
    add_tensorboard(cfg)
    types = [backend.type for backend in cfg.visualizer.vis_backends]
    assert types == ["WandbVisBackend", "TensorboardVisBackend"]


KILLED = """
import os
import signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KilledHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (runner.epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_and_resumed_run_equals_an_uninterrupted_one(
    trained, tiny_config, run_tool, tmp_path
):
    (tmp_path / "killed.py").write_text(KILLED)
    config, work = tmp_path / "killed_config.py", tmp_path / "work"
    config.write_text(
        f'_base_ = "{tiny_config}"\n'
        'custom_imports = dict(imports=["rfa_mmdet", "killed"])\n'
        'custom_hooks = [*_base_.custom_hooks, dict(type="KilledHook")]\n'
    )
    command = (sys.executable, "tools/train.py")
    done = run_tool(*command, config, "--work-dir", work, PYTHONPATH=str(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stdout
    assert "Epoch(train) [2][1/3]" in done.stdout

    done = run_tool(*command, tiny_config, "--work-dir", work, "--resume")
    assert done.returncode == 0, done.stdout
    assert "resumed epoch: 1" in done.stdout
    pd.testing.assert_series_equal(losses(work), losses(trained), check_exact=True)
    resumed, whole = weights(work / "epoch_3.pth"), weights(trained / "epoch_3.pth")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


DIES = """
import resource
import signal
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class DiesHook(Hook):
    priority = "HIGHEST"

    def before_save_checkpoint(self, runner, checkpoint):
        if checkpoint["meta"]["epoch"] == 2:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
"""


@pytest.mark.slow
def test_killed_while_writing_a_checkpoint_and_resumed(trained, tiny_config, run_tool, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    config, work = tmp_path / "dying.py", tmp_path / "work"
    config.write_text(
        f'_base_ = "{tiny_config}"\n'
        'custom_imports = dict(imports=["rfa_mmdet", "dies"])\n'
        'custom_hooks = [*_base_.custom_hooks, dict(type="DiesHook")]\n'
        "default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))\n"
    )
    command = (sys.executable, "tools/train.py")
    done = run_tool(*command, config, "--work-dir", work, PYTHONPATH=str(tmp_path))
    assert done.returncode == -signal.SIGXFSZ, done.stdout
    assert len(list(work.glob(".epoch_2.*.part.pth"))) == 1
    assert not (work / "epoch_2.pth").exists()
    assert weights(work / "epoch_1.pth").keys() == weights(trained / "epoch_1.pth").keys()

    done = run_tool(*command, tiny_config, "--work-dir", work, "--resume")
    assert done.returncode == 0, done.stdout
    assert "resumed epoch: 1" in done.stdout
    resumed, whole = weights(work / "epoch_3.pth"), weights(trained / "epoch_3.pth")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


VOC = """
data = dict(
    _delete_=True,
    type="XMLDataset",
    data_root="{{$DATA_ROOT:none}}/",
    data_prefix=dict(sub_data_root=""),
    ann_file="ImageSets/Main/val.txt",
    metainfo=dict(classes=("circle", "square", "triangle", "star")),
    test_mode=True,
    pipeline={{_base_.test_pipeline}},
)
val_dataloader = dict(dataset=data)
val_evaluator = dict(_delete_=True, type="VOCMetric", metric="mAP")
train_cfg = dict(max_epochs=2)
# As in MMDetection's own configs, of which none says that the best is kept.
default_hooks = dict(checkpoint=dict(_delete_=True, type="CheckpointHook", interval=1))
"""


def test_tensorboard_flag_and_best_checkpoint(tiny_config, run_tool, tmp_path):
    config = tmp_path / "voc.py"
    config.write_text(f'_base_ = "{tiny_config}"\n{VOC}')
    done = run_tool(
        *(sys.executable, "tools/train.py", config, "--work-dir", tmp_path / "work"),
        "--tensorboard",
    )
    assert done.returncode == 0, done.stdout
    (folder,) = (tmp_path / "work").glob("*/vis_data")
    events = EventAccumulator(str(folder)).Reload()
    # The same numbers as in the usual log.
    log = pd.read_json(folder / "scalars.json", lines=True)
    for name, number in (("loss", 6), ("pascal_voc/mAP", 2)):
        written = [event.value for event in events.Scalars(name)]
        assert len(written) == number
        assert written == pytest.approx(log[name].dropna().tolist(), rel=1e-5)
    best = log["pascal_voc/mAP"].dropna().argmax() + 1
    (kept,) = (tmp_path / "work").glob("best_*.pth")
    assert kept.name == f"best_pascal_voc_mAP_epoch_{best}.pth"


KEEP_WEIGHTS = """
import os
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KeepWeightsHook(Hook):
    def after_train(self, runner):
        module = runner.model.module
        torch.save(module.state_dict(), os.environ["KEEP"] + f"/rank{runner.rank}.pth")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        module = runner.model.module
        torch.save(module.state_dict(), os.environ["KEEP"] + f"/before{runner.rank}.pth")
"""


@pytest.mark.slow
def test_two_processes_on_cpu_end_with_equal_parameters(tiny_config, run_tool, tmp_path):
    (tmp_path / "keep_weights.py").write_text(KEEP_WEIGHTS)
    config = tmp_path / "two.py"
    config.write_text(
        f'_base_ = "{tiny_config}"\n'
        'custom_imports = dict(imports=["rfa_mmdet", "keep_weights"])\n'
        'custom_hooks = [*_base_.custom_hooks, dict(type="KeepWeightsHook")]\n'
        "train_cfg = dict(max_epochs=1)\n"
    )
    done = run_tool(
        *("bash", "tools/dist_train.sh", config, 2, "--work-dir", tmp_path / "work"),
        PYTHONPATH=str(tmp_path),
        KEEP=str(tmp_path),
        PORT=free_port(),
    )
    assert done.returncode == 0, done.stdout
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    assert first
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved = weights(tmp_path / "work" / "epoch_1.pth")
    assert all(torch.equal(first[name], saved[name]) for name in first)
    # Each process saw other images, so their BN statistics differed during the epoch.
    first, second = (torch.load(tmp_path / f"before{rank}.pth") for rank in (0, 1))
    name = next(name for name in first if name.endswith("running_mean"))
    assert not torch.equal(first[name], second[name])
    mean = (first[name] + second[name]) / 2
    assert torch.allclose(saved[name], mean, rtol=1e-6, atol=1e-7)
    # The validated model is the saved one.
    tested = run_tool(
        *(sys.executable, "tools/test.py", tiny_config, tmp_path / "work" / "epoch_1.pth"),
        *("--work-dir", tmp_path / "test"),
    )
    assert tested.returncode == 0, tested.stdout
    (log,) = (tmp_path / "work").glob("*/vis_data/scalars.json")
    validated = pd.read_json(log, lines=True)["coco/bbox_mAP_50"].dropna().iloc[-1]
    metrics = json.loads(next((tmp_path / "test").glob("*/*.json")).read_text())
    assert metrics["coco/bbox_mAP_50"] == validated


@pytest.mark.slow
def test_sync_bn_without_cuda(tiny_config, run_tool, tmp_path):
    options = (
        "--cfg-options",
        "model.backbone.norm_cfg.type=SyncBN",
        "train_cfg.max_epochs=1",
    )
    one = run_tool(
        *(sys.executable, "tools/train.py", tiny_config, "--work-dir", tmp_path / "1", *options)
    )
    assert one.returncode == 0, one.stdout
    assert "reverted to BatchNorm" in one.stdout
    two = run_tool(
        *("bash", "tools/dist_train.sh", tiny_config, 2, "--work-dir", tmp_path / "2", *options),
        PORT=free_port(),
    )
    assert two.returncode != 0
    assert "SyncBN in several processes needs CUDA" in two.stdout
