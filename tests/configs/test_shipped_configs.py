"""Name, model and documents of every shipped config."""

import re

import pytest
import yaml
from mmengine.config import Config
from torch import nn

from rfa_mmdet.analysis.complexity import detector_complexity
from rfa_mmdet.config.check import check_config
from rfa_mmdet.layers.warm_start.plugin import Plugin
from rfa_mmdet.models.retrofit.new_layers import new_layers
from tests.helpers.paths import ROOT
from tests.helpers.sets import classes_of, leaves
from tests.helpers.shipped import (
    BLOCKS,
    CLASS_COUNT,
    CONFIGS,
    DETECTORS,
    MAIN,
    METHODS,
    each_config,
    method_layers,
    nodes,
    parts_of,
    planned,
    read,
)

PAPER = dict.fromkeys(METHODS, "2304.03198") | dict(
    ema="2305.13563",
    conam="2110.14369",
    cbam="1807.06521",
    coordatt="2103.02907",
    se="1709.01507",
    eca="1910.03151",
)
ON_VOC = ("rfaconv", "rfcaconv", "rfcbamconv", "ema", "conam")

# --- names, places, class counts -----------------------------------------------------------------


def test_all_promised_configs_are_shipped():
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
        "atss_r18-rfaconv_fpn_8e_shapes",
    }
    assert {path.stem for path in CONFIGS} == wanted
    assert len(CONFIGS) == len(wanted)


@each_config
def test_name_matches_the_model(path):
    parts = parts_of(path)
    assert path.parent.name in (parts["method"], "custom", "demo")
    cfg = read(path)
    check_config(Config({**cfg, "launcher": "none"}))

    schedule, data = parts["schedule"], parts["data"]
    # VOC's images are repeated three times per epoch.
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
    """Retrofit neither loses nor adds pretrained weights of the base's backbone."""
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
def test_plugins_start_as_the_identity_with_a_pretrained_backbone(path):
    backbone = read(path).model.backbone
    pretrained = backbone.get("module", backbone).get("init_cfg") is not None
    layers = method_layers(path, planned(path)).values()
    starts = {layer.start if isinstance(layer, Plugin) else "warm" for layer in layers}
    plugin = "identity" if pretrained else "paper"
    assert starts in ({"warm"}, {plugin})


@each_config
def test_start_report_names_the_layers(path):
    """MMDetection's own ResNet has the same plug-ins, but reports nothing."""
    model = planned(path)
    assert {name for name, _ in new_layers(model)} == set(method_layers(path, model))


@each_config
def test_configs_are_a_few_lines_on_top_of_a_base(path):
    text = path.read_text()
    assert "_base_" in text
    if path.parent.name != "demo":
        assert len([line for line in text.splitlines() if line.strip()]) <= 24


# --- documents -----------------------------------------------------------------------------------


def readme_rows(method: str) -> dict[str, list[str]]:
    """Return the cells of a README's table by config."""
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
    """These configs have not been trained: no results, no weights, and no numbers for metrics."""
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
def test_readme_has_the_models_parameters(method):
    for name, (_, parameters, *_) in readme_rows(method).items():
        model = planned(ROOT / "configs" / method / f"{name}.py")
        assert parameters == f"{sum(p.numel() for p in model.parameters()):,}", name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_readme_has_the_tools_gflops(method):
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
def test_all_operators_of_other_detectors_are_counted(name, size, method):
    name = name.format(method)
    found = detector_complexity(read(ROOT / "configs" / method / f"{name}.py"), size)
    assert found.uncounted == {}
    assert readme_rows(method)[name][2] == f"{found.gflops:.3f}"


@each_config
def test_configs_are_self_contained(path):
    """With any trainer, an interrupted run then resumes with identical results."""
    cfg = read(path)
    hooks = [hook["type"] for hook in cfg.custom_hooks]
    assert hooks[-2:] == ["EpochSeedHook", "SyncBuffersHook"]
    assert len(set(hooks)) == len(hooks)
    assert cfg.custom_imports.imports == ["rfa_mmdet"]
