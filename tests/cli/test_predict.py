"""tools/predict.py: the same detections as mmdet, broken images skipped, no partial files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from pycocotools.coco import COCO
from scipy.optimize import linear_sum_assignment

from rfa_mmdet.data.shapes import CLASSES
from rfa_mmdet.errors import UserError
from rfa_mmdet.inference.images import find_images
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE, wait_until


@pytest.fixture
def images(shapes, tmp_path):
    """Return the validation images, one of them in a subfolder with the name of another."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for path in sorted(shapes.glob("JPEGImages/val_*.jpg")):
        shutil.copy(path, folder)
    (folder / "val_0003.jpg").rename(folder / "more" / "val_0000.jpg")
    return folder


def test_detections_match_mmdet_and_broken_images_are_skipped(
    run_tool, images, shapes, tiny_config, checkpoint, tmp_path, monkeypatch
):
    whole = (images / "val_0001.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "text.png").write_text("no image")
    out = tmp_path / "out"
    done = run_tool(
        *(sys.executable, "-W", "ignore", "tools/predict.py", tiny_config, checkpoint, images),
        *("--out", out, "--score", "0.94", "--batch-size", "3"),
    )
    assert done.returncode == 0, done.stdout
    assert "skipped 2 of 6 images" in done.stdout
    assert f"warning: skipped {images}/cut.jpg: truncated JPEG" in done.stdout
    assert f"warning: skipped {images}/text.png: not decodable" in done.stdout
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    pictures = ("more/val_0000", "val_0000", "val_0001", "val_0002")
    assert files == [*(f"pictures/{name}.jpg" for name in pictures), "predictions.json"]
    printed = done.stdout

    # Detections of mmdet's own function on the same files.
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    model = init_detector(str(tiny_config), str(checkpoint), device="cpu")
    content = json.loads((out / "predictions.json").read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    assert len(names) == 4
    boxes = 0
    for number, path in names.items():
        theirs = inference_detector(model, path).pred_instances
        ours = [a for a in content["annotations"] if a["image_id"] == number]
        corners = torch.tensor([a["bbox"] for a in ours])
        corners[:, 2:] += corners[:, :2]
        scores = torch.tensor([a["score"] for a in ours])
        labels = torch.tensor([a["category_id"] - 1 for a in ours])
        # Unordered: rounding, which depends on the batch, sorts equal scores.
        apart = (corners[:, None] - theirs.bboxes[None]).abs().amax(2)
        apart += (scores[:, None] - theirs.scores[None]).abs() * 10
        apart += (labels[:, None] != theirs.labels[None]) * 100
        pairs = linear_sum_assignment(apart)
        assert len(ours) == len(theirs.labels) == len(pairs[0])
        assert apart[pairs].max() < 2e-3
        boxes += len(ours)
    assert boxes > 40
    assert [c["name"] for c in content["categories"]] == list(CLASSES)

    # The file is in COCO format, and the tool's table matches it.
    coco = COCO(str(out / "predictions.json"))
    coco.loadRes(content["annotations"])
    sure = sum(a["score"] >= 0.94 for a in content["annotations"])
    assert 0 < sure < boxes
    row = next(line for line in printed.splitlines() if line.startswith("│ all "))
    assert row.split()[3:6:2] == [str(boxes), str(sure)]

    # The pictures are the images with detections drawn on them.
    picture = cv2.imread(str(out / "pictures" / "val_0000.jpg")).astype(int)
    image = cv2.imread(str(images / "val_0000.jpg")).astype(int)
    assert picture.shape == image.shape
    changed = (np.abs(picture - image).max(2) > 60).mean()
    assert 0.01 < changed < 0.9


@pytest.mark.slow
def test_interrupted_run_leaves_no_json(images, environment, tiny_config, checkpoint, tmp_path):
    # More than can be processed in time.
    for i in range(5000):
        os.link(images / "val_0000.jpg", images / f"copy_{i:04}.jpg")
    out = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "tools/predict.py", tiny_config, checkpoint, images]
    process = subprocess.Popen(
        [*map(str, command), "--out", str(out)],
        cwd=ROOT,
        env=environment,
        # A shell's background commands, such as these tests may be one of, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(list(out.glob("pictures/*.jpg"))) >= 3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=PATIENCE) != 0
    finally:
        process.kill()
    assert not (out / "predictions.json").exists()
    pictures = [path for path in out.rglob("*") if path.is_file()]
    assert 3 <= len(pictures) < 5000
    for path in pictures:
        assert path.name.startswith(("copy_", "val_"))
        assert cv2.imread(str(path)).shape == (64, 64, 3)


def test_folders_behind_links(images, tmp_path):
    folder = tmp_path / "linked"
    folder.mkdir()
    for name in ("a", "b"):  # one folder twice
        (folder / name).symlink_to(images / "more", target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert find_images([str(folder)]) == [str(folder / "a" / "val_0000.jpg")]


def test_inputs_are_files_folders_and_patterns(images):
    flat = sorted(str(path) for path in images.glob("*.jpg"))
    deep = str(images / "more" / "val_0000.jpg")
    assert find_images([str(images)]) == sorted([*flat, deep])
    assert find_images([f"{images}/val_*.jpg"]) == flat
    assert find_images([f"{images}/**/*.jpg"]) == sorted([*flat, deep])
    (images / "more" / "a.JFIF").write_bytes((images / "val_0000.jpg").read_bytes())
    assert find_images([f"{images}/more"]) == [str(images / "more" / "a.JFIF"), deep]
    (images / "more" / "a.JFIF").unlink()
    assert find_images([deep, f"{images}/more", str(images)]) == [deep, *flat]
    assert find_images([str(images)], without=images / "more") == flat
    where = re.escape(f"{str(images)!r}, where results are written; choose another --out")
    with pytest.raises(UserError, match=f"input '.*': all images are in {where}"):
        find_images([str(images)], without=images)
    with pytest.raises(UserError, match=f"input {deep!r}: is in {where}"):
        find_images([str(images / "more"), deep], without=images)


def test_bad_inputs(fails, tiny_config, checkpoint, tmp_path):
    def error(*arguments):
        return fails("predict", *arguments, "--out", tmp_path / "out")

    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").write_text("no image")
    image = tmp_path / "a.jpg"
    assert "no such file" in error("configs/none.py", checkpoint, image)
    assert "no such file" in error(tiny_config, tmp_path / "none.pth", image)
    assert "no such file" in error(tiny_config, checkpoint, tmp_path / "none.jpg")
    assert "contains no images" in error(tiny_config, checkpoint, tmp_path / "empty")
    assert "no file matches" in error(tiny_config, checkpoint, tmp_path / "*.gif")
    assert "none of the 1 images can be read" in error(tiny_config, checkpoint, image)
    for device, message in (("gpu", "not a device"), ("cuda:99", "PyTorch finds")):
        assert message in error(tiny_config, checkpoint, image, "--device", device)
    assert not list(tmp_path.glob("out/**/*.*"))


def test_checkpoint_of_another_model(fails, tiny_config, checkpoint, shapes, tmp_path):
    image = next(shapes.glob("JPEGImages/*.jpg"))
    options = ("--out", tmp_path, "--cfg-options")
    message = fails(
        "predict", tiny_config, checkpoint, image, *options, "model.bbox_head.num_classes=9"
    )
    assert "does not fit the config's model: size mismatch for bbox_head.retina_cls" in message
    message = fails("predict", tiny_config, checkpoint, image, *options, "model.backbone.depth=34")
    assert "parameters are missing in the checkpoint, e.g. backbone.layer" in message
    torch.save(dict(state_dict={}), tmp_path / "empty.pth")
    message = fails("predict", tiny_config, tmp_path / "empty.pth", image, "--out", tmp_path)
    assert "empty.pth' contains no model weights" in message
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:-1000])
    message = fails("predict", tiny_config, tmp_path / "cut.pth", image, "--out", tmp_path)
    assert "cut.pth" in message
