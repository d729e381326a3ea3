"""tools/retrofit_checkpoint.py end to end, on a one-stage and a two-stage detector."""

import copy
import logging
import re
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from rfa_mmdet.checkpoints.retrofit import Equality, compare
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.layers import RFAConv
from tests.helpers.paths import ROOT
from tests.helpers.retrofitted import (
    FASTER_RCNN,
    RETINANET,
    build_plain,
    save_plain,
    write_configs,
)


@pytest.fixture(scope="module")
def detectors(tiny_config, tmp_path_factory):
    """Return name -> plain config, retrofitted config and plain checkpoint."""
    folder = tmp_path_factory.mktemp("detectors")
    texts = dict(retinanet=RETINANET.format(tiny=tiny_config), faster_rcnn=FASTER_RCNN)
    found = {}
    for name, text in texts.items():
        plain, config = write_configs(folder, name, text)
        found[name] = (plain, config, save_plain(plain, folder / f"{name}.pth"))
    return found


@pytest.fixture
def tool(capsys, monkeypatch):
    """Run the tool in this process; return exit status, output and errors."""

    def run(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["tools/retrofit_checkpoint.py", *map(str, arguments)])
        # MMEngine's logger may have kept the stream of an earlier test, which is closed.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        code = 0
        try:
            runpy.run_path("tools/retrofit_checkpoint.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def fails(tool, tmp_path):
    """Run the tool, which must fail with one line and write nothing; return that line."""

    def run(*arguments, target=None):
        target = tmp_path / "out" / "warm.pth" if target is None else target
        before = target.read_bytes() if target.is_file() else None
        config, source, *rest = arguments
        code, _, errors = tool(config, source, target, *rest)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert code == 1, errors
        assert len(lines) == 1, errors
        assert "Traceback" not in errors
        assert (target.read_bytes() if target.is_file() else None) == before
        if target.parent.is_dir():
            assert not list(target.parent.glob("*.part"))
        return lines[0]

    return run


# --------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_checkpoint_gives_the_same_outputs(name, detectors, tool, tmp_path):
    plain_config, config, source = detectors[name]
    target = tmp_path / "new" / "folder" / "warm.pth"
    code, output, errors = tool(config, source, target)
    assert code == 0, errors
    parts = dict(re.findall(r"│ (\w+) +│ ([\d.e+-]+)", output))
    expected = {"maps", "bbox_head"} if name == "retinanet" else {"maps", "rpn_head", "roi_head"}
    assert parts.keys() == expected
    assert all(float(value) <= 1e-4 for value in parts.values())
    assert f"wrote: {target}" in output
    assert "warning" not in errors
    written = torch.load(target, weights_only=True)
    # Only the weights' own metadata: this is not a training checkpoint.
    assert written["meta"] == {
        "dataset_meta": {"classes": ("circle", "square", "triangle", "star")}
    }
    init_default_scope("mmdet")
    net = MODELS.build(Config.fromfile(config).model)
    assert sum(isinstance(m, RFAConv) for m in net.modules()) == 6
    net.load_state_dict(written["state_dict"], strict=True)
    assert not any(m.start.plain for m in net.modules() if isinstance(m, RFAConv))
    image = torch.randint(0, 256, (3, 192, 256), generator=torch.Generator().manual_seed(3))
    plain = build_plain(plain_config)
    assert compare(plain, net, image.float()).largest <= 1e-4
    # All parts depend on the new convolutions.
    torch.nn.init.normal_(net.backbone.layer3[0].conv1.conv.weight)
    assert all(value > 1e-3 for value in compare(plain, net, image.float()).outputs.values())


def test_image_overwrite_and_bare_state_dict(detectors, tool, tmp_path):
    _, config, source = detectors["retinanet"]
    image, target = tmp_path / "image.png", tmp_path / "warm.pth"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (700, 400, 3), np.uint8))
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(source)["state_dict"], bare)
    target.write_bytes(b"old")
    code, output, errors = tool(config, bare, target, "--image", image, "--overwrite")
    assert code == 0, errors
    assert f"wrote: {target}" in output
    assert torch.load(target, weights_only=True)["meta"] == {}


@pytest.fixture
def with_ema(tiny_config, tmp_path):
    """Write the config of a detector with EMA after the blocks of stage 4, with this start."""

    def write(start):
        more = f', dict(after=r"layer4\\.\\d", plugin=dict(type="EMA", factor=8{start}))'
        return write_configs(tmp_path, "ema", RETINANET.format(tiny=tiny_config), more=more)[1]

    return write


def test_plugins_start_as_the_identity(with_ema, detectors, tool, tmp_path):
    source, target = detectors["retinanet"][2], tmp_path / "warm.pth"
    code, output, errors = tool(with_ema(""), source, target)
    assert code == 0, errors
    assert "warning" not in errors
    values = [float(value) for value in re.findall(r"│ \w+ +│ ([\d.e+-]+)", output)]
    assert max(values) <= 1e-4
    assert "backbone.layer4.0.ema.gn.weight" in torch.load(target, weights_only=True)["state_dict"]


def test_plugins_not_starting_as_the_identity_give_a_warning(with_ema, detectors, tool, tmp_path):
    source = detectors["retinanet"][2]
    code, output, errors = tool(with_ema(", start='paper'"), source, tmp_path / "warm.pth")
    assert code == 0, errors
    assert errors.count("warning: ") == 1
    assert (
        "warning: 2 new layers (e.g. backbone.layer4.0.ema) may change the outputs until they "
        "are trained: plug-ins that do not start as the identity"
    ) in errors
    values = [float(value) for value in re.findall(r"│ \w+ +│ ([\d.e+-]+)", output)]
    assert max(values) > 1e-3
    assert (tmp_path / "warm.pth").is_file()


def test_convolutions_are_compared_without_such_plugins(with_ema, detectors, fails):
    error = fails(with_ema(", start='paper'"), detectors["retinanet"][2], "--tolerance", "1e-12")
    found = re.search(r"by a relative (\d\.\de-\d+) > tolerance=1\.0e-12; nothing written", error)
    assert float(found[1]) <= 1e-4


def test_convolutions_of_other_packages_give_a_warning(tiny_config, detectors, tool, tmp_path):
    # With stride 2, it pads differently.
    config = write_configs(
        tmp_path, "other", RETINANET.format(tiny=tiny_config), "Conv2dAdaptivePadding"
    )[1]
    target = tmp_path / "warm.pth"
    code, _, errors = tool(config, detectors["retinanet"][2], target)
    assert code == 0, errors
    assert "warning: 6 new layers (e.g. backbone.layer2.0.conv1) may change the outputs" in errors
    assert target.is_file()


# --------------------------------------------------------------------------- rejected input


def test_missing_and_existing_files(detectors, fails, tmp_path):
    _, config, source = detectors["retinanet"]
    assert fails(config, tmp_path / "no.pth") == f"error: {tmp_path}/no.pth: no such file"
    there = tmp_path / "there.pth"
    there.write_bytes(b"kept")
    error = fails(config, source, target=there)
    assert error == f"error: {there}: already exists; use --overwrite to replace it"
    folder = tmp_path / "folder"
    folder.mkdir()
    assert fails(config, source, target=folder).endswith(": is a folder; name the file to write")
    assert "no such file" in fails(tmp_path / "no.py", source)
    assert fails(config, source, "--image", tmp_path / "no.png").endswith(
        "no.png: cannot be read as an image"
    )
    assert fails(config, source, "--image", config).endswith(": cannot be read as an image")


def test_invalid_checkpoints(detectors, fails, tmp_path):
    _, config, source = detectors["retinanet"]
    other = detectors["faster_rcnn"][2]
    error = fails(config, other)
    assert re.search(
        r"faster_rcnn\.pth: not a checkpoint of the plain detector: \d+ of its keys are "
        r"missing, e\.g\. neck\.\w+",
        error,
    )
    text = tmp_path / "text.pth"
    text.write_text("no checkpoint")
    assert str(text) in fails(config, text)
    numbers = tmp_path / "numbers.pth"
    for value, message in (
        (dict(state_dict=[1]), "its state_dict is a list, not a dict"),
        (dict(a=1), "contains no state dict"),
        ([1, 2], "contains a list, not a dict"),
    ):
        torch.save(value, numbers)
        assert fails(config, numbers) == f"error: {numbers}: {message}"
    shapes = torch.load(source)
    shapes["state_dict"]["backbone.layer3.0.conv1.weight"] = torch.zeros(9, 9, 3, 3)
    torch.save(shapes, numbers)
    error = fails(config, numbers)
    assert ": 1 of its keys have different shapes" in error
    assert (
        "backbone.layer3.0.conv1.weight has shape (9, 9, 3, 3) instead of (32, 16, 3, 3)"
    ) in error


def test_configs_without_layers_of_this_package(detectors, fails):
    plain, _, source = detectors["retinanet"]
    assert fails(plain, source) == (
        f"error: config={str(plain)!r}: has no layer of this package to warm-start"
    )


@pytest.mark.parametrize("where", ["bbox_head.retina_reg.bias", "backbone.bn1.weight"])
def test_nan_weights_raise(where, detectors, fails, tmp_path):
    _, config, source = detectors["retinanet"]
    checkpoint = torch.load(source)
    checkpoint["state_dict"][where] *= float("nan")
    torch.save(checkpoint, tmp_path / "nan.pth")
    assert "differs from the plain one's by a relative nan" in fails(config, tmp_path / "nan.pth")


def test_differing_outputs_raise(tiny_config, detectors, fails, tmp_path):
    _, config, source = detectors["retinanet"]
    error = fails(config, source, "--tolerance", "1e-12")
    assert re.match(
        r"error: the retrofitted detector's (maps|bbox_head) differs from the plain one's by a "
        r"relative \d\.\de-\d+ > tolerance=1\.0e-12; nothing written",
        error,
    )
    # The neck's convolutions get values below 0, which need an input_floor.
    below = tmp_path / "below.py"
    below.write_text(
        f'_base_ = "{detectors["retinanet"][0]}"\n'
        "model = dict(neck=dict(_delete_=True, type='Retrofit', module={{_base_.model.neck}},\n"
        "    edits=[dict(where=r'fpn_convs\\.0', conv=dict(type='RFAConv'))]))\n"
    )
    error = fails(below, source)
    assert error.endswith("inputs below 0, set its input_floor, see RFAConv")


def test_wrong_arguments(tool, tmp_path):
    for arguments in ([], ["config.py", "plain.pth"], ["a", "b", "c", "--tolerance", "small"]):
        code, _, errors = tool(*arguments)
        assert code == 2
        assert "usage: " in errors


# --------------------------------------------------------------------------- the parts of it


def test_the_plain_config_of_nested_and_scoped_retrofits():
    inner = dict(
        type="mmdet.Retrofit",
        module=dict(type="ResNet", depth=18),
        edits=[dict(where="x", conv=dict(type="RFAConv"))],
    )
    outer = dict(type="Retrofit", module=inner, edits=[], strict_start=True, frozen_stages=1)
    cfg = Config(dict(model=dict(type="RetinaNet", backbone=outer)))
    kept = copy.deepcopy(cfg.model)
    expected = dict(type="ResNet", depth=18, frozen_stages=1)
    assert plain_base(cfg).model.backbone == expected
    assert cfg.model == kept
    whole = Config(dict(model=dict(type="mmdet.Retrofit", module=cfg.model, edits=[])))
    assert plain_base(whole).model == dict(type="RetinaNet", backbone=expected)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (dict(type="RFAResNet", rfa=dict(type="RFAConv")), dict(type="RFAResNet")),
        (dict(type="FPN", conv_cfg=dict(type="RFAConv")), dict(type="FPN")),
        (
            dict(type="PluginFPN", plugins=[dict(type="EMA"), dict(type="ContextBlock")]),
            dict(type="PluginFPN", plugins=[dict(type="ContextBlock")]),
        ),
    ],
)
def test_the_plain_config_of_a_retrofitted_module_of_this_package(module, expected):
    part = dict(type="Retrofit", module=module, edits=[dict(where="x", plugin=dict(type="SE"))])
    assert plain_base(Config(dict(model=dict(part=part)))).model.part == expected


@pytest.mark.parametrize(
    "name",
    [
        "detr/detr_r18_8xb2-500e_coco",
        "deformable_detr/deformable-detr_r50_16xb2-50e_coco",
        "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco",
    ],
)
def test_detectors_without_anchors_are_compared(name):
    cfg = get_config(f"mmdet::{name}.py").model
    cfg.backbone.update(depth=18, base_channels=8, init_cfg=None)
    channels = [64] if name.startswith("detr/") else [16, 32, 64]
    cfg.neck.in_channels = [8, 16, 32, 64] if name.startswith("sparse") else channels
    init_default_scope("mmdet")
    net = MODELS.build(cfg)
    net.init_weights()
    other = copy.deepcopy(net)
    image = torch.rand(3, 96, 128) * 255
    found = compare(net, other, image)
    assert set(found.outputs.values()) == {0.0}
    assert len(found.outputs) == 2
    for key, parameter in other.named_parameters():
        if not key.startswith(("backbone", "neck")):
            torch.nn.init.normal_(parameter, std=0.1)
    changed = compare(net, other, image).outputs
    assert changed.pop("maps") == 0
    assert min(changed.values()) > 0


def test_largest_difference_propagates_nan():
    for values in ((0.1, float("nan")), (float("nan"), 0.1)):
        largest = Equality(dict(zip("ab", values, strict=True)), frozenset()).largest
        assert largest != largest
    assert Equality(dict(a=0.1, b=0.2), frozenset()).largest == 0.2
