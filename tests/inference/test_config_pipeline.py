"""The model gets images as the config's own pipeline loads them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from pycocotools.coco import COCO

from rfa_mmdet.analysis.complexity import detector_complexity
from rfa_mmdet.errors import UserError
from rfa_mmdet.export import export_onnx
from rfa_mmdet.inference.detector import Detector, LoadedImage
from rfa_mmdet.inference.images import ImageError
from rfa_mmdet.inference.predict import predict

SIZE = (48, 64)
CLASSES = ("one", "two")
# A thin detector for images with `channels`, loaded with `load`.
CONFIG = """
_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
model = dict(
    data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=False),
    backbone=dict(in_channels={channels}, base_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1),
    test_cfg=dict(score_thr=0.0, max_per_img=20),
)
pipeline = [
    dict(type="LoadImageFromFile", {load}),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_path", "ori_shape", "img_shape", "scale_factor")),
]
metainfo = dict(classes={classes})
data = dict(data_root={root!r}, data_prefix=dict(img=""), ann_file="a.json", metainfo=metainfo)
test_dataloader = dict(dataset=dict(pipeline=pipeline, **data))
train_dataloader = dict(dataset=dict(**data))
"""


def sixteen_bits(rng):
    return rng.integers(0, 2**16, (*SIZE, 3), dtype=np.uint16)


def one_channel(rng):
    return rng.integers(0, 256, SIZE, dtype=np.uint8)


def four_channels(rng):
    return rng.integers(0, 256, (*SIZE, 4), dtype=np.uint8)


KINDS = {
    "four channels": (
        four_channels,
        dict(channels=4, mean=[127.0], std=[60.0], load="color_type='unchanged'"),
    ),
    "16-bit": (
        sixteen_bits,
        dict(channels=3, mean=[3e4] * 3, std=[2e4] * 3, load="color_type='unchanged'"),
    ),
    "16-bit, float": (
        sixteen_bits,
        dict(
            channels=3,
            mean=[3e4] * 3,
            std=[2e4] * 3,
            load="color_type='unchanged', to_float32=True",
        ),
    ),
    "one channel": (
        one_channel,
        dict(channels=1, mean=[127.0], std=[60.0], load="color_type='grayscale'"),
    ),
    "one channel, pillow": (
        one_channel,
        dict(
            channels=1,
            mean=[127.0],
            std=[60.0],
            load="color_type='grayscale', imdecode_backend='pillow'",
        ),
    ),
}
if not hasattr(torch, "uint16"):  # before 2.3 MMDetection's own pipeline needs to_float32
    del KINDS["16-bit"]


@pytest.fixture(params=KINDS)
def case(request, tmp_path):
    """Return the kind, a detector, its config, and five image files."""
    draw, values = KINDS[request.param]
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    paths = [str(root / f"{i}.png") for i in range(5)]
    for path in paths:
        assert cv2.imwrite(path, draw(rng))
    height, width = SIZE
    content = dict(
        images=[
            dict(id=i, file_name=f"{i}.png", height=height, width=width) for i in range(len(paths))
        ],
        annotations=[],
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)],
    )
    (root / "a.json").write_text(json.dumps(content))
    cfg = Config.fromstring(CONFIG.format(classes=CLASSES, root=str(root), **values), ".py")
    init_default_scope("mmdet")
    torch.manual_seed(0)
    detector = Detector(cfg, save(cfg, tmp_path / "a.pth"), "cpu")
    return request.param, detector, cfg, paths


def save(cfg, path):
    model = MODELS.build(cfg.model)
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.1)
    meta = dict(dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def test_model_input_matches_the_dataset(case, monkeypatch, tmp_path):
    kind, detector, cfg, paths = case
    # Built like a Runner does: the detector has put its own loader into this config.
    pipeline = list(cfg.pipeline)
    pipeline[0] = {**pipeline[0], "type": "LoadImageFromFile"}
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, "pipeline": pipeline})
    seen = []
    step = detector.model.test_step
    monkeypatch.setattr(
        detector.model, "test_step", lambda data: (seen.extend(data["inputs"]), step(data))[1]
    )
    found = predict(detector, paths, tmp_path / "out", batch_size=2)
    assert not found.skipped
    assert not found.undrawn
    assert len(seen) == len(dataset) == len(paths)
    for inputs, item in zip(seen, dataset, strict=True):
        assert inputs.dtype == item["inputs"].dtype
        assert torch.equal(inputs, item["inputs"])
    # It is not an 8-bit image with three channels.
    assert seen[0].shape[0] == KINDS[kind][1]["channels"]
    if "16" in kind:
        assert max(int(one.float().max()) for one in seen) > 255
    # The detections match those of the dataset's items, and the pictures can be read.
    for number, item in enumerate(dataset, 1):
        with torch.no_grad():
            batch = dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]])
            (theirs,) = step(batch)
        ours = [a["score"] for a in found.coco["annotations"] if a["image_id"] == number]
        assert len(ours) == len(theirs.pred_instances) > 0
        assert np.allclose(sorted(ours), sorted(theirs.pred_instances.scores.tolist()), atol=1e-4)
    sizes = {(image["height"], image["width"]) for image in found.coco["images"]}
    assert sizes == {SIZE}
    for path in (tmp_path / "out" / "pictures").iterdir():
        picture = cv2.imread(str(path))
        assert picture.shape == (*SIZE, 3)
        assert picture.max() > 200
        assert picture.std() > 20


def test_broken_files_do_not_affect_other_results(case, tmp_path):
    _, detector, _, paths = case
    whole = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(whole[: len(whole) // 2])
    Path(paths[3]).write_text("no image")
    found = predict(detector, paths, tmp_path / "out", batch_size=2)
    assert list(found.skipped) == [paths[1], paths[3]]
    assert found.skipped[paths[1]].startswith("truncated PNG")
    assert found.skipped[paths[3]].startswith("not decodable")
    assert [image["file_name"] for image in found.coco["images"]] == [paths[i] for i in (0, 2, 4)]
    COCO(str(tmp_path / "out" / "predictions.json")).loadRes(found.coco["annotations"])
    with pytest.raises(UserError, match=r"none of the 2 images can be read, e\.g\. .*1\.png"):
        predict(detector, [paths[1], paths[3]], tmp_path / "none")


def test_export_compares_on_such_images(case, tmp_path):
    kind, detector, _, paths = case
    Path(paths[0]).write_text("no image")
    files, found = export_onnx(detector, paths, tmp_path / "a.onnx")
    assert [path.name for path, _ in files] == ["a.onnx"]
    assert list(found.skipped) == [paths[0]]
    assert found.images == len(paths) - 1
    assert found.detections > 0
    channels = KINDS[kind][1]["channels"]
    assert all(f"x {channels} x" in name for name in found.raw)


def test_complexity_uses_the_models_channels(case):
    kind, detector, cfg, _ = case
    found = detector_complexity(cfg, SIZE)
    assert found.parameters == sum(p.numel() for p in detector.model.parameters())
    assert cfg.model.backbone.in_channels == KINDS[kind][1]["channels"]
    cfg.model.backbone.in_channels += 1
    assert detector_complexity(cfg, SIZE).flops - found.flops == 7 * 7 * 8 * 32 * 32


def test_invalid_image_gives_the_reason(case, tmp_path):
    _, detector, _, _ = case
    for content, reason in (
        (b"", "empty"),
        (b"<html>", "a web page, not an image"),
        (b"GIF89a", "not decodable"),
    ):
        path = tmp_path / "a.bmp"
        path.write_bytes(content)
        with pytest.raises(ImageError, match=reason):
            detector.load(str(path))
    with pytest.raises(ImageError, match=r"^missing$"):
        detector.load(str(tmp_path / "none.png"))


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((2, 2), 7, np.uint8), 7),
        (np.full((2, 2, 1), 7, np.uint8), 7),
        (np.full((2, 2, 4), 7, np.uint8), 7),
        (np.full((2, 2, 3), 7.4, np.float32), 7),
        (np.full((2, 2, 3), 2**16 - 1, np.uint16), 255),
        (np.full((2, 2, 3), -5.0, np.float32), 0),
        (np.full((2, 2), 1.0, np.float32), 255),
        (np.full((2, 2, 3), np.nan, np.float32), 0),
    ],
)
def test_pictures_are_eight_bits_and_three_channels(pixels, expected):
    picture = LoadedImage("a.png", pixels, {}).picture
    assert picture.dtype == np.uint8
    assert picture.shape == (2, 2, 3)
    assert (picture == expected).all()


def test_sixteen_bit_picture_uses_all_greys():
    pixels = np.linspace(7000, 9000, 10_000, dtype=np.uint16).reshape(100, 100)
    pixels[50, 50] = 2**16 - 1  # a broken pixel
    picture = LoadedImage("a.png", pixels, {}).picture
    assert picture.min() == 0
    assert picture.max() == 255
    assert 120 < np.median(picture) < 135
