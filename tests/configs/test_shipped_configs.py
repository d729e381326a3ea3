"""Every shipped config: its name, its model, its documents, and one step of training and testing.

The data sets are drawn in the places and formats that the configs name, below a folder of the test,
so that paths, classes and evaluators are those that are shipped. Only sizes are changed.
"""

import random
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from rfa_mmdet import layers
from rfa_mmdet.analysis.complexity import detector_complexity
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.data.shapes import make_shapes
from tests.helpers.sets import classes_of, draw_sets, leaves

ROOT = Path(__file__).resolve().parents[2]
# Those of ablation say which runs to compare; tests/tools/test_ablate.py reads them.
CONFIGS = sorted(
    path for path in ROOT.glob("configs/*/*.py") if path.parent.name not in ("_base_", "ablation")
)
# Class of each method, by the name that files and folders have.
METHODS = {name.lower(): getattr(layers, name) for name in layers.__all__}
PAPER = dict.fromkeys(METHODS, "2304.03198") | dict(
    ema="2305.13563",
    conam="2110.14369",
    cbam="1807.06521",
    coordatt="2103.02907",
    se="1709.01507",
    eca="1910.03151",
)
# Those that are shipped for more than RetinaNet and Faster R-CNN on COCO.
MAIN, ON_VOC = ("rfaconv", "ema", "conam"), ("rfaconv", "rfcaconv", "rfcbamconv", "ema", "conam")
# mmdet's class of each detector, and its name without backbone.
DETECTORS = {
    "retinanet": "RetinaNet",
    "faster-rcnn": "FasterRCNN",
    "mask-rcnn": "MaskRCNN",
    "cascade-rcnn": "CascadeRCNN",
    "fcos": "FCOS",
    "atss": "ATSS",
    "rtmdet": "RTMDet",
    "yolox": "YOLOX",
}
CLASS_COUNT = {"coco": 80, "voc0712": 20, "visdrone": 10, "shapes": 4}
# Blocks of stages 2 to 4; each has one layer.
BLOCKS = {"r18": 6, "r50": 13, "r101": 30, "rtmdet_s": 5, "yolox_s": 7}
# {model}_{backbone}-{method}_{neck}_{schedule}_{data set}, after OpenMMLab
NAME = re.compile(
    rf"(?P<model>{'|'.join(DETECTORS)})"
    rf"_(?P<backbone>r\d+|s)(?P<style>-caffe)?-(?P<method>{'|'.join(METHODS)})"
    r"(?P<neck>_fpn)?(?P<head>_gn-head)?"
    r"_(?P<schedule>\dx|\d+e|8xb\d+-300e)"
    r"_(?P<data>coco|voc0712|visdrone|shapes|custom-coco|custom-voc|roboflow)"
)
# Each method, each detector and each data set once, on the smallest model that has it; the others
# are other combinations of the same, and take minutes.
QUICK = [
    *(f"retinanet_r18-{method}_fpn_1x_coco" for method in METHODS),
    "faster-rcnn_r50-rfcaconv_fpn_1x_voc0712",
    "retinanet_r50-conam_fpn_1x_voc0712",
    "faster-rcnn_r50-ema_fpn_1x_visdrone",
    "mask-rcnn_r50-conam_fpn_1x_coco",
    "cascade-rcnn_r50-rfaconv_fpn_1x_coco",
    "fcos_r50-caffe-ema_fpn_gn-head_1x_coco",
    "atss_r50-conam_fpn_1x_coco",
    *(f"rtmdet_s-{method}_8xb32-300e_coco" for method in MAIN),
    *(f"yolox_s-{method}_8xb8-300e_coco" for method in MAIN),
    "retinanet_r18-rfaconv_fpn_50e_custom-coco",
    "retinanet_r18-rfaconv_fpn_50e_custom-voc",
    "retinanet_r18-rfaconv_fpn_50e_roboflow",
    "retinanet_r18-rfaconv_fpn_6e_shapes",
]

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def parts_of(path: Path) -> dict[str, str]:
    match = NAME.fullmatch(path.stem)
    assert match, f"{path.stem} is not {{model}}_{{backbone}}-{{method}}_{{neck}}_{{schedule}}_..."
    return match.groupdict()


def method_layers(path: Path, model: nn.Module) -> dict[str, nn.Module]:
    method = METHODS[parts_of(path)["method"]]
    return {name: m for name, m in model.named_modules() if isinstance(m, method)}


def nodes(node: Any) -> Iterator[dict]:
    """Yield every dict of a config."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from nodes(value)


def build(cfg: dict) -> nn.Module:
    from mmdet.registry import MODELS

    init_default_scope("mmdet")
    return MODELS.build(cfg)


@cache
def read(path: Path) -> Config:
    """Read a config once for all tests that change nothing in it."""
    return Config.fromfile(path)


@cache
def planned(path: Path) -> nn.Module:
    """Build a config's model without memory for its weights."""
    with torch.device("meta"):
        return build(read(path).model)


# --- names, places, class counts -----------------------------------------------------------------


def test_all_that_is_promised_is_shipped_and_nothing_else():
    wanted = {
        *(f"retinanet_{depth}-{m}_fpn_1x_coco" for depth in ("r18", "r50") for m in METHODS),
        *(f"faster-rcnn_r50-{m}_fpn_1x_coco" for m in METHODS),
        *(f"{d}_r50-{m}_fpn_1x_coco" for d in ("mask-rcnn", "cascade-rcnn", "atss") for m in MAIN),
        *(f"fcos_r50-caffe-{m}_fpn_gn-head_1x_coco" for m in MAIN),
        *(f"rtmdet_s-{m}_8xb32-300e_coco" for m in MAIN),
        *(f"yolox_s-{m}_8xb8-300e_coco" for m in MAIN),
        *(
            f"retinanet_{schedule}_coco".format(m)
            for m in MAIN
            for schedule in ("r101-{}_fpn_1x", "r50-{}_fpn_2x")
        ),
        *(f"{d}_r50-{m}_fpn_1x_voc0712" for d in ("retinanet", "faster-rcnn") for m in ON_VOC),
        *(f"{d}_r50-ema_fpn_1x_visdrone" for d in ("retinanet", "faster-rcnn")),
        *(f"retinanet_r18-rfaconv_fpn_50e_{d}" for d in ("custom-coco", "custom-voc", "roboflow")),
        "retinanet_r18-rfaconv_fpn_6e_shapes",
    }
    assert {path.stem for path in CONFIGS} == wanted
    assert len(CONFIGS) == len(wanted)


@each_config
def test_name_says_what_is_built(path):
    parts = parts_of(path)
    assert path.parent.name in (parts["method"], "custom", "demo")
    cfg = read(path)
    check_config(Config({**cfg, "launcher": "none"}))

    schedule, data = parts["schedule"], parts["data"]
    # VOC's images are repeated three times an epoch.
    epochs = int(re.search(r"(\d+)[xe]$", schedule)[1]) * (12 if schedule.endswith("x") else 1)
    assert cfg.train_cfg.max_epochs == (epochs // 3 if data == "voc0712" else epochs)
    if schedule.startswith("8xb"):
        assert cfg.train_dataloader.batch_size == int(re.match(r"8xb(\d+)", schedule)[1])

    model = planned(path)
    assert type(model).__name__ == DETECTORS[parts["model"]]
    assert parts["neck"] == {"FPN": "_fpn"}.get(type(model.neck).__name__)
    if parts["backbone"] != "s":
        assert model.backbone.depth == int(parts["backbone"][1:])
        assert (model.backbone.style == "caffe") == bool(parts["style"])
    if parts["head"]:
        assert any(isinstance(m, nn.GroupNorm) for m in model.bbox_head.modules())
    found = method_layers(path, model)
    assert {re.match(r"backbone\.(layer|stage)([234])\.", name)[2] for name in found} == set("234")
    backbone = parts["backbone"]
    assert len(found) == BLOCKS[f"{parts['model']}_s" if backbone == "s" else backbone]

    heads = {
        name: m.num_classes
        for name, m in model.named_modules()
        if hasattr(m, "num_classes") and not name.startswith("rpn_head")
    }
    assert heads
    assert set(heads.values()) == {CLASS_COUNT.get(data, 1)}
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for leaf in leaves(cfg[key].dataset):
            assert len(classes_of(leaf)) == CLASS_COUNT.get(data, 1)
    metrics = cfg.val_evaluator if isinstance(cfg.val_evaluator, list) else [cfg.val_evaluator]
    wanted = {"voc0712": {"VOCMetric"}, "custom-voc": {"CocoMetric", "VOCMetric"}}
    assert {metric["type"] for metric in metrics} == wanted.get(data, {"CocoMetric"})


@each_config
def test_pretrained_backbone_is_that_of_the_base(path):
    """None is lost where Retrofit takes the base's backbone over, and none added."""
    cfg = read(path)
    parts = parts_of(path)
    backbone = cfg.model.backbone
    init = backbone.get("module", backbone).get("init_cfg")
    if parts["model"] == "yolox" or path.parent.name in ("custom", "demo"):
        assert init is None
    elif parts["model"] == "rtmdet":
        assert init.checkpoint.endswith("cspnext-s_imagenet_600e.pth")
    elif parts["style"]:
        assert init.checkpoint == "open-mmlab://detectron/resnet50_caffe"
    else:
        assert init.checkpoint == f"torchvision://resnet{parts['backbone'][1:]}"


@each_config
def test_configs_are_a_few_lines_over_a_base(path):
    text = path.read_text()
    assert "_base_" in text
    if path.parent.name != "demo":
        assert len([line for line in text.splitlines() if line.strip()]) <= 24


# --- documents -----------------------------------------------------------------------------------


def readme_rows(method: str) -> dict[str, list[str]]:
    """Return the cells of a README's table, by config."""
    text = (ROOT / "configs" / method / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| \[", line)
    ]
    links = [re.fullmatch(r"\[(?P<name>\S+)\]\((?P=name)\.py\)", cells[0]) for cells in rows]
    assert all(links), "each config is named and linked by its file's name"
    assert len({link["name"] for link in links}) == len(rows)
    return {link["name"]: cells[1:] for link, cells in zip(links, rows, strict=True)}


@pytest.mark.parametrize("method", METHODS)
def test_readme_metafile_and_files_agree(method):
    folder = ROOT / "configs" / method
    files = {path.stem for path in folder.glob("*.py")}
    readme = (folder / "README.md").read_text()
    metafile = yaml.safe_load((folder / "metafile.yml").read_text())
    collection, models = *metafile["Collections"], metafile["Models"]

    assert set(readme_rows(method)) == files
    assert sorted(model["Name"] for model in models) == sorted(files)
    name = METHODS[method].__name__
    assert collection["Name"] == name
    assert readme.startswith(f"# {name}\n")
    assert collection["README"] == f"configs/{method}/README.md"
    paper = collection["Paper"]
    assert paper["URL"] == f"https://arxiv.org/abs/{PAPER[method]}"
    assert f"[{paper['Title']}]({paper['URL']})" in readme
    for model in models:
        assert model["In Collection"] == name
        assert model["Config"] == f"configs/{method}/{model['Name']}.py"
        cfg = read(ROOT / model["Config"])
        assert model["Metadata"]["Epochs"] == cfg.train_cfg.max_epochs
        data = {"coco": "COCO", "voc0712": "VOC07+12", "visdrone": "VisDrone2019"}
        assert model["Metadata"]["Training Data"] == data[model["Name"].rsplit("_", 1)[1]]


def test_no_accuracy_is_claimed():
    """Nobody here has trained these: no result, no weights, and no number beside a metric."""
    for method in METHODS:
        folder = ROOT / "configs" / method
        assert {cells[-1] for cells in readme_rows(method).values()} == {"not measured"}
        metafile = yaml.safe_load((folder / "metafile.yml").read_text())
        for node in nodes(metafile):
            assert not {"Results", "Weights"} & set(node)
    for path in (*CONFIGS, *ROOT.glob("configs/*/*.md"), *ROOT.glob("configs/*/*.yml")):
        claim = re.search(
            r"\b(m?AP\d*|AR|[Aa]ccuracy|[Tt]op-1)\b[^|\n]*\d|\d\s*%", path.read_text()
        )
        assert not claim, f"{path}: {claim[0]!r}"


@pytest.mark.parametrize("method", METHODS)
def test_readme_has_the_parameters_of_what_is_built(method):
    for name, (_, parameters, *_) in readme_rows(method).items():
        model = planned(ROOT / "configs" / method / f"{name}.py")
        assert parameters == f"{sum(p.numel() for p in model.parameters()):,}", name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_readme_has_the_gflops_that_the_tool_counts(method):
    name = f"retinanet_r18-{method}_fpn_1x_coco"
    found = detector_complexity(read(ROOT / "configs" / method / f"{name}.py"))
    assert readme_rows(method)[name][2] == f"{found.gflops:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("method", MAIN)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mask-rcnn_r50-{}_fpn_1x_coco", (800, 1333)),
        ("cascade-rcnn_r50-{}_fpn_1x_coco", (800, 1333)),
        ("fcos_r50-caffe-{}_fpn_gn-head_1x_coco", (800, 1333)),
        ("rtmdet_s-{}_8xb32-300e_coco", (640, 640)),
        ("yolox_s-{}_8xb8-300e_coco", (640, 640)),
    ],
)
def test_every_operator_of_other_detectors_is_counted(name, size, method):
    name = name.format(method)
    found = detector_complexity(read(ROOT / "configs" / method / f"{name}.py"), size)
    assert found.uncounted == {}
    assert readme_rows(method)[name][2] == f"{found.gflops:.3f}"


# --- one step ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Two training and two validation images of 160 x 128; stage 4 makes them 5 x 4.

    ConAM needs more than one patch of 4 x 4 there, or its softmax is over a single one.
    """
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, num_train=2, num_val=2, image_size=(160, 128), seed=3, max_objects=5)
    return root


def shrink(cfg: Config) -> Config:
    """Make a config's images, regions and batches small; everything else stays."""
    for part in nodes(cfg._cfg_dict):
        for key in ("scale", "img_scale", "crop_size", "size", "border"):
            sides = part.get(key)
            if isinstance(sides, (tuple, list)) and max(map(abs, sides)) >= 320:
                wide = sides[0] != sides[1]
                part[key] = (160, 128) if wide else tuple(side // 4 for side in sides)
        if part.get("type") == "BatchSyncRandomResize":
            part["random_size_range"] = (128, 192)
        if part.get("type") == "RandomSampler":
            part["num"] = 32
        if "nms_pre" in part and "max_per_img" in part:
            part.update(nms_pre=100, max_per_img=30)
        if "score_thr" in part:
            part["score_thr"] = 0.0  # what is not trained is sure of nothing
    for key in ("train_dataloader", "val_dataloader"):
        cfg[key].update(batch_size=2, num_workers=0, persistent_workers=False, pin_memory=False)
    return cfg


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Put a plain backbone's random weights in the place of those that a config downloads."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def replace(cfg: Config) -> bool:
        base = plain_base(cfg)
        pretrained = [
            part["init_cfg"]
            for part in nodes(cfg._cfg_dict)
            if part.get("init_cfg") and part["init_cfg"]["type"] == "Pretrained"
        ]
        for init in pretrained:
            path = folder / re.sub(r"\W", "_", init["checkpoint"])
            if not path.exists():
                backbone = {**base.model.backbone, "init_cfg": None}
                state = build(backbone).state_dict()
                prefix = init.get("prefix", "")
                torch.save({prefix + key: value for key, value in state.items()}, path)
            init["checkpoint"] = str(path)
        return bool(pretrained)

    yield replace
    shutil.rmtree(folder)  # pytest keeps what it made, and these are large


def batch_of(dataloader: dict) -> tuple[dict, Any]:
    loader = Runner.build_dataloader(dataloader, seed=0)
    return next(iter(loader)), loader.dataset


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in CONFIGS
    ],
)
def test_one_training_step_and_one_prediction(path, shapes, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("DATA_ROOT", "CLASSES"):
        monkeypatch.delenv(variable, raising=False)
    # The Runner's count of iterations, which BatchSyncRandomResize asks for.
    MessageHub.get_current_instance().update_info("iter", 0)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    cfg = shrink(Config.fromfile(path))
    draw_sets(cfg, shapes)
    pretrained = stand_in(cfg)
    model = revert_sync_batchnorm(build(cfg.model))
    model.init_weights()

    batch, dataset = batch_of(cfg.train_dataloader)
    assert len(batch["inputs"]) == 2
    assert sum(len(sample.gt_instances) for sample in batch["data_samples"]) > 0
    classes = len(dataset.metainfo["classes"])
    slopes = {}

    def note(name):
        def add(parameter):
            slopes[name] = slopes.get(name, 0) + parameter.grad.abs().sum().item()

        return add

    found = method_layers(path, model)
    for name, layer in found.items():
        for parameter in layer.parameters():
            assert parameter.requires_grad
            parameter.register_post_accumulate_grad_hook(note(name))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert all(trained.issuperset(layer.parameters()) for layer in found.values())
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3  # as warm-up begins
    # A ResNet that nobody trained starts with its branches at zero, and with no slope in them.
    for _ in range(1 if pretrained else 2):
        loss = model.train().train_step(batch, optimizer)["loss"].item()
        assert 0 < loss < float("inf")
    assert slopes.keys() == found.keys()
    assert min(slopes.values()) > 0
    after = [p for p in model.parameters() if p.requires_grad]
    assert any((new != old).any() for new, old in zip(after, before, strict=True))

    for name, parameter in model.named_parameters():
        if re.search(r"rtm_reg.*bias$", name):
            # RTMDet's distances, untrained, are below zero by chance, and such boxes are dropped.
            parameter.data.fill_(1)
    batch, dataset = batch_of(cfg.val_dataloader)
    with torch.no_grad():
        samples = model.eval().test_step(batch)
    assert len(samples) == 2
    for sample in samples:
        assert len(sample.pred_instances) > 0
        assert torch.isfinite(sample.pred_instances.bboxes).all()
        assert (
            0 <= sample.pred_instances.labels.min() <= sample.pred_instances.labels.max() < classes
        )
    evaluator = Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    evaluator.process(data_samples=samples, data_batch=batch)
    metrics = evaluator.evaluate(len(dataset))
    assert metrics
    assert all(np.isfinite(value) for value in metrics.values())
