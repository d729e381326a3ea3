"""Images in VOC layout with any suffix, with and without ``<filename>``, and VOC itself."""

import json
import os

import pytest
from mmdet.evaluation import VOCMetric
from mmdet.registry import DATASETS
from mmengine.config import Config
from PIL import Image

from rfa_mmdet.data.check import DataError, check_data
from rfa_mmdet.data.shapes import make_shapes
from rfa_mmdet.data.voc_dataset import ImageFolders, decoded_size
from tests.helpers.damaged_sets import config, errors_of, voc_dataset, voc_xml, write_image
from tests.helpers.paths import ROOT
from tests.helpers.sets import draw_sets, leaves

XML = voc_xml(("dog", 0, (5, 5, 30, 30)))


def ours(root, **changes):
    dogs = dict(classes=("dog",))
    return voc_dataset(root, type="AnyImageXMLDataset", metainfo=dogs, **changes)


def check(root):
    return check_data(config(ours(root), num_classes=1))


@pytest.fixture
def laid_out(tmp_path):
    """Create a dataset of image files and of XML files, given as id -> ``<filename>``."""

    def make(files, ids):
        for name in files:
            write_image(tmp_path / "JPEGImages" / name)
        for img_id, filename in ids.items():
            text = "" if filename is None else f"<filename>{filename}</filename>"
            path = tmp_path / "Annotations" / f"{img_id}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(XML.replace("<size>", f"{text}<size>"))
        (tmp_path / "train.txt").write_text("\n".join(ids))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("files", "img_id", "filename", "found"),
    [
        *((f"a{suffix}", "a", None, 0) for suffix in (".png", ".JPG", ".jpeg", ".bmp", ".tif")),
        *((f"a{suffix}", "a", None, 0) for suffix in (".TIFF", ".webp", ".Png", ".ppm")),
        ("a.JPG", "a", "a.JPG", 0),
        ("a.JPG", "a", "a.jpg", 0),  # a different case
        ("a.png", "a", "gone.jpg", 0),
        ("a.png", "a", "", 0),
        ("a.png", "a", "a", 0),
        ("photo 1.PNG", "a", "photo 1.PNG", 0),
        ("b.png", "a", "b", 0),
        ("a.v1.png", "a.v1", None, 0),
        ("a.v1.png a.png", "a", None, 1),
        ("b.v1.png", "a", "b.v1", 0),
        ("a.png", "a", "images/a.png", 0),
        ("b.png", "a", "C:\\\\data\\\\b.png", 0),
        ("b.png", "a", "/data/b.png", 0),
        ("b.png", "a", "../JPEGImages/b.png", 0),
        ("deep/b.png b.png", "a", "deep/b.png", 0),
        ("deep/a.png", "deep/a", "a.png", 0),
        ("deep/b.png b.png", "deep/a", "b.png", 0),
        ("a.jpg a.png", "a", "a.png", 1),
        ("a.jpg A.jpg", "a", None, 0),
        ("a.jpg A.jpg", "A", "A.jpg", 1),
    ],
)
def test_the_image_is_found(laid_out, files, img_id, filename, found):
    files = [name.replace("+", " ") for name in ([files] if "photo" in files else files.split())]
    root = laid_out(files, {img_id: filename})
    assert check(root) == []
    built = DATASETS.build(ours(root))
    assert built.get_data_info(0)["img_path"] == str(root / "JPEGImages" / files[found])
    assert built[0]["img"].shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("files", "filename", "words"),
    [
        (["a.png", "b.png"], "b.png", "<filename> names another image"),
        (["a.jpg", "a.png"], None, "several images with the same name and no usable <filename>"),
    ],
)
def test_ambiguous_image_is_mmdets_with_a_warning(laid_out, files, filename, words):
    root = laid_out(files, {"a": filename})
    (warning,) = check(root)
    assert words in warning
    assert "the one with the XML file's name is used (1 XML files: a)" in warning
    found = DATASETS.build(ours(root)).get_data_info(0)["img_path"]
    assert found == str(root / "JPEGImages" / files[0])


@pytest.mark.parametrize(
    ("files", "ids", "words"),
    [
        (["a.png", "a.bmp"], {"a": None}, "is ambiguous in"),
        (["b.png", "b.bmp"], {"a": "b"}, ": b.bmp, b.png"),
        (["c.png"], {"a": "c.png", "b": "c.png"}, "'c.png', the image of a.xml"),
    ],
)
def test_ambiguous_images_raise(laid_out, files, ids, words):
    root = laid_out(files, ids)
    assert words in errors_of(config(ours(root), num_classes=1))
    with pytest.raises(DataError) as caught:
        DATASETS.build(ours(root))
    assert words in str(caught.value)


def test_missing_images_and_special_files_are_missing(laid_out):
    root = laid_out(["c.png"], dict.fromkeys("abc"))
    os.mkfifo(root / "JPEGImages" / "a.png")
    (root / "JPEGImages" / "b.png").mkdir()
    message = errors_of(config(ours(root), num_classes=1))
    assert f"2 of 3 images are missing from '{root}/JPEGImages'" in message


def test_each_folder_is_listed_once(laid_out, monkeypatch):
    root = laid_out([f"{i}.png" for i in range(20)], {str(i): f"{i}.png" for i in range(20)})
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    folders = ImageFolders(str(root / "JPEGImages"))
    assert [folders.find(str(i), f"{i}.png") for i in range(20)] == [
        (f"{i}.png", None) for i in range(20)
    ]
    assert len(listed) == 1


def test_remote_images_have_mmdets_names(laid_out):
    """Folders on remote backends, where listing may be expensive, are not listed."""
    root = laid_out(["a.png"], {"a": "a.png"})
    for backend, name in ((None, "a.png"), (dict(backend="local"), "a.png")):
        built = DATASETS.build(ours(root, pipeline=[], backend_args=backend))
        assert built.get_data_info(0)["img_path"].endswith(name)
    http = dict(data_prefix=dict(sub_data_root=f"file://{root}"), backend_args=dict(backend="http"))
    built = DATASETS.build(ours(root, lazy_init=True) | http | dict(data_root=""))
    assert built.read("a").path == f"file://{root}/JPEGImages/a.jpg"


def test_size_of_an_image_matches_the_decoded_one(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert decoded_size(str(tmp_path / "a.jpg")) == (48, 64)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(DataError, match="cannot be decoded"):
        decoded_size(str(tmp_path / "b.png"))


def test_images_are_not_decoded_for_their_size(laid_out, monkeypatch):
    root = laid_out(["a.png"], dict(a=None))
    path = root / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<width>64</width>", "<width>0</width>"))
    monkeypatch.setattr("mmcv.imfrombytes", lambda *args, **kwargs: 1 / 0)
    info = DATASETS.build(ours(root, pipeline=[])).get_data_info(0)
    assert (info["width"], info["height"]) == (64, 48)


@pytest.fixture
def voc0712(tmp_path, monkeypatch):
    """Return the VOC07+12 config, with drawn images at VOC's paths."""
    cfg = Config.fromfile(ROOT / "configs/rfaconv/retinanet_r50-rfaconv_fpn_1x_voc0712.py")
    monkeypatch.chdir(tmp_path)
    make_shapes(tmp_path / "shapes", 6, 4, image_size=(128, 96), seed=0, max_objects=3)
    draw_sets(cfg, tmp_path / "shapes")
    for i, path in enumerate(sorted(tmp_path.glob("data/*/*/Annotations/*.xml"))):
        text = path.read_text()
        assert f"<filename>{path.stem}.jpg</filename>" in text
        path.write_text(text.replace("<difficult>0", f"<difficult>{i % 3 // 2}", 1))
    return cfg


def test_voc_is_read_like_mmdet(voc0712):
    check_data(voc0712, ("train", "val", "test"))
    flags = []
    for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for leaf in leaves(voc0712[key].dataset):
            assert leaf["type"] == "AnyImageVOCDataset"
            one, mmdets = (
                DATASETS.build({**leaf, "type": kind, "pipeline": [], "serialize_data": False})
                for kind in (leaf["type"], "VOCDataset")
            )
            assert len(one) > 0
            assert json.dumps(one.data_list) == json.dumps(mmdets.data_list)
            assert one.metainfo == mmdets.metainfo
            flags += [i["ignore_flag"] for info in one.data_list for i in info["instances"]]
    assert set(flags) == {0, 1}
    assert mmdets.metainfo["dataset_type"] == "VOC2007"  # VOCMetric uses it for its class names
    metric = VOCMetric(eval_mode=voc0712.val_evaluator.eval_mode)
    assert metric.eval_mode == "11points"


def test_datasets_are_lazy(tmp_path):
    built = DATASETS.build(ours(tmp_path / "gone", lazy_init=True))
    assert built.metainfo["classes"] == ("dog",)
    with pytest.raises(FileNotFoundError):
        built.full_init()
