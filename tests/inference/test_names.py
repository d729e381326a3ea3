"""Names and colours of classes in pictures and files, for any metadata."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.structures import InstanceData

from rfa_mmdet.checkpoints.files import read_checkpoint
from rfa_mmdet.data.shapes import CLASSES
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.inference.detector import Detector, draw
from rfa_mmdet.inference.names import class_colours, class_names
from rfa_mmdet.inference.picture_names import picture_names

SAMPLE = DetDataSample(
    pred_instances=InstanceData(
        bboxes=torch.tensor([[10.0, 20, 90, 80], [100, 30, 180, 90], [20, 90, 60, 98]]),
        labels=torch.tensor([0, 2, 1]),
        scores=torch.tensor([0.9, 0.8, 0.7]),
    )
)
ODD = ("$a$b_$", "[red]\\=|<b>", "a\nb 猫🐱\udcff")


@pytest.mark.parametrize(
    "palette",
    [
        *(None, "random", "coco", "none", "voc", "red", "no colour", (1, 2, 3), [], [(1, 2, 3)]),
        *(((1, 2, 3), (4, 5, 6)), [[1, 2, 3]] * 9, ["red"], [(1, 2)], [None, None, None]),
        *(np.array([[1, 2, 3]]), [(1, 2, 3), (4, 5)]),
    ],
    ids=str,
)
def test_every_class_has_a_colour(palette):
    colours = class_colours(dict(palette=palette), 3)
    assert len(colours) == 3
    assert all(len(colour) == 3 and set(map(type, colour)) == {int} for colour in colours)
    picture = draw(
        DetLocalVisualizer(),
        np.full((100, 200, 3), 90, np.uint8),
        SAMPLE,
        dict(classes=ODD, palette=palette),
        draw_gt=False,
    )
    assert picture.shape == (100, 200, 3)
    assert (picture != 90).any(2).mean() > 0.02


@pytest.mark.parametrize("classes", ["cat", ["cat"], ("cat",), None, (), [1, 2, 3], ODD])
def test_names_of_any_kind_are_drawn(classes):
    names = class_names(dict(classes=classes), 3)
    assert len(names) == 3
    assert names[0] in ("cat", "class 0", "1", ODD[0])
    image = np.full((100, 200, 3), 90, np.uint8)
    drawn = draw(DetLocalVisualizer(), image, SAMPLE, dict(classes=classes), draw_gt=False)
    assert (drawn != 90).any(2).mean() > 0.02


@pytest.mark.parametrize(
    ("saved", "known"),
    [
        (dict(dataset_meta=dict(classes=list("abcd"))), tuple("abcd")),
        (dict(dataset_meta=dict(CLASSES=list("abcd"))), tuple("abcd")),
        (dict(CLASSES=tuple("abcd")), tuple("abcd")),
        (dict(dataset_meta=None), CLASSES),
        (dict(dataset_meta=dict(classes=["a"])), CLASSES),  # not of this model
        ({}, CLASSES),
        (None, CLASSES),
    ],
    ids=str,
)
def test_classes_of_a_checkpoint(
    saved, known, tiny_config, checkpoint, shapes, tmp_path, monkeypatch
):
    monkeypatch.setenv("DATA_ROOT", str(shapes))
    cfg = Config.fromfile(tiny_config)
    cfg.test_dataloader.dataset.metainfo.palette = [(1, 2, 3)]
    path = str(tmp_path / "a.pth")
    torch.save(dict(state_dict=read_checkpoint(checkpoint)["state_dict"], meta=saved), path)
    meta = Detector(cfg, path, "cpu").model.dataset_meta
    assert meta["classes"] == known
    assert meta["palette"][0] == (1, 2, 3)
    assert len(meta["palette"]) == 4
    if known == CLASSES and saved in (None, {}):
        cfg.test_dataloader.dataset.pop("metainfo")
        with pytest.raises(
            ConfigError, match=r"num_classes=4, but .* has no class names and .* has 80"
        ):
            Detector(cfg, path, "cpu")


def test_names_of_pictures():
    paths = ["/a/x.jpg", "/a/x.png", "/a/x_detections.jpg", "/a/b/x.jpg", "/a/" + "y" * 255]
    names = picture_names(paths, ".png", "_detections.png")
    every = [str(name) for pair in names.values() for name in pair]
    assert every[:2] == ["x.png", "x_detections.png"]
    assert len({*every}) == 2 * len(paths)
    assert all(len(name.rpartition("/")[2]) <= 250 for name in every)
