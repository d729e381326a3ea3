"""Compare counts with published ones, manual ones, and those of MMEngine's own function."""

import runpy
import subprocess
import sys

import pytest
import torch
from mmcv.cnn import build_conv_layer, build_plugin_layer
from mmdet.registry import MODELS as DETECTORS
from mmengine.analysis import complexity_analysis, get_model_complexity_info, jit_analysis
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from rfa_mmdet.analysis import complexity
from rfa_mmdet.analysis.complexity import (
    CONVS,
    PLUGINS,
    PUBLISHED,
    Complexity,
    classifier_complexity,
    detector_complexity,
    system_backbone,
    system_extras,
)
from rfa_mmdet.cli import complexity as complexity_tool
from rfa_mmdet.compat import flop_counts
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.errors import ConfigError
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

TOOL = "tools/analysis/complexity.py"
DEMO = "configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py"


@pytest.fixture(autouse=True)
def _counts():
    """Count like MMDetection's own tools with RFA_MMDET_COMPAT=flop_counts."""
    flop_counts.apply()


@pytest.fixture
def warned(monkeypatch):
    """Return what MMEngine's analyzers log: unsupported operators and uncalled submodules."""
    messages = []
    monkeypatch.setattr(jit_analysis, "print_log", lambda text, *_, **__: messages.append(text))
    return lambda: [text for text in messages if "Unsupported operator" in text]


def analyse(network: nn.Module, *shape: int) -> dict:
    """Count like MMDetection's tools."""
    return get_model_complexity_info(network.eval(), shape, show_table=False, show_arch=False)


# --- the paper's table ---------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "conv"), PUBLISHED, ids=str)
def test_published_table(depth, conv):
    found, published = classifier_complexity(depth, conv), PUBLISHED[depth, conv]
    assert found.parameters == published.parameters
    if published.gflops is not None:
        assert found.gflops == pytest.approx(published.gflops, abs=0.002)
    assert found.agrees(published)
    assert not found.uncounted


def test_deviations_are_detected():
    published = PUBLISHED[18, "RFAConv"]
    assert not Complexity(published.parameters + 1, 1_908_000_000).agrees(published)
    assert not Complexity(published.parameters, 1_910_100_000).agrees(published)
    assert not Complexity(published.parameters, 1_905_900_000).agrees(published)
    unpublished = PUBLISHED[34, "RFCAConv"]
    assert Complexity(unpublished.parameters, 0).agrees(unpublished)


@pytest.mark.parametrize(("depth", "conv"), [(50, None), (18, "EMA"), (18, "plain")])
def test_unknown_classifier(depth, conv):
    with pytest.raises(ValueError, match=f"depth={depth}, conv={conv!r}: not in the paper's table"):
        classifier_complexity(depth, conv)


# --- MMEngine's analysis -------------------------------------------------------------------------


def test_every_registered_layer_is_counted():
    layers = {
        name: cls.__module__.split(".")[2]
        for name, cls in MODELS.module_dict.items()
        if cls.__module__.startswith("rfa_mmdet.layers.")
    }
    assert {name for name, kind in layers.items() if kind == "conv"} == set(CONVS)
    assert {name for name, kind in layers.items() if kind == "attention"} == set(PLUGINS)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(padding_mode="reflect"),
        dict(dilation=2, padding=2),
        dict(stride=2, padding_mode="circular"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_are_supported(name, kwargs, warned):
    conv = build_conv_layer(dict(type=name), 16, 8, 3, **{"padding": 1, **kwargs})
    assert analyse(conv, 16, 9, 7)["flops"] > 0
    assert not warned()


@pytest.mark.parametrize(
    "cfg",
    [
        *(dict(type=name, **kwargs) for name, kwargs in PLUGINS.items()),
        dict(type="ConAM", patch_size=4, hidden_channels=8, scale_by_patches=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_plugins_are_supported(cfg, size, warned):
    plugin = build_plugin_layer(cfg, in_channels=64)[1]
    assert analyse(plugin, 64, *size)["flops"] > 0
    assert not warned()


def test_unfolded_features_and_the_backbone_are_supported(warned):
    analyse(build_conv_layer(dict(type="RFAConv", feature="unfold"), 16, 8, 3), 16, 9, 7)
    analyse(DETECTORS.build(system_backbone("RFCBAMConv")), 3, 64, 64)
    assert not warned()


def test_unknown_operators_still_give_a_warning(warned):
    class Unknown(nn.Module):
        def forward(self, x):
            return torch.cumsum(torch.erf(x), dim=1)

    found = get_model_complexity_info(Unknown(), inputs=(torch.ones(1, 2, 3, 3),), show_arch=False)
    assert found["flops"] == 0
    assert sorted({text.split()[2] for text in warned()}) == ["aten::cumsum", "aten::erf"]


def test_rfa_conv_by_hand():
    channels, out, cells, k = 4, 6, 8 * 10, 9
    wide = channels * k
    expected = cells * (
        channels  # average pooling: 1 per output
        + wide  # logits: a grouped 1x1
        + wide * k  # features: a depthwise 3x3
        + 2 * wide  # MMEngine's batch norm
        + wide * out  # the final convolution
    )
    found = analyse(build_conv_layer(dict(type="RFAConv"), channels, out, 3, padding=1), 4, 8, 10)
    assert found["flops"] == expected


def test_ema_by_hand():
    groups, c, height, width = 4, 2, 6, 5
    cells = height * width
    expected = groups * (
        2 * c * cells  # row and column means: 1 per input element
        + c * c * (height + width)  # the 1x1
        + 5 * c * cells  # MMEngine's group norm
        + 9 * c * c * cells  # the 3x3
        + 2 * c * cells  # global means of both branches
        + 2 * c * cells  # each branch times the other's softmax
    )
    ema = build_plugin_layer(dict(type="EMA", factor=groups), in_channels=groups * c)[1]
    assert analyse(ema, groups * c, height, width)["flops"] == expected


@pytest.mark.parametrize(
    ("dims", "expected"),
    [((2, 3), 210), ((3,), 210), ((-1,), 210), ((1,), 0), ((-3,), 0), ((), 210)],
    ids=str,
)
def test_means_over_channels_are_not_counted(dims, expected):
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(dims) if dims else x.mean()

    found = get_model_complexity_info(Mean(), inputs=(torch.ones(1, 6, 5, 7),), show_arch=False)
    assert found["flops"] == expected


def test_applying_counts_is_idempotent_and_leaves_other_handles(monkeypatch):
    tables = ("_DEFAULT_SUPPORTED_FLOP_OPS", "_DEFAULT_SUPPORTED_ACT_OPS")
    before = [dict(getattr(complexity_analysis, table)) for table in tables]
    flop_counts.apply()
    assert [getattr(complexity_analysis, table) for table in tables] == before

    def theirs(inputs, outputs):
        return 7

    flops = getattr(complexity_analysis, tables[0])
    monkeypatch.setitem(flops, "aten::mean", theirs)
    flop_counts.apply()
    assert flops["aten::mean"] is theirs
    # The paper's rule applies regardless of other handles.
    assert classifier_complexity(18, None).agrees(PUBLISHED[18, None])


# --- detectors -----------------------------------------------------------------------------------


def build(model: dict) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmdet"):
        return DETECTORS.build(model)


def demo_config() -> Config:
    return Config.fromfile(ROOT / DEMO)


def test_detector_counts_match_mmengine():
    cfg = demo_config()
    found = detector_complexity(cfg, (60, 90))
    theirs = analyse(build(cfg.model), 3, 64, 96)  # padded to multiples of 32
    assert (found.parameters, found.flops) == (theirs["params"], theirs["flops"])
    assert not found.uncounted


def test_faster_rcnn_with_all_proposals():
    cfg = get_config("mmdet::faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py")
    cfg.model.backbone.init_cfg = None
    cfg.model.test_cfg.rpn.max_per_img = 0
    without = detector_complexity(cfg, (64, 64))
    cfg.model.test_cfg.rpn.max_per_img = 10
    found = detector_complexity(cfg, (64, 64))
    head = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80)
    assert found.flops - without.flops == 10 * head
    assert found.parameters == sum(p.numel() for p in build(cfg.model).parameters())


@pytest.mark.parametrize(("name", "masks"), [("mask", 1), ("cascade", 0), ("cascade-mask", 3)])
def test_region_heads_by_hand(name, masks):
    folder = "mask_rcnn" if name == "mask" else "cascade_rcnn"
    cfg = get_config(f"mmdet::{folder}/{name}-rcnn_r50_fpn_1x_coco.py")
    # Few regions, and different numbers, because the backbone dominates otherwise.
    found = {}
    for proposals, detections in ((0, 0), (7, 0), (0, 3)):
        cfg.model.backbone.update(depth=18, init_cfg=None)
        cfg.model.neck.in_channels = [64, 128, 256, 512]
        cfg.model.test_cfg.rpn.max_per_img = proposals
        cfg.model.test_cfg.rcnn.max_per_img = detections
        found[proposals, detections] = detector_complexity(cfg, (64, 64))
    rest = found[0, 0].flops
    stages, boxes = (1, 80) if name == "mask" else (3, 1)
    box_head = 256 * 7 * 7 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * boxes)
    assert found[7, 0].flops - rest == 7 * stages * box_head
    # Four 3x3 convolutions, a 2x2 upsampling from 14 x 14, and the classifier.
    mask_head = 14**2 * (4 * 9 + 4) * 256**2 + 28**2 * 256 * 80
    assert found[0, 3].flops - rest == 3 * masks * mask_head
    parameters = sum(p.numel() for p in build(cfg.model).parameters())
    assert {one.parameters for one in found.values()} == {parameters}
    assert not any(one.uncounted for one in found.values())


@pytest.mark.parametrize(
    "name", ["htc/htc-without-semantic_r50_fpn_1x_coco", "mask_rcnn/mask-rcnn_r50-caffe-c4_1x_coco"]
)
def test_unsupported_detectors_raise(name):
    with pytest.raises(ConfigError, match="can only count single-stage detectors, and Faster"):
        detector_complexity(get_config(f"mmdet::{name}.py"), (64, 64))


def test_plain_base_has_none_of_our_layers():
    cfg = demo_config()
    model = cfg.to_dict()["model"]
    base = plain_base(cfg)
    assert cfg.to_dict()["model"] == model
    assert "rfa" not in base.model.backbone
    assert plain_base(base) is None
    backbone = {**base.model.backbone, "type": "ResNet"}
    plain = build({**base.model, "backbone": backbone})
    expected = sum(p.numel() for p in plain.parameters())
    assert detector_complexity(base, (64, 64)).parameters == expected


def test_plain_base_replaces_every_kind_of_layer():
    def plugins(*names):
        return [dict(cfg=dict(type=name), position="after_conv3") for name in names]

    backbone = dict(
        type="ResNet",
        dcn=dict(type="CAConv"),
        stage_with_dcn=(False, True, True, True),
        plugins=plugins("ContextBlock", "SE", "ECA"),
        norm_cfg=dict(type="BN"),
    )
    heads = [
        dict(type="X", conv_cfg=dict(type="RFAConv")),
        dict(type="Y", conv_cfg=dict(type="DCN")),
    ]
    base = plain_base(Config(dict(model=dict(backbone=backbone, heads=heads)))).to_dict()
    assert base["model"] == dict(
        backbone=dict(type="ResNet", plugins=plugins("ContextBlock"), norm_cfg=dict(type="BN")),
        heads=[dict(type="X"), dict(type="Y", conv_cfg=dict(type="DCN"))],
    )


def test_costs_added_to_resnet50():
    extras = dict(system_extras((128, 128)))
    assert list(extras) == [*CONVS, *PLUGINS]
    assert all(extra.parameters > 0 and extra.flops > 0 for extra in extras.values())
    assert extras["RFAConv"].parameters == 387_072
    # SE: 2 C^2 / 16 in each of the 4, 6 and 3 blocks.
    assert extras["SE"].parameters == sum(
        2 * blocks * c * c // 16 for blocks, c in ((4, 512), (6, 1024), (3, 2048))
    )


# --- the tool ------------------------------------------------------------------------------------


def run_here(monkeypatch, capsys, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [TOOL, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(TOOL, run_name="__main__")
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_tool_counts_a_config():
    done = subprocess.run(
        [sys.executable, TOOL, DEMO, "--image-size", "64", "64"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    cfg = demo_config()
    found, plain = (detector_complexity(c, (64, 64)) for c in (cfg, plain_base(cfg)))
    assert f"{found.parameters:,} │" in done.stdout
    assert f"{plain.gflops:.3f} │" in done.stdout
    assert f"{found.parameters - plain.parameters:+,} │" in done.stdout
    assert "Not counted" not in done.stdout


def test_tool_fails_if_the_table_deviates(monkeypatch, capsys):
    table = {(18, None): PUBLISHED[18, None], (18, "CAMConv"): PUBLISHED[18, "CBAMConv"]}
    for module in (complexity, complexity_tool):
        monkeypatch.setattr(module, "PUBLISHED", table)
    code, out, _ = run_here(monkeypatch, capsys, "--table")
    assert code == 1
    assert out.count("agrees") == out.count("DEVIATES") == 1
    del table[18, "CAMConv"]
    code, out, _ = run_here(monkeypatch, capsys, "--table")
    assert code == 0
    assert "1 of 1 agree" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of CONFIG, --table and --systems"),
        ([DEMO, "--table"], "give exactly one of CONFIG, --table and --systems"),
        ([DEMO, "--image-size", "0", "64"], "--image-size: must be an integer"),
        (["configs/demo/no.py"], "config='configs/demo/no.py': no such file"),
        (["configs/_base_/schedules/adamw_50e.py"], "has no model"),
        ([DEMO, "--cfg-options", "model.backbone.rfa.type=RFACov"], "did you mean RFAConv"),
        ([DEMO, "--cfg-options", "modell.x=1"], "unknown config key 'modell'; did you mean model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_tool_reports_bad_arguments_in_one_error(arguments, message, monkeypatch, capsys):
    code, _, err = run_here(monkeypatch, capsys, *arguments)
    assert code in (1, 2)
    assert err.count("error: ") == 1
    assert message in err


def test_help_shows_an_example_that_exists(monkeypatch, capsys):
    code, out, _ = run_here(monkeypatch, capsys, "--help")
    assert code == 0
    example = out.split("example:")[1].split()
    assert example[:2] == ["python", TOOL]
    assert (ROOT / example[2]).is_file()
