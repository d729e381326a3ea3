"""The configs of configs/mmpretrain: models, two steps, and their backbones in detectors."""

import json
import pickle
import re
import sys

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from rfa_mmdet import layers
from rfa_mmdet.analysis.complexity import PUBLISHED
from rfa_mmdet.data.crops import write_crops
from rfa_mmdet.data.shapes import make_shapes
from rfa_mmdet.inference.detector import build_detector
from rfa_mmdet.models import RFAResNet
from rfa_mmdet.studies import load_study
from tests.helpers.pages import code
from tests.helpers.paths import ROOT

pytest.importorskip("mmpretrain.models", reason="mmpretrain is not installed", exc_type=ImportError)
pytestmark = pytest.mark.slow

CONFIGS = sorted(ROOT.glob("configs/mmpretrain/*.py"))
IN1K = [path for path in CONFIGS if path.stem.endswith("in1k")]
METHODS = {name.lower(): getattr(layers, name) for name in layers.__all__}
CIFAR_KEYS = {
    "10": ("cifar-10-batches-py", "labels", "label_names", "data_batch_1", "test_batch"),
    "100": ("cifar-100-python", "fine_labels", "fine_label_names", "train", "test"),
}


def build(cfg: Config):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def method_of(path):
    return METHODS[path.stem.split("_")[0].split("-")[1]]


def test_all_promised_configs_are_shipped():
    convs = ("rfaconv", "rfcbamconv", "rfcaconv", "camconv", "cbamconv", "caconv")
    assert {path.stem for path in CONFIGS} == {
        *(f"resnet{depth}-{conv}_8xb32_in1k" for depth in (18, 34) for conv in convs),
        "resnet18-rfaconv_8e_shapes",
        "resnet50-ema_8xb16_cifar100",
        "resnet50-conam_8xb16_cifar10",
        "resnet50-conam_8xb16_cifar100",
    }


# Without the small one, so that it stays the config of the committed results.
@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if not path.stem.endswith("_shapes")],
    ids=lambda path: path.stem,
)
def test_configs_name_the_hooks_for_exact_resuming(path):
    hooks = [hook["type"] for hook in Config.fromfile(path).custom_hooks]
    assert hooks == ["EpochSeedHook", "SyncBuffersHook"]


def test_readme_has_the_models_parameters():
    text = (ROOT / "configs/mmpretrain/README.md").read_text()
    rows = dict(re.findall(r"(?m)^\| \[(\S+)\]\(\1\.py\) \| [^|]+ \| ([\d,]+) \|", text))
    assert set(rows) == {path.stem for path in CONFIGS}
    for path in CONFIGS:
        parameters = sum(p.numel() for p in build(Config.fromfile(path)).parameters())
        assert rows[path.stem] == f"{parameters:,}"


@pytest.mark.parametrize("path", IN1K, ids=lambda path: path.stem)
def test_parameters_are_the_papers(path):
    cfg = Config.fromfile(path)
    model, method = build(cfg), method_of(path)
    depth = cfg.model.backbone.depth
    assert (
        sum(p.numel() for p in model.parameters()) == PUBLISHED[depth, method.__name__].parameters
    )
    found = {name for name, m in model.named_modules() if isinstance(m, method)}
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[depth]
    assert found == {
        f"backbone.layer{stage}.{block}.conv1"
        for stage, number in enumerate(blocks, 1)
        for block in range(number)
    }


def draw_imagenet(root):
    """Write ImageNet's own layout: images in a folder per class, and a list of them."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        lines = []
        for label, folder in enumerate(("n01440764", "n01443537")):
            for i in range(2):
                image = random.integers(0, 256, (80, 72, 3), dtype=np.uint8)
                mmcv.imwrite(image, str(root / split / folder / f"{i}.JPEG"))
                lines.append(f"{folder}/{i}.JPEG {label}\n")
        (root / "meta").mkdir(exist_ok=True)
        (root / "meta" / f"{split}.txt").write_text("".join(lines))


def draw_cifar(root, number: str):
    """Write CIFAR's own format, with the batches that MMPretrain reads."""
    folder, labels, names, train, test = CIFAR_KEYS[number]
    random = np.random.default_rng(0)
    files = [f"data_batch_{i}" for i in range(1, 6)] if number == "10" else [train]
    for file in (*files, test):
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {"data": data, labels: [0, 1, 2, 3]}
        (root / folder).mkdir(exist_ok=True)
        (root / folder / file).write_bytes(pickle.dumps(content))
    names = {names: [f"c{i}" for i in range(int(number))]}
    meta = "batches.meta" if number == "10" else "meta"
    (root / folder / meta).write_bytes(pickle.dumps(names))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps_and_predictions(path, tmp_path, monkeypatch):
    cfg = Config.fromfile(path)
    data = path.stem.rsplit("_", 1)[1]
    root = tmp_path
    if data == "shapes":
        make_shapes(tmp_path / "set", num_train=4, num_val=2)
        write_crops(tmp_path / "set")
        root = tmp_path / "set" / "crops"
    elif data == "in1k":
        draw_imagenet(tmp_path)
        cfg.train_dataloader.dataset.pipeline[1].scale = 64
        cfg.val_dataloader.dataset.pipeline[1].scale = 72
        cfg.val_dataloader.dataset.pipeline[2].crop_size = 64
    else:
        draw_cifar(tmp_path, data.removeprefix("cifar"))
        from mmpretrain import datasets

        kind = getattr(datasets, cfg.train_dataloader.dataset.type)
        for key in ("train_list", "test_list"):  # without the checksums of the real files
            monkeypatch.setattr(kind, key, [[file, None] for file, _ in getattr(kind, key)])
    for part in ("train", "val"):
        loader = cfg[f"{part}_dataloader"]
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(root), indices=4)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
    cfg.param_scheduler = None
    cfg.pop("test_dataloader")
    cfg.pop("test_evaluator")
    cfg.pop("test_cfg")
    cfg.work_dir = str(tmp_path / "work")
    runner = Runner.from_cfg(cfg)
    layer = next(m for m in runner.model.modules() if isinstance(m, method_of(path)))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    runner.train()
    assert runner.iter == 2
    assert runner.model.backbone.bn1.num_batches_tracked == 2  # the norms train on batches
    assert any(not torch.equal(before[name], p) for name, p in layer.named_parameters())
    runner.model.eval()
    with torch.no_grad():
        (sample, *_) = runner.model.val_step(next(iter(runner.val_dataloader)))
    assert sample.pred_score.shape == (cfg.model.head.num_classes,)
    torch.testing.assert_close(sample.pred_score.sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    "conv", ["rfaconv", "rfcbamconv", "rfcaconv", "camconv", "cbamconv", "caconv"]
)
def test_backbone_goes_into_a_detector(conv, tmp_path):
    classifier = build(Config.fromfile(ROOT / f"configs/mmpretrain/resnet18-{conv}_8xb32_in1k.py"))
    for value in classifier.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    file = tmp_path / "epoch_100.pth"
    torch.save(dict(state_dict=classifier.state_dict()), file)
    cfg = Config.fromfile(ROOT / f"configs/{conv}/retinanet_r18-{conv}_fpn_1x_coco.py")
    cfg.model.backbone.stage_with_rfa = (True,) * 4
    cfg.model.backbone.rfa.bias = True
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(file), prefix="backbone.")
    detector = build(cfg)
    assert isinstance(detector.backbone, RFAResNet)
    detector.init_weights()
    wanted, found = classifier.backbone.state_dict(), detector.backbone.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    trained = {n for n, p in detector.backbone.named_parameters() if p.requires_grad}
    assert any(name.startswith("layer1.0.conv1.") for name in trained)  # despite frozen_stages=1


SPEC = """
_base_ = {study!r}
base = {config!r}
_loader = dict(dataset=dict(data_root={crops!r}))
options = dict(
    train_dataloader=_loader, val_dataloader=_loader, test_dataloader=_loader,
    train_cfg=dict(max_epochs=1), param_scheduler=dict(T_max=1))
seeds = (0,)
stages = dict(scratch=dict(methods=("plain", "EMA")))
"""


def test_study_of_classifiers(run_tool, tmp_path):
    make_shapes(tmp_path / "set", num_train=24, num_val=8)
    images = write_crops(tmp_path / "set")["val"]
    study = ROOT / "configs/ablation/classification.py"
    config = ROOT / "configs/mmpretrain/resnet18-rfaconv_8e_shapes.py"
    crops = tmp_path / "set/crops"
    text = SPEC.format(study=str(study), config=str(config), crops=str(crops))
    (tmp_path / "study.py").write_text(text)
    done = run_tool(sys.executable, "tools/ablate.py", tmp_path / "study.py",
                    "--work-dir", tmp_path / "study", PYTHONWARNINGS="ignore")  # fmt: skip
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "study/results.json").read_text())
    assert [run["method"] for run in results["runs"]] == ["plain", "EMA"]
    for run in results["runs"]:
        assert run["state"] == "finished"
        right = run["metrics"]["accuracy/top1"] * images / 100
        assert right == pytest.approx(round(right), abs=1e-3)
    assert results["costs"]["methods"].keys() == {"plain", "EMA"}


@pytest.mark.parametrize("name", ["plain", "RFAConv", "RFCAConv", "RFCBAMConv", "EMA", "ConAM"])
def test_methods_of_the_study_have_one_layer_in_every_block(name, tmp_path):
    study = load_study(ROOT / "configs/ablation/classification.py", tmp_path)
    (run,) = (run for run in study.runs() if run.method == name and run.seed == 0)
    model = build(study.config(run))
    found = sum(type(module).__name__ == name for module in model.modules())
    assert found == (0 if name == "plain" else 8)
    # The mean of the config's top level, as in a training.
    built = build_detector(study.config(run))
    assert built.data_preprocessor.mean.ravel().tolist() == pytest.approx(
        [125.307, 122.961, 113.8575]
    )


def test_ten_lines_of_the_documentation_build_the_shipped_classifier(tmp_path):
    (text,) = [text for _, text in code("python") if '"mmpretrain::' in text]
    (tmp_path / "config.py").write_text(text)
    shipped = ROOT / "configs/mmpretrain/resnet18-rfaconv_8xb32_in1k.py"
    own, theirs = (Config.fromfile(file) for file in (tmp_path / "config.py", shipped))
    assert own.model.to_dict() == theirs.model.to_dict()
    build(own)
