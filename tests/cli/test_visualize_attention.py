"""tools/visualize_attention.py draws one picture per image with the layers' heat."""

import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from rfa_mmdet.cli.visualize_attention import share_of_image
from rfa_mmdet.inference.detector import Detector
from tests.helpers.random_checkpoint import save_random_checkpoint

CBAM = """
plugin = dict(cfg=dict(type="CBAM"), stages=(False, True, True, True), position="after_conv2")
model = dict(backbone=dict(rfa=None, stage_with_rfa=None, plugins=[plugin]))
"""


@pytest.fixture
def images(shapes, tmp_path):
    """Return two images, and a broken one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("val_0000.jpg", "val_0001.jpg"):
        shutil.copy(shapes / "JPEGImages" / name, folder)
    (folder / "cut.jpg").write_bytes((folder / "val_0000.jpg").read_bytes()[:500])
    return folder


def test_heat_maps_and_two_models_side_by_side(
    run_tool, images, shapes, tiny_config, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    other = tmp_path / "cbam.py"
    other.write_text(f'_base_ = "{tiny_config}"\n{CBAM}')
    weights = save_random_checkpoint(other, tmp_path / "cbam.pth")
    out = tmp_path / "out"
    done = run_tool(
        *(sys.executable, "tools/visualize_attention.py", other, weights, images),
        *("--layers", "layer[34]", "--compare", tiny_config, checkpoint, "--out", out),
    )
    assert done.returncode == 0, done.stdout
    assert "skipped 1 of 3 images" in done.stdout
    assert f"warning: skipped {images}/cut.jpg: truncated JPEG" in done.stdout
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    names = ("val_0000", "val_0001")
    assert files == sorted(f"{n}{end}.png" for n in names for end in ("", "_detections"))
    for path in out.iterdir():
        picture = cv2.imread(str(path))
        assert min(picture.shape[:2]) > 200
        assert picture.std() > 10
    assert not np.array_equal(*(cv2.imread(str(out / f"{name}.png")) for name in names))


def test_heat_covers_the_image_without_its_padding(tmp_path):
    init_default_scope("mmdet")
    cfg = get_config("mmdet::yolox/yolox_tiny_8xb8-300e_coco.py")  # pads to a square
    path, checkpoint = str(tmp_path / "wide.png"), str(tmp_path / "a.pth")
    cv2.imwrite(path, np.random.default_rng(0).integers(0, 256, (100, 400, 3), np.uint8))
    torch.save(MODELS.build(cfg.model).state_dict(), checkpoint)
    detector = Detector(cfg, checkpoint, "cpu")
    (sample,) = detector.detect([detector.load(path)])
    assert sample.img_shape == (416, 416)
    assert share_of_image(sample) == (0.25, 1.0)
    # Padded in a batch, after the pipeline.
    padded = dict(ori_shape=(50, 100), img_shape=(100, 201), batch_input_shape=(128, 256))
    found = share_of_image(DetDataSample(metainfo=dict(padded, scale_factor=(2.01, 2.0))))
    assert found == pytest.approx((100 / 128, 201 / 256))


def test_bad_inputs(fails, tiny_config, checkpoint, images, tmp_path):
    def error(*arguments):
        return fails("visualize_attention", *arguments, "--out", tmp_path / "out")

    broken = images / "cut.jpg"
    assert "no such file" in error("configs/none.py", checkpoint, images)
    assert "no such file" in error(tiny_config, tmp_path / "none.pth", images)
    assert "no such file" in error(tiny_config, checkpoint, tmp_path / "none.jpg")
    assert "none of the 1 images can be read" in error(tiny_config, checkpoint, broken)
    found = error(tiny_config, checkpoint, images, "--layers", "stem")
    assert "pattern='stem' matches no layer with attention" in found
    assert "backbone.layer2.0.conv1" in found
    assert not (tmp_path / "out").exists()
