"""tools/export_onnx.py: detectors of every kind, run by ONNX Runtime at other sizes."""

import json
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from rfa_mmdet.engine import export_onnx as engine
from rfa_mmdet.engine.errors import UserError
from rfa_mmdet.engine.predict import Detector
from rfa_mmdet.engine.shapes import CLASSES
from tests.tools.conftest import save_random_checkpoint

RESNET = """
model = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    {heads}
)
"""
DENSE = "bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1),"
# 32 groups of one channel would have nothing to normalise in a map of one pixel.
GROUPS = DENSE.replace("feat_channels=32", "feat_channels=64")
TWO_STAGE = """
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64),
    ),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0)),
"""
RFA = """
model.update(backbone=dict(type="RFAResNet", rfa=dict(type="RFAConv"), **model["backbone"]))
custom_imports = dict(imports=["rfa_mmdet"])
"""
YOLO = "model = dict(backbone=dict(widen_factor={w}, deepen_factor=0.167), neck={n}, bbox_head={h})"
# Thin detectors over mmdet's own configs, and how many graphs each becomes.
DETECTORS = {
    "retinanet/retinanet_r50_fpn_1x_coco": (RESNET.format(heads=DENSE) + RFA, 1),
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco": (RESNET.format(heads=TWO_STAGE) + RFA, 2),
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco": (RESNET.format(heads=GROUPS), 1),
    "atss/atss_r50_fpn_1x_coco": (RESNET.format(heads=GROUPS), 1),
    "rtmdet/rtmdet_s_8xb32-300e_coco": (
        YOLO.format(
            w=0.125,
            n="dict(in_channels=[32, 64, 128], out_channels=32)",
            h="dict(in_channels=32, feat_channels=32)",
        ),
        1,
    ),
    "yolox/yolox_s_8xb8-300e_coco": (
        YOLO.format(
            w=0.125,
            n="dict(in_channels=[32, 64, 128], out_channels=32)",
            h="dict(in_channels=32, feat_channels=32)",
        ),
        1,
    ),
}
RETINANET = next(iter(DETECTORS))


@pytest.fixture
def image(shapes):
    return str(sorted(shapes.glob("JPEGImages/val_*.jpg"))[0])


def make(name, text, folder):
    """Write the config and a checkpoint of a thin detector; return the detector."""
    config = folder / "thin.py"
    config.write_text(f'_base_ = "mmdet::{name}.py"\n{text}')
    # Scores that do not reach 1: of equal ones, rounding chooses which are kept.
    checkpoint = save_random_checkpoint(config, folder / "thin.pth", std=0.03)
    cfg = Config.fromfile(config)
    for transform in cfg.test_dataloader.dataset.pipeline:
        if transform.type == "Resize":
            transform.scale = (128, 128)
        if transform.type == "Pad" and "size" in transform:
            transform.size = (128, 128)
    init_default_scope("mmdet")
    return Detector(cfg, str(checkpoint), "cpu")


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(name, image, tmp_path):
    text, graphs = DETECTORS[name]
    detector = make(name, text, tmp_path)
    files, found = engine.export_onnx(detector, [image], tmp_path / "out" / "thin.onnx")
    assert len(files) == graphs
    assert sorted((tmp_path / "out").iterdir()) == sorted(path for path, _ in files)
    assert found.detections >= 20
    assert found.unmatched == 0
    # float32, through exp in the box coders of boxes of 100 pixels
    assert found.box < 0.02
    assert found.score < 1e-4
    assert len(found.raw) == 2 * graphs
    assert max(found.raw.values()) < 1e-3
    # Its network is PyTorch's again.
    assert "extract_feat" not in vars(detector.model)


def test_tool(run_tool, tiny_config, checkpoint, shapes, tmp_path):
    out, folder = tmp_path / "tiny.onnx", tmp_path / "images"
    folder.mkdir()
    for path in sorted(shapes.glob("JPEGImages/val_*.jpg"))[:3]:
        shutil.copy(path, folder)
    (folder / "text.png").write_text("no image")
    done = run_tool(
        *(sys.executable, "-W", "ignore", "tools/export_onnx.py", tiny_config, checkpoint),
        *("--out", out, "--images", folder),
    )
    assert done.returncode == 0, done.stdout
    assert f"warning: skipped {folder}/text.png: not decodable" in done.stdout
    assert "skipped 1 of 4 images" in done.stdout
    assert sorted(tmp_path.iterdir()) == [folder, out]
    rows = {r[0]: r[1] for line in done.stdout.splitlines() if len(r := line[2:].split(" │ ")) == 2}
    boxes = next(value for name, value in rows.items() if "detections on 3 images" in name)
    assert float(boxes.split()[0]) < 0.01
    # What a stranger would need to run the file is in it; and it runs on any batch and size.
    facts = {p.key: p.value for p in onnx.load(str(out)).metadata_props}
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert json.loads(facts["mean"]) == [123.675, 116.28, 103.53]
    assert facts["channels"] == "RGB"
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 64, 64), (3, 3, 96, 256)):
        outputs = session.run(None, {"images": np.zeros(shape, np.float32)})
        assert outputs[0].shape == (shape[0], 9 * 4, shape[2] // 8, shape[3] // 8)
    names = [output.name for output in session.get_outputs()]
    assert names[0] == "cls_scores_0"
    assert names[-1] == "bbox_preds_4"


def test_graph_that_computes_something_else_is_not_written(image, tmp_path, monkeypatch):
    detector = make(RETINANET, DETECTORS[RETINANET][0], tmp_path)
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda *args: [1.1 * t for t in run(*args)])
    out = tmp_path / "out" / "thin.onnx"
    with pytest.raises(UserError, match="computes something else than PyTorch"):
        engine.export_onnx(detector, [image], out)
    assert not list(out.parent.iterdir())


def test_graph_of_a_fixed_size_is_not_written(image, tmp_path, monkeypatch):
    detector = make(RETINANET, DETECTORS[RETINANET][0], tmp_path)
    stem = detector.model.backbone.conv1
    whole = stem.forward
    stem.forward = lambda x: whole(x) + torch.zeros([int(side) for side in whole(x).shape])
    with pytest.raises(UserError, match="cannot run the graph on images 2 x 3"):
        engine.export_onnx(detector, [image], tmp_path / "out" / "thin.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_bad_inputs(fails, tiny_config, checkpoint, image, tmp_path):
    def error(*arguments, config=tiny_config, weights=checkpoint):
        return fails("export_onnx", config, weights, "--out", tmp_path / "a.onnx", *arguments)

    assert "no such file" in error(config="configs/none.py")
    assert "no such file" in error(weights=tmp_path / "none.pth")
    assert "no such file" in error("--images", tmp_path / "none.jpg")
    assert "must end in .onnx" in error("--out", tmp_path / "a.pb")
    data = "test_dataloader.dataset.ann_file=none.json"
    assert "its test data cannot be read" in error("--cfg-options", data)
    model = "model.bbox_head.num_classes=9"
    assert "of another model" in error("--images", image, "--cfg-options", model)
    assert "opset 3" in error("--images", image, "--opset", "3")
    assert not list(tmp_path.glob("**/*.onnx"))


@pytest.mark.parametrize(
    "name", ["mask_rcnn/mask-rcnn_r50_fpn_1x_coco", "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco"]
)
def test_detectors_that_are_not_supported(name):
    cfg = get_config(f"mmdet::{name}.py")
    init_default_scope("mmdet")
    with torch.device("meta"):
        detector = MODELS.build(cfg.model)
    with pytest.raises(UserError, match=f"model.type='{type(detector).__name__}': only single"):
        engine.parts(detector)


def sample(boxes, scores, labels):
    boxes, scores = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4), torch.tensor(scores)
    instances = InstanceData(bboxes=boxes, scores=scores, labels=torch.tensor(labels))
    return DetDataSample(pred_instances=instances)


def test_comparison_counts_what_only_one_has():
    boxes = [[0, 0, 50, 50], [50, 50, 99, 99]]
    found = engine.Comparison()
    theirs, ours = sample(boxes, [0.9, 0.5], [0, 1]), sample(boxes, [0.9, 0.5], [0, 0])
    engine._compare(found, theirs, ours)
    assert (found.detections, found.unmatched, found.box) == (2, 2, 0)
    assert not found.agrees


@given(st.permutations(range(6)), st.floats(0, 0.4), st.floats(0, 0.009))
def test_comparison_does_not_mind_the_order(order, shift, less):
    boxes = [[60.0 * i, 0, 60 * i + 50, 50] for i in range(6)]
    scores = [0.9 - 0.1 * i for i in range(6)]
    moved = [[x + shift, y, x2 + shift, y2] for x, y, x2, y2 in boxes]
    ours = sample([moved[i] for i in order], [scores[i] - less for i in order], list(order))
    found = engine.Comparison()
    engine._compare(found, sample(boxes, scores, list(range(6))), ours)
    assert found.unmatched == 0
    assert found.box == pytest.approx(shift, abs=1e-4)
    assert found.score == pytest.approx(less, abs=1e-6)
    assert found.agrees
