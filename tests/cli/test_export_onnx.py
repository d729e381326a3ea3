"""tools/export_onnx.py with all kinds of detectors, run by ONNX Runtime at other sizes."""

import json
import re
import shutil
import sys

import cv2
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

from rfa_mmdet import export as engine
from rfa_mmdet.data.shapes import CLASSES
from rfa_mmdet.errors import UserError
from rfa_mmdet.export.comparison import Comparison
from rfa_mmdet.export.graph import Graph
from rfa_mmdet.export.parts import RegionPart
from rfa_mmdet.inference.detector import Detector
from tests.helpers.random_checkpoint import save_random_checkpoint

RESNET = """
model = dict(
    backbone=dict(depth=18, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    {heads}
)
"""
DENSE = "bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1),"
# 32 groups of one channel have nothing to normalise in a map of one pixel.
GROUPS = DENSE.replace("feat_channels=32", "feat_channels=64")
TWO_STAGE = """
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=64),
    ),
    test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0)),
"""
MASKS = """
        mask_roi_extractor=dict(out_channels=32),
        mask_head=dict(num_convs=1, in_channels=32, conv_out_channels=32),
"""
MASK_RCNN = TWO_STAGE.replace("roi_head=dict(", f"roi_head=dict({MASKS}")
# A list in a config replaces the base's list.
CASCADE = TWO_STAGE.replace(
    "bbox_head=dict(in_channels=32, fc_out_channels=64)",
    """bbox_head=[
            dict(head, in_channels=32, fc_out_channels=64)
            for head in _base_.model.roi_head.bbox_head
        ]""",
)
RFA = """
model.update(backbone=dict(type="RFAResNet", rfa=dict(type="RFAConv"), **model["backbone"]))
custom_imports = dict(imports=["rfa_mmdet"])
"""
YOLO = "model = dict(backbone=dict(widen_factor={w}, deepen_factor=0.167), neck={n}, bbox_head={h})"
# Thin detectors on top of mmdet's configs, and the names of their graphs.
ONE, TWO = ("",), ("", ".roi")
THREE = ("", ".roi_0", ".roi_1", ".roi_2")
DETECTORS = {
    "retinanet/retinanet_r50_fpn_1x_coco": (RESNET.format(heads=DENSE) + RFA, ONE),
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco": (RESNET.format(heads=TWO_STAGE) + RFA, TWO),
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco": (RESNET.format(heads=MASK_RCNN), (*TWO, ".mask")),
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco": (RESNET.format(heads=CASCADE), THREE),
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco": (
        RESNET.format(heads=CASCADE.replace("roi_head=dict(", f"roi_head=dict({MASKS}")),
        (*THREE, ".mask_0", ".mask_1", ".mask_2"),
    ),
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco": (RESNET.format(heads=GROUPS), ONE),
    "atss/atss_r50_fpn_1x_coco": (RESNET.format(heads=GROUPS), ONE),
    "rtmdet/rtmdet_s_8xb32-300e_coco": (
        YOLO.format(
            w=0.125,
            n="dict(in_channels=[32, 64, 128], out_channels=32)",
            h="dict(in_channels=32, feat_channels=32)",
        ),
        ONE,
    ),
    "yolox/yolox_s_8xb8-300e_coco": (
        YOLO.format(
            w=0.125,
            n="dict(in_channels=[32, 64, 128], out_channels=32)",
            h="dict(in_channels=32, feat_channels=32)",
        ),
        ONE,
    ),
}
RETINANET, MASKED = "retinanet/retinanet_r50_fpn_1x_coco", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco"


@pytest.fixture
def image(tmp_path):
    """Return an image of noise: equal cells would have equal scores, whose order is rounding's."""
    path = tmp_path / "noise.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    return str(path)


def make(name, text, folder):
    """Write the config and a checkpoint of a thin detector; return the detector."""
    config = folder / "thin.py"
    config.write_text(f'_base_ = "mmdet::{name}.py"\n{text}')
    # Scores below 1: with equal scores, rounding decides which are kept.
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
    text, suffixes = DETECTORS[name]
    detector = make(name, text, tmp_path)
    files, found = engine.export_onnx(detector, [image], tmp_path / "out" / "thin.onnx")
    assert [path.name for path, _ in files] == [f"thin{suffix}.onnx" for suffix in suffixes]
    assert sorted((tmp_path / "out").iterdir()) == sorted(path for path, _ in files)
    assert found.detections >= 20
    assert found.unmatched == 0
    # float32, through exp in the box coders, for boxes of 100 pixels
    assert found.box < 0.02
    assert found.score < 1e-4
    assert found.masks == (found.detections if "mask" in name else 0)
    assert found.mask < 1e-3
    assert (found.mask_pixels > 0) == ("mask" in name)
    assert len(found.raw) == 2 * len(suffixes)
    assert max(found.raw.values()) < 1e-3
    # The network is PyTorch's again.
    methods = {"extract_feat", "forward"}
    assert not any(methods & set(vars(module)) for module in detector.model.modules())


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
    # The file has all metadata needed to run it, and runs with any batch and image size.
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


@pytest.mark.slow
def test_tool_lists_every_graph_and_compares_masks(run_tool, image, tmp_path):
    config, checkpoint = tmp_path / "thin.py", tmp_path / "thin.pth"
    config.write_text(f'_base_ = "mmdet::{MASKED}.py"\n{DETECTORS[MASKED][0]}')
    save_random_checkpoint(config, checkpoint, std=0.03)
    pipeline = "test_dataloader.dataset.pipeline.1.scale=(128,128)"
    done = run_tool(
        *(sys.executable, "-W", "ignore", "tools/export_onnx.py", config, checkpoint),
        *("--images", image, "--out", tmp_path / "a.onnx", "--cfg-options", pipeline),
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"their masks +│ (0|\S+e-\d+|0\.00\d+) of the masks' pixels", done.stdout)
    for name, what in (("a", "backbone"), ("a.roi", "box head"), ("a.mask", "mask head")):
        assert f"wrote: {tmp_path}/{name}.onnx ({what}" in done.stdout
        assert (tmp_path / f"{name}.onnx").exists()
    regions = onnx.load(str(tmp_path / "a.mask.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in regions] == ["regions", 32, 14, 14]


@pytest.mark.slow
def test_tool_warns_without_detections(run_tool, tiny_config, checkpoint, tmp_path):
    done = run_tool(
        *(sys.executable, "-W", "ignore", "tools/export_onnx.py", tiny_config, checkpoint),
        *("--out", tmp_path / "a.onnx", "--number", 1),
        *("--cfg-options", "model.test_cfg.score_thr=1.1"),
    )
    assert done.returncode == 0, done.stdout
    assert "boxes of 0 detections on 1 images" in done.stdout
    assert "warning: no detections on these images" in done.stdout


def test_wrong_graph_is_not_written(image, tmp_path, monkeypatch):
    detector = make(RETINANET, DETECTORS[RETINANET][0], tmp_path)
    run = Graph.run
    monkeypatch.setattr(Graph, "run", lambda *args: [1.1 * t for t in run(*args)])
    out = tmp_path / "out" / "thin.onnx"
    with pytest.raises(UserError, match="differ from those of PyTorch"):
        engine.export_onnx(detector, [image], out)
    assert not list(out.parent.iterdir())


def test_wrong_masks_are_not_written(image, tmp_path, monkeypatch):
    detector = make(MASKED, DETECTORS[MASKED][0], tmp_path)
    run = Graph.run

    def other_masks(graph, inputs):
        return [t.flip(-1) if graph.part.suffix == ".mask" else t for t in run(graph, inputs)]

    monkeypatch.setattr(Graph, "run", other_masks)
    # Boxes, scores and raw outputs do not show it.
    monkeypatch.setattr(Comparison, "add_raw", lambda *_: None)
    with pytest.raises(
        UserError, match=r"scores by \S+e-\d+, masks in 0\.\d+ of their pixels, 0 of"
    ):
        engine.export_onnx(detector, [image], tmp_path / "out" / "thin.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_wrong_order_of_stages_is_not_written(image, tmp_path, monkeypatch):
    name = "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco"
    detector = make(name, DETECTORS[name][0], tmp_path)
    stand_ins = RegionPart.stand_ins
    heads = detector.model.roi_head.bbox_head
    after = {head: heads[(stage + 1) % 3] for stage, head in enumerate(heads)}

    def shifted(part, run):
        return [(after[head], *rest) for head, *rest in stand_ins(part, run)]

    monkeypatch.setattr(RegionPart, "stand_ins", shifted)
    with pytest.raises(UserError, match="differ from those of PyTorch"):
        engine.export_onnx(detector, [image], tmp_path / "out" / "thin.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_graph_with_a_fixed_size_is_not_written(image, tmp_path, monkeypatch):
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
    assert "cannot read its test data" in error("--cfg-options", data)
    model = "model.bbox_head.num_classes=9"
    assert "does not fit the config's model" in error("--images", image, "--cfg-options", model)
    assert "opset 3" in error("--images", image, "--opset", "3")
    assert not list(tmp_path.glob("**/*.onnx"))


@pytest.mark.parametrize(
    "name",
    [
        "fast_rcnn/fast-rcnn_r50_fpn_1x_coco",
        "mask_rcnn/mask-rcnn_r50-caffe-c4_1x_coco",
        "ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco",
        "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco",
        "double_heads/dh-faster-rcnn_r50_fpn_1x_coco",
        "sabl/sabl-faster-rcnn_r50_fpn_1x_coco",
        "guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco",
        "htc/htc-without-semantic_r50_fpn_1x_coco",
        "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco",
        "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco",
        "centernet/centernet_r18_8xb16-crop512-140e_coco",
        "detr/detr_r50_8xb2-150e_coco",
    ],
)
def test_unsupported_detectors(name):
    cfg = get_config(f"mmdet::{name}.py")
    init_default_scope("mmdet")
    with torch.device("meta"):
        detector = MODELS.build(cfg.model)
        images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(UserError, match=f"model.type='{type(detector).__name__}': not supported"):
        engine.parts(detector.eval(), images)


def test_operators_of_mmcv_are_reported(image, tmp_path):
    text, _ = DETECTORS[RETINANET]
    dcn = 'model["neck"]["conv_cfg"] = dict(type="DCNv2")'
    detector = make(RETINANET, text + dcn, tmp_path)
    with pytest.raises(UserError, match=r"ONNX Runtime cannot load the model: .*Operators of mmcv"):
        engine.export_onnx(detector, [image], tmp_path / "thin.onnx")


def test_second_size_is_a_multiple_of_what_the_model_pads_to(image, tmp_path):
    text, _ = DETECTORS[RETINANET]
    more = 'model["data_preprocessor"] = dict(pad_size_divisor=48)'
    detector = make(RETINANET, text + more, tmp_path)
    (part,) = engine.parts(detector.model, torch.zeros(1, 3, 96, 192))
    assert part.other_shape == (2, 3, 192, 384)


def test_map_shared_by_all_levels_is_not_supported(image, tmp_path):
    text, _ = DETECTORS["rtmdet/rtmdet_s_8xb32-300e_coco"]
    detector = make("rtmdet/rtmdet-ins_s_8xb32-300e_coco", text, tmp_path)
    with pytest.raises(UserError, match=r"model\.type='RTMDet': not supported"):
        engine.export_onnx(detector, [image], tmp_path / "out" / "thin.onnx")
    assert not (tmp_path / "out").exists()


def sample(boxes, scores, labels, masks=None):
    boxes, scores = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4), torch.tensor(scores)
    instances = InstanceData(bboxes=boxes, scores=scores, labels=torch.tensor(labels))
    if masks is not None:
        instances.masks = masks
    return DetDataSample(pred_instances=instances)


def test_comparison_counts_unmatched_detections():
    boxes = [[0, 0, 50, 50], [50, 50, 99, 99]]
    found = Comparison()
    theirs, ours = sample(boxes, [0.9, 0.5], [0, 1]), sample(boxes, [0.9, 0.5], [0, 0])
    found.add_image(theirs, ours)
    assert (found.detections, found.unmatched, found.box) == (2, 2, 0)
    assert not found.agrees


def test_comparison_detects_nan():
    found = Comparison()
    found.add_image(sample([[0, 0, 50, 50]], [0.9], [0]), sample([[0, 0, 50, 50]], [np.nan], [0]))
    found.add_image(sample([[0, 0, 50, 50]], [0.9], [0]), sample([[0, 0, 50, 50]], [0.9], [0]))
    assert not found.agrees
    assert "scores by nan" in str(found)
    for raw in ([0.0, np.nan], [np.nan, 0.0]):
        assert not Comparison(raw=dict(enumerate(raw))).agrees


@given(st.permutations(range(6)), st.floats(0, 0.4), st.floats(0, 0.009))
def test_comparison_ignores_the_order(order, shift, less):
    boxes = [[60.0 * i, 0, 60 * i + 50, 50] for i in range(6)]
    scores = [0.9 - 0.1 * i for i in range(6)]
    moved = [[x + shift, y, x2 + shift, y2] for x, y, x2, y2 in boxes]
    ours = sample([moved[i] for i in order], [scores[i] - less for i in order], list(order))
    found = Comparison()
    found.add_image(sample(boxes, scores, list(range(6))), ours)
    assert found.unmatched == 0
    assert found.box == pytest.approx(shift, abs=1e-4)
    assert found.score == pytest.approx(less, abs=1e-6)
    assert found.agrees


def square(left, width=100):
    mask = torch.zeros(200, 300, dtype=torch.bool)
    mask[50:150, left : left + width] = True
    return mask


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_comparison_of_masks(order):
    boxes, scores = [[0, 50, 100, 150], [150, 50, 250, 150]], [0.9, 0.5]
    masks = torch.stack([square(0), square(150)])
    other = torch.stack([square(0), square(150, 98)])
    found = Comparison()
    found.add_image(
        sample(boxes, scores, [0, 1], masks),
        sample([boxes[i] for i in order], [scores[i] for i in order], order, other[order]),
    )
    assert (found.masks, found.mask_pixels, found.other_pixels) == (2, 20000, 200)
    assert found.mask == pytest.approx(0.01)
    assert found.agrees
    found.add_image(sample(boxes, scores, [0, 1], masks), sample(boxes, scores, [0, 1], ~masks))
    assert not found.agrees
    assert (found.box, found.score, found.unmatched) == (0, 0, 0)


def test_comparison_of_masks_of_probabilities():
    box = [[0, 50, 100, 150]]
    mask = square(0).to(torch.uint8)[None]
    found = Comparison()
    found.add_image(sample(box, [0.9], [0], 200 * mask), sample(box, [0.9], [0], 199 * mask))
    assert found.mask == pytest.approx(1 / 200)
