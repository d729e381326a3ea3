"""tools/visualize_attention.py draws one picture per image with the layers' heat."""

import shutil
import sys

import cv2
import numpy as np
import pytest

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
