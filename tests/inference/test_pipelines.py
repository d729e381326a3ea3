"""Detections of a file match those of a test, for any loader at any place of the config."""

import copy
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from rfa_mmdet.cli.test import augment
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.inference.detector import Detector, build_detector
from rfa_mmdet.inference.images import ImageError
from rfa_mmdet.inference.predict import predict


class LoadInverted(BaseTransform):
    """A third-party loader."""

    def transform(self, results):
        image = 255 - cv2.imread(results["img_path"])
        return {**results, "img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2]}


@pytest.fixture
def cfg(tiny_config, shapes, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    init_default_scope("mmdet")
    return Config.fromfile(tiny_config)


def wrapped(*types):
    def change(cfg):
        dataset = cfg.test_dataloader.dataset
        for kind in types:
            more = dict(
                RepeatDataset=dict(times=2, dataset=dataset),
                ClassBalancedDataset=dict(oversample_thr=1e-9, dataset=dataset),
                ConcatDataset=dict(datasets=[dataset, copy.deepcopy(dataset)]),
                MultiImageMixDataset=dict(dataset=dataset, pipeline=[]),
            )[kind]
            dataset = dict(type=kind, **more)
        cfg.test_dataloader.dataset = dataset

    return change


def pipeline(change):
    def changed(cfg):
        cfg.test_dataloader.dataset.pipeline = change(cfg.test_dataloader.dataset.pipeline)

    return changed


def mixed(cfg):
    """A transform of a wrapper, after loading."""
    first, *rest = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [first]
    wrapped("MultiImageMixDataset")(cfg)
    cfg.test_dataloader.dataset.pipeline = rest


def collated(cfg):
    cfg.test_dataloader.collate_fn = dict(type="pseudo_collate")


def without_visualizer(cfg):
    cfg.pop("visualizer")


def without_scope(cfg):
    cfg.default_scope = None
    cfg.test_dataloader.dataset.pipeline[0].type = TRANSFORMS.get("LoadImageFromFile")


CHANGES = {
    "as it is": lambda cfg: None,
    "nested": pipeline(lambda p: [dict(type="Compose", transforms=p[:2]), *p[2:]]),
    "annotations first": pipeline(lambda p: [dict(type="LoadAnnotations", with_bbox=True), *p]),
    "masks": pipeline(
        lambda p: [*p[:-1], dict(type="LoadAnnotations", with_bbox=True, with_mask=True), p[-1]]
    ),
    "resized as loaded": pipeline(
        lambda p: [dict(type="RandomChoice", transforms=[p[:2]], prob=[1.0]), *p[2:]]
    ),
    "own loader": pipeline(lambda p: [dict(type=LoadInverted), *p[1:]]),
    "float, pillow": pipeline(
        lambda p: [dict(p[0], to_float32=True, imdecode_backend="pillow"), *p[1:]]
    ),
    "grey": pipeline(
        lambda p: [
            dict(p[0], color_type="grayscale"),
            dict(type="RandomChoice", transforms=[[dict(type=ThreeTimes)]], prob=[1.0]),
            *p[1:],
        ]
    ),
    "repeated": wrapped("RepeatDataset"),
    "concatenated": wrapped("ConcatDataset"),
    "wrapped twice": wrapped("ClassBalancedDataset", "ConcatDataset"),
    "mixed": mixed,
    "collated": collated,
    "no visualizer": without_visualizer,
    "a class for its name": without_scope,
}


class ThreeTimes(BaseTransform):
    """Convert one channel to three, or fail on a missing key."""

    def __init__(self, missing="img"):
        self.missing = missing

    def transform(self, results):
        results[self.missing]
        return {**results, "img": np.repeat(np.atleast_3d(results["img"]), 3, 2)}


def items_of(cfg) -> dict[str, dict]:
    """Return the items of a dataset built like in a Runner, by file."""
    dataset = DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))
    items = [dataset[i] for i in range(len(dataset))]
    return {item["data_samples"].img_path: item for item in items}


@pytest.mark.parametrize("change", CHANGES)
def test_detections_match_a_test(change, cfg, checkpoint, tmp_path):
    CHANGES[change](cfg)
    detector = Detector(cfg, str(checkpoint), "cpu")
    items = items_of(cfg)
    assert len(items) == 4
    found = predict(detector, list(items), tmp_path)
    assert not {**found.skipped, **found.undrawn}
    for number, (path, item) in enumerate(items.items(), 1):
        with torch.no_grad():
            (theirs,) = detector.model.test_step(pseudo_collate([item]))
        theirs = theirs.pred_instances
        ours = [a for a in found.coco["annotations"] if a["image_id"] == number]
        assert [a["score"] for a in ours] == theirs.scores.tolist() != []
        assert [a["category_id"] - 1 for a in ours] == theirs.labels.tolist()
        assert np.allclose([a["bbox"][:2] for a in ours], theirs.bboxes[:, :2])
        assert cv2.imread(str(tmp_path / "pictures" / Path(path).name)).shape == (64, 64, 3)
    assert {(i["height"], i["width"]) for i in found.coco["images"]} == {(64, 64)}


TTA_PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(160, 160), keep_ratio=True)],
            [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        *("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
                        *("flip", "flip_direction"),
                    ),
                )
            ],
        ],
    ),
]
TTA_MODEL = dict(
    type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=20)
)
WRAPPERS = [
    (),
    ("RepeatDataset",),
    ("ConcatDataset",),
    ("ClassBalancedDataset", "ConcatDataset"),
    ("ConcatDataset", "RepeatDataset"),
    ("MultiImageMixDataset",),
]


@pytest.mark.parametrize("types", WRAPPERS, ids=str)
def test_augmentation_reaches_every_data_set(types, cfg, checkpoint, tmp_path):
    if "MultiImageMixDataset" in types:
        mixed(cfg)
    else:
        wrapped(*types)(cfg)
    cfg.tta_model, cfg.tta_pipeline = TTA_MODEL, TTA_PIPELINE
    augment(cfg)
    dataset = DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))
    for i in range(len(dataset)):
        assert len(dataset[i]["inputs"]) == 2
    # The tool works with such a config too.
    detector = Detector(cfg, str(checkpoint), "cpu")
    path = dataset[0]["data_samples"][0].img_path
    found = predict(detector, [path], tmp_path)
    assert not {**found.skipped, **found.undrawn}
    with torch.no_grad():
        (theirs,) = detector.model.test_step(pseudo_collate([dataset[0]]))
    scores = [a["score"] for a in found.coco["annotations"]]
    assert scores == theirs.pred_instances.scores.tolist() != []


def test_collation_follows_the_config(cfg, checkpoint):
    cfg.test_dataloader.collate_fn = dict(type="default_collate")
    detector = Detector(cfg, str(checkpoint), "cpu")
    assert detector._collate.func is default_collate


def test_wrong_test_data(cfg, checkpoint):
    other = copy.deepcopy(cfg)
    wrapped("ConcatDataset")(other)
    other.test_dataloader.dataset.datasets[1].pipeline.pop(1)
    with pytest.raises(ConfigError, match=r"dataset\.datasets\.0\.pipeline: differs from"):
        Detector(other, str(checkpoint), "cpu")
    cfg.pop("test_dataloader")
    with pytest.raises(ConfigError, match="test_dataloader: missing"):
        Detector(cfg, str(checkpoint), "cpu")


def test_failing_pipeline_names_the_transform(cfg, checkpoint, shapes):
    path = next(str(path) for path in sorted(shapes.glob("JPEGImages/*.jpg")))
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type=ThreeTimes, missing="pixels"))
    with pytest.raises(ImageError, match=r"^ThreeTimes fails: 'pixels'$"):
        Detector(cfg, str(checkpoint), "cpu").load(path)
    cfg.test_dataloader.dataset.pipeline = [dict(type="PackDetInputs", meta_keys=())]
    with pytest.raises(ImageError, match="the test pipeline loads no image"):
        Detector(cfg, str(checkpoint), "cpu").load(path)


def test_unusual_files_do_not_affect_results(cfg, checkpoint, shapes, tmp_path):
    cfg.test_dataloader.dataset.pipeline[0].color_type = "unchanged"
    detector = Detector(cfg, str(checkpoint), "cpu")
    image = cv2.imread(str(next(shapes.glob("JPEGImages/*.jpg"))))
    folder = os.fsencode(tmp_path / "images")
    good = [
        *(
            "a.jpg",
            "A.JPG",
            "colour.pgm",
            "colour.pgm.png",
            "b.jfif",
            "no suffix",
            "c.gif",
            "c.tif",
        ),
        *("d.png/a.jpg", "d", "é" * 123 + ".jpg", "x" * 251 + ".png", "x" * 251 + ".pgm"),
        *("$a$b_$.jpg", "[red]x.jpg", "a=b|c<d>&.jpg", "back\\slash.jpg", "new\nline.jpg"),
        *("猫🐱.jpg", "\udcff\udcfe.jpg"),
    ]
    # Loaded with another number of channels, or without height after resizing.
    bad = dict(grey=image[..., 0], thin=np.zeros((1, 9000, 3), np.uint8))
    paths = []
    for name, pixels in [*((name, image) for name in good), *bad.items()]:
        path = os.path.join(folder, os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(cv2.imencode(".png", pixels)[1].tobytes())
        paths.append(os.fsdecode(path))
    (tmp_path / "out" / "pictures" / "a.jpg").mkdir(parents=True)  # in the way of a picture
    found = predict(detector, paths, tmp_path / "out", batch_size=4)
    assert {os.path.basename(path) for path in found.skipped} == set(bad)
    assert "pixels of shape 64x64" in found.skipped[paths[-2]]
    assert list(found.undrawn) == [paths[0]]
    assert "is a folder" in found.undrawn[paths[0]]
    text = (tmp_path / "out" / "predictions.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert [one["file_name"] for one in content["images"]] == paths[: len(good)]
    counts = {
        sum(a["image_id"] == one["id"] for a in content["annotations"]) for one in content["images"]
    }
    assert len(counts) == 1
    pictures = [path for path in (tmp_path / "out" / "pictures").rglob("*") if path.is_file()]
    assert len(pictures) == len(good) - 1
    for picture in pictures:
        pixels = np.frombuffer(picture.read_bytes(), np.uint8)
        assert cv2.imdecode(pixels, cv2.IMREAD_COLOR).shape == image.shape


def test_nan_detections_are_dropped(cfg, checkpoint, shapes, tmp_path, monkeypatch):
    detector = Detector(cfg, str(checkpoint), "cpu")
    detect = detector.detect

    def broken(images):
        samples = detect(images)
        samples[0].pred_instances.bboxes[0, 2] = float("nan")
        samples[0].pred_instances.scores[1] = float("inf")
        return samples

    monkeypatch.setattr(detector, "detect", broken)
    found = predict(detector, [str(next(shapes.glob("JPEGImages/*.jpg")))], tmp_path)
    assert found.not_finite == 2
    assert not found.undrawn
    assert json.loads((tmp_path / "predictions.json").read_text())["annotations"]


def test_preprocessor_may_be_at_the_top_level_of_the_config(cfg):
    """A Runner gives it to the model; without it, images would not be normalised."""
    cfg.data_preprocessor = cfg.model.pop("data_preprocessor")
    cfg.data_preprocessor.mean = [1.0, 2.0, 3.0]
    assert build_detector(cfg).data_preprocessor.mean.ravel().tolist() == [1.0, 2.0, 3.0]
    assert "data_preprocessor" not in cfg.model


def test_models_that_read_text_are_refused(tmp_path):
    cfg = get_config("mmdet::grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py")
    with pytest.raises(ConfigError, match=r"model\.language_model: detectors that read text"):
        Detector(cfg, str(tmp_path / "none.pth"), "cpu")
