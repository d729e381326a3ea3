"""MMDetection's APIs give the same results on a retrofitted detector with a plain checkpoint."""

import pickle
import runpy
import sys

import mmcv
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.registry import init_default_scope

from tests.helpers.paths import ROOT
from tests.helpers.retrofitted import RETINANET, save_plain, write_configs

TTA = """
model.update(test_cfg=dict(score_thr=0.3, max_per_img=20))
tta_model = dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5),
                 max_per_img=20))
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="TestTimeAug", transforms=[
        [dict(type="Resize", scale=(s, s), keep_ratio=True) for s in (160, 192)],
        [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)],
        [dict(type="LoadAnnotations", with_bbox=True)],
        [dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape",
              "scale_factor", "flip", "flip_direction"))]])]
"""


@pytest.fixture(scope="module")
def detectors(tiny_config, tmp_path_factory):
    """Return the plain config, the retrofitted one, and the plain checkpoint."""
    folder = tmp_path_factory.mktemp("apis")
    plain, config = write_configs(folder, "retinanet", RETINANET.format(tiny=tiny_config) + TTA)
    return plain, config, save_plain(plain, folder / "plain.pth")


@pytest.fixture
def images(shapes) -> list[str]:
    return sorted(str(path) for path in (shapes / "JPEGImages").iterdir())[:3]


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")


def boxes(found) -> tuple:
    """Return boxes (N, 4), scores (N,) and labels (N,) of a data sample or its dumped dict."""
    get = found["pred_instances"] if isinstance(found, dict) else found.pred_instances
    return tuple(get[key] for key in ("bboxes", "scores", "labels"))


def assert_same(plain: list, retrofitted: list) -> None:
    assert len(plain) == len(retrofitted) > 0
    for a, b in zip(plain, retrofitted, strict=True):
        (boxes_a, scores_a, labels_a), (boxes_b, scores_b, labels_b) = boxes(a), boxes(b)
        # A detector with no detections, or equal ones, would prove nothing.
        assert len(boxes_a) >= 5
        assert len(set(np.round(scores_a.tolist(), 3))) >= 3
        assert torch.equal(labels_a, labels_b)
        torch.testing.assert_close(scores_b, scores_a, rtol=1e-4, atol=1e-5)
        # In pixels.
        torch.testing.assert_close(boxes_b, boxes_a, rtol=1e-4, atol=1e-2)


def test_init_detector_and_inference_detector(detectors, images):
    *configs, checkpoint = detectors
    found = []
    for config in configs:
        model = init_detector(str(config), str(checkpoint), device="cpu")
        assert model.dataset_meta["classes"] == ("circle", "square", "triangle", "star")
        found.append(inference_detector(model, images))
        found[-1] += [inference_detector(model, mmcv.imread(images[0]))]
    assert_same(*found)
    assert type(model.backbone.layer3[0].conv1).__name__ == "RFAConv"


def test_det_inferencer(detectors, images):
    *configs, checkpoint = detectors
    found = []
    for config in configs:
        inferencer = DetInferencer(str(config), str(checkpoint), device="cpu", show_progress=False)
        found.append(inferencer(images, no_save_vis=True, return_datasamples=True)["predictions"])
    assert_same(*found)


@pytest.mark.slow
def test_tools_test_with_and_without_tta(detectors, run_tool, tmp_path):
    *configs, checkpoint = detectors

    def run(config, *more):
        out = tmp_path / "out.pkl"
        done = run_tool(
            *(sys.executable, "tools/test.py", config, checkpoint),
            *("--work-dir", tmp_path, "--out", out, *more),
        )
        assert done.returncode == 0, done.stdout
        assert "coco/bbox_mAP" in done.stdout
        found = pickle.loads(out.read_bytes())
        assert len(found) == 4
        return found

    once = [run(config) for config in configs]
    assert_same(*once)
    augmented = [run(config, "--tta") for config in configs]
    assert_same(*augmented)
    pairs = zip(once[1], augmented[1], strict=True)
    assert not any(torch.equal(boxes(a)[1], boxes(b)[1]) for a, b in pairs)


def test_tta_without_its_config_raises(tiny_config, detectors, shapes, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    argv = ["tools/test.py", str(tiny_config), str(detectors[2]), "--tta"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("tools/test.py", run_name="__main__")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert (
        "error: --tta: the config has no tta_model and no tta_pipeline; for example, add mmdet's"
        in error
    )
