"""Every check against data that are really damaged; the data are written here."""

import json
import math
import shlex
import shutil
from argparse import ArgumentParser
from pathlib import Path

import cv2
import mmdet
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mmdet.registry import DATASETS
from mmengine.config import Config, DictAction

from rfa_mmdet.data.check import DataError, check_data, image_damage, leaves, read_voc
from rfa_mmdet.data.check.classes import heads

CLASSES = ("cat", "dog", "traffic light")
LOAD = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
MODELS = Path(mmdet.__file__).parent / ".mim/configs/_base_/models"
FILTER = dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1))


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))


def coco_content():
    return dict(
        images=[dict(id=i, file_name=f"{i}.jpg", width=64, height=48) for i in range(4)],
        categories=[dict(id=10 + i, name=name) for i, name in enumerate(CLASSES)],
        annotations=[
            dict(
                id=i,
                image_id=i % 4,
                category_id=10 + i % 3,
                bbox=[5, 5, 20, 20],
                area=400,
                iscrowd=0,
            )
            for i in range(6)
        ],
    )


def voc_xml(*objects):
    text = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, difficult, (x1, y1, x2, y2) in objects
    )
    size = "<size><width>64</width><height>48</height></size>"
    return f"<annotation>{size}{text}</annotation>"


@pytest.fixture(scope="session")
def coco_made(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(coco_content()))
    for i in range(4):
        write_image(root / "images" / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def voc_made(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    (root / "Annotations").mkdir()
    for i in range(3):
        write_image(root / "JPEGImages" / f"{i}.jpg")
        box = (CLASSES[i], 0, (5, 5, 30, 30))
        (root / "Annotations" / f"{i}.xml").write_text(voc_xml(box, (CLASSES[0], 0, (1, 1, 9, 9))))
    (root / "train.txt").write_text("0\n1\n2\n")
    return root


@pytest.fixture
def coco(coco_made, tmp_path):
    """The folder of a COCO data set, to be damaged."""
    return shutil.copytree(coco_made, tmp_path / "coco")


@pytest.fixture
def voc(voc_made, tmp_path):
    """The folder of a VOC data set, to be damaged."""
    return shutil.copytree(voc_made, tmp_path / "voc")


def coco_dataset(root, split="train", **changes):
    dataset = dict(
        type="CocoDataset",
        data_root=str(root),
        ann_file=f"{split}.json",
        data_prefix=dict(img="images/"),
        metainfo=dict(classes=CLASSES),
        pipeline=LOAD,
        backend_args=None,
    )
    if split == "train":
        dataset["filter_cfg"] = dict(filter_empty_gt=True, min_size=32)
    else:
        dataset["test_mode"] = True
    return {**dataset, **changes}


def voc_dataset(root, **changes):
    dataset = dict(
        type="XMLDataset",
        data_root=str(root),
        ann_file="train.txt",
        data_prefix=dict(sub_data_root=""),
        metainfo=dict(classes=CLASSES),
        pipeline=LOAD,
    )
    return {**dataset, **changes}


def config(train, val=None, model="retinanet_r50_fpn", num_classes=3, **more):
    """A config of mmdet's own model, its heads set to ``num_classes`` unless that is None."""
    cfg = Config.fromfile(MODELS / f"{model}.py") if model else Config(dict())
    if model and num_classes is not None:
        cfg.merge_from_dict({f"{key}.num_classes": num_classes for key, _ in heads(cfg.model)})
    new = dict(train_dataloader=dict(dataset=train), **more)
    if val is not None:
        new["val_dataloader"] = dict(dataset=val)
    cfg.merge_from_dict(new)
    return cfg


def errors_of(cfg, splits=("train",)):
    with pytest.raises(DataError) as caught:
        check_data(cfg, splits)
    return str(caught.value)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- nothing wrong


@pytest.mark.parametrize(
    "model", ["retinanet_r50_fpn", "faster-rcnn_r50_fpn", "cascade-mask-rcnn_r50_fpn"]
)
def test_says_nothing_about_good_coco_data(coco_made, model):
    evaluator = dict(type="CocoMetric", ann_file=str(coco_made / "val.json"))
    cfg = config(
        coco_dataset(coco_made), coco_dataset(coco_made, "val"), model, val_evaluator=[evaluator]
    )
    assert check_data(cfg, ("train", "val")) == []


def test_says_nothing_about_good_voc_data(voc_made):
    cfg = config(voc_dataset(voc_made), voc_dataset(voc_made, test_mode=True))
    assert check_data(cfg, ("train", "val")) == []


def test_accepts_what_mmdet_loads(coco_made, voc_made):
    for dataset in (coco_dataset(coco_made), voc_dataset(voc_made)):
        check_data(config(dataset))
        assert len(DATASETS.build({**dataset, "pipeline": []})) > 0


def test_needs_no_model_and_no_validation(coco_made):
    assert check_data(config(coco_dataset(coco_made), model=None), ("train", "val")) == []


# --- wrappers


def test_finds_the_dataset_in_every_wrapper(coco):
    cats = dict(type="ConcatDataset", datasets=[coco_dataset(coco), coco_dataset(coco, "gone")])
    balanced = dict(type="ClassBalancedDataset", oversample_thr=1e-3, dataset=cats)
    repeated = dict(type="RepeatDataset", times=2, dataset=balanced)
    cfg = config(dict(type="MultiImageMixDataset", dataset=repeated, pipeline=[FILTER]))
    found = leaves(cfg, "train")
    key = "train_dataloader.dataset.dataset.dataset.dataset.datasets"
    assert [leaf.key for leaf in found] == [f"{key}.0", f"{key}.1"]
    assert next(name for name, _ in found[0].transforms()) == "FilterAnnotations"
    message = errors_of(cfg)
    assert f"{key}.1.ann_file='gone.json'" in message
    assert f"{key}.0" not in message


def test_reports_several_problems_at_once(coco):
    (coco / "images" / "1.jpg").unlink()
    message = errors_of(config(coco_dataset(coco), num_classes=80))
    assert message.startswith("2 problems")
    assert "images are missing" in message
    assert "num_classes=80" in message


# --- annotation files


def test_missing_annotation_file_with_the_nearest(coco):
    message = errors_of(config(coco_dataset(coco, ann_file="trian.json")))
    assert "train_dataloader.dataset.ann_file='trian.json'" in message
    assert f"{coco}/trian.json does not exist; nearest in" in message
    assert "train.json" in message


def test_missing_data_root(coco):
    message = errors_of(config(coco_dataset(f"{coco}x/deep")))
    assert f"data_root='{coco}x/deep' is no folder" in message
    assert f"from '{coco}x' on; nearest in" in message


def test_missing_image_set_of_voc(voc):
    assert "train.txt" in errors_of(config(voc_dataset(voc, ann_file="trainval.txt")))


def test_folder_instead_of_annotation_file(coco):
    assert "images is not a file" in errors_of(config(coco_dataset(coco, ann_file="images")))


@pytest.mark.parametrize("as_list", [False, True])
def test_missing_file_of_an_evaluator(coco, as_list):
    good = dict(type="CocoMetric", ann_file=str(coco / "val.json"))
    bad = dict(type="CocoMetric", ann_file=str(coco / "vla.json"))
    evaluator, key = ([good, bad], "val_evaluator.1") if as_list else (bad, "val_evaluator")
    cfg = config(coco_dataset(coco), coco_dataset(coco, "val"), val_evaluator=evaluator)
    message = errors_of(cfg, ("train", "val"))
    assert f"{key}.ann_file='{coco}/vla.json'" in message
    assert "val.json" in message.split("nearest")[1]


def test_warns_of_an_evaluator_with_another_file(coco):
    evaluator = dict(type="CocoMetric", ann_file=str(coco / "train.json"))
    cfg = config(coco_dataset(coco), coco_dataset(coco, "val"), val_evaluator=evaluator)
    (warning,) = check_data(cfg, ("train", "val"))
    assert warning.startswith("val_evaluator.ann_file=")


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.floats(0, 0.999))
@example(0)
def test_truncated_json_wherever_it_is_cut(coco, part):
    whole = json.dumps(coco_content())
    cut = whole[: int(len(whole) * part)]
    (coco / "train.json").write_text(cut)
    message = errors_of(config(coco_dataset(coco), model=None))
    assert f"{coco}/train.json ({len(cut):,} bytes) is cut off or not JSON" in message
    assert "at character" in message


def test_binary_instead_of_json(coco):
    shutil.copy(coco / "images" / "0.jpg", coco / "train.json")
    assert "no text at byte 0" in errors_of(config(coco_dataset(coco)))


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_json_without_a_list_of_coco(coco, name):
    edit_json(coco / "train.json", lambda content: content.pop(name))
    assert f"train.json has no list '{name}'" in errors_of(config(coco_dataset(coco)))


def test_json_of_results_instead_of_annotations(coco):
    (coco / "train.json").write_text("[]")
    assert "holds a list" in errors_of(config(coco_dataset(coco)))


@pytest.mark.parametrize(
    ("name", "key"), [("annotations", "area"), ("annotations", "bbox"), ("images", "width")]
)
def test_entries_without_what_mmdet_reads(coco, name, key):
    edit_json(coco / "train.json", lambda content: content[name][1].pop(key))
    message = errors_of(config(coco_dataset(coco)))
    assert f"{name}[1] (id 1)" in message
    assert f"'{key}'" in message


@pytest.mark.parametrize(
    "bbox",
    [[1, 2, 3], [1, 2, 3, "4"], "1234", [1, 2, 3, None], [1, 2, 3, math.nan], [-math.inf, 2, 3, 4]],
)
def test_boxes_that_are_no_boxes(coco, bbox):
    edit_json(coco / "train.json", lambda content: content["annotations"][2].update(bbox=bbox))
    assert "bbox of annotations 2 is not [x, y, w, h]" in errors_of(config(coco_dataset(coco)))


def test_null_is_as_good_as_missing(coco):
    edit_json(coco / "train.json", lambda content: content["images"][2].update(width=None))
    assert "images[2] (id 2) lack one of" in errors_of(config(coco_dataset(coco)))


def test_repeated_annotation_ids(coco):
    edit_json(coco / "train.json", lambda content: content["annotations"][0].update(id=1))
    message = errors_of(config(coco_dataset(coco)))
    assert "ids of 'annotations' must be unique, but more than one has: 1" in message


def test_annotations_of_no_image(coco):
    edit_json(coco / "train.json", lambda content: content["annotations"][1].update(image_id=77))
    (warning,) = (w for w in check_data(config(coco_dataset(coco)), ("train",)) if "image_id" in w)
    assert "1 annotations" in warning
    assert "ids 1" in warning


def test_classes_without_boxes(coco):
    def change(content):
        category = next(c["id"] for c in content["categories"] if c["name"] == CLASSES[0])
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != category]

    edit_json(coco / "train.json", change)
    (warning,) = check_data(config(coco_dataset(coco)), ("train",))
    assert f"classes '{CLASSES[0]}' have no box in" in warning


def test_annotations_may_be_missing_for_testing(coco):
    edit_json(coco / "val.json", lambda content: content.pop("annotations"))
    assert check_data(config(coco_dataset(coco), coco_dataset(coco, "val")), ("train", "val")) == []


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_truncated_xml(voc, part):
    path = voc / "Annotations" / "1.xml"
    path.write_text(path.read_text()[: int(path.stat().st_size * part)])
    message = errors_of(config(voc_dataset(voc)))
    assert f"{path} ({path.stat().st_size:,} bytes) is cut off or not XML" in message
    assert "1 of the 3 XML files" in message


def test_an_image_listed_twice(voc):
    path = voc / "train.txt"
    path.write_text(path.read_text() + "1\n")
    (warning,) = check_data(config(voc_dataset(voc)), ("train",))
    assert "names 1 images more than once" in warning
    assert warning.endswith(": 1")


def test_missing_xml(voc):
    (voc / "Annotations" / "2.xml").rename(voc / "Annotations" / "2_.xml")
    message = errors_of(config(voc_dataset(voc)))
    assert f"{voc}/Annotations/2.xml does not exist" in message
    assert "2_.xml" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<xmin>5</xmin>", ""),
        ("<xmin>5</xmin>", "<xmin>five</xmin>"),
        ("<xmin>5</xmin>", "<xmin>inf</xmin>"),
        ("<width>64</width>", "<width>64.0</width>"),
        ("<name>dog</name>", ""),
        ("<difficult>0</difficult>", "<difficult>no</difficult>"),
    ],
)
def test_xml_that_mmdet_cannot_read(voc, old, new):
    path = voc / "Annotations" / "1.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((AttributeError, ValueError, TypeError, OverflowError)):
        DATASETS.build(voc_dataset(voc, pipeline=[]))
    assert f"{path}: <size> needs" in errors_of(config(voc_dataset(voc)))


@pytest.mark.parametrize("text", ["0\n1 \n2\n", "0\n1\n2\n\n", "0\n\n1\n", "0\n\t1\n"])
def test_blanks_in_an_image_set_with_the_command_that_mends_it(voc, text):
    (voc / "train.txt").write_text(text)
    with pytest.raises(FileNotFoundError):
        DATASETS.build(voc_dataset(voc, pipeline=[]))
    message = errors_of(config(voc_dataset(voc)))
    assert f"{voc}/train.txt: line" in message
    assert "sed -i" in message


@pytest.mark.parametrize("text", ["0\r\n1\r\n2\r\n", "0\n1\n2"])
def test_line_ends_of_an_image_set_do_not_matter(voc, text):
    (voc / "train.txt").write_bytes(text.encode())
    assert check_data(config(voc_dataset(voc))) == []


def test_image_set_of_one_class(voc):
    (voc / "train.txt").write_text("0  1\n1 -1\n2 -1\n")
    assert "lists of one class ('0  1')" in errors_of(config(voc_dataset(voc)))


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*CLASSES, "bird"]),
            st.integers(0, 1),
            st.tuples(*[st.one_of(st.integers(-9, 99), st.floats(-9, 99))] * 4),
        ),
        max_size=5,
    )
)
def test_reads_the_same_boxes_as_mmdet(voc, objects):
    (voc / "Annotations" / "0.xml").write_text(voc_xml(*objects))
    boxes = read_voc(str(voc / "Annotations" / "0.xml"), CLASSES).boxes
    mmdets = DATASETS.build(voc_dataset(voc, pipeline=[], serialize_data=False))
    theirs = mmdets.get_data_info(0)["instances"]
    # VOC counts pixels from one.
    assert [[v - 1 for v in box.xyxy] for box in boxes] == [i["bbox"] for i in theirs]
    assert [box.difficult for box in boxes] == [bool(i["ignore_flag"]) for i in theirs]


# --- classes


def test_classes_that_the_file_does_not_have(coco):
    wrong = coco_dataset(coco, metainfo=dict(classes=("cat", "dgo")))
    message = errors_of(config(wrong, model=None))
    assert "1 of its 2 classes are no categories of" in message
    assert "'dgo'" in message
    assert f"metainfo=dict(classes={CLASSES!r})" in message
    assert "--cfg-options" not in message  # which would take the blank out of "traffic light"


def test_classes_by_default_and_the_option_that_passes_others(coco):
    edit_json(coco / "train.json", lambda c: c["categories"].__setitem__(2, dict(id=12, name="ox")))
    cfg = config(coco_dataset(coco, metainfo=dict(CLASSES=("cat", "dog", "ox"))))
    message = errors_of(cfg)
    assert "the defaults of CocoDataset: metainfo has 'CLASSES' instead of 'classes'" in message
    option = '--cfg-options train_dataloader.dataset.metainfo.classes="(cat,dog,ox,)"'
    assert option in message
    cfg.merge_from_dict(parsed(option))
    assert check_data(cfg) == []


def parsed(text):
    """What mmengine makes of the --cfg-options in a message."""
    parser = ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    return parser.parse_args(shlex.split(text)).cfg_options


def test_order_of_classes_other_than_the_files(coco):
    (warning,) = check_data(config(coco_dataset(coco, metainfo=dict(classes=CLASSES[::-1]))))
    assert f"Right would be classes={CLASSES!r}" in warning


def test_order_of_categories_other_in_validation(coco):
    edit_json(coco / "val.json", lambda content: content["categories"].reverse())
    cfg = config(coco_dataset(coco), coco_dataset(coco, "val"))
    message = errors_of(cfg, ("train", "val"))
    assert "val_dataloader.dataset numbers its classes 'traffic light', 'dog', 'cat'" in message


def test_repeated_category_name(coco):
    edit_json(coco / "train.json", lambda c: c["categories"].append(dict(id=99, name="cat")))
    message = errors_of(config(coco_dataset(coco)))
    assert "several categories have the same name ('cat')" in message


@pytest.mark.parametrize("dataset", [coco_dataset, voc_dataset])
def test_string_instead_of_a_tuple_of_classes(coco, voc, dataset):
    root = coco if dataset is coco_dataset else voc
    message = errors_of(config(dataset(root, metainfo=dict(classes=("cat")))))
    assert "train_dataloader.dataset.metainfo.classes='cat' is a string" in message
    assert "classes=('cat',)" in message


def test_classes_from_a_file(coco):
    (coco / "classes.txt").write_text("\n".join(CLASSES))
    metainfo = dict(classes=str(coco / "classes.txt"))
    assert check_data(config(coco_dataset(coco, metainfo=metainfo))) == []


def test_voc_without_classes(voc):
    message = errors_of(config(voc_dataset(voc, metainfo=None)))
    assert "XMLDataset has no classes of its own" in message


def test_voc_none_of_the_classes_occurs(voc):
    message = errors_of(config(voc_dataset(voc, metainfo=dict(classes=("Cat", "Dog", "Ox")))))
    assert "none of its classes occurs" in message
    assert "'cat' (4)" in message
    assert f"metainfo=dict(classes={CLASSES!r})" in message


def test_voc_some_classes_differ(voc):
    metainfo = dict(classes=("cat", "dog", "ox"))
    absent, ignored = check_data(config(voc_dataset(voc, metainfo=metainfo)))
    assert "classes 'ox' occur in no XML file" in absent
    assert "ignored: 'traffic light' (1)" in ignored


# --- classes and heads


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("retinanet_r50_fpn", ["model.bbox_head"]),
        ("faster-rcnn_r50_fpn", ["model.roi_head.bbox_head"]),
        ("mask-rcnn_r50_fpn", ["model.roi_head.bbox_head", "model.roi_head.mask_head"]),
        (
            "cascade-mask-rcnn_r50_fpn",
            [*(f"model.roi_head.bbox_head.{i}" for i in range(3)), "model.roi_head.mask_head"],
        ),
    ],
)
def test_heads_for_other_classes_and_the_options_that_mend_it(coco, model, keys):
    cfg = config(coco_dataset(coco), model=model, num_classes=None)
    message = errors_of(cfg)
    for key in keys:
        assert f"{key}.num_classes=80" in message
    assert "train_dataloader.dataset has 3 classes: 'cat', 'dog', 'traffic light'" in message
    assert "rpn_head" not in message
    assert ("list" in message) == ("cascade" in model)
    options = message[message.index("--cfg-options") :].split(" (list")[0].split(", or other")[0]
    cfg.merge_from_dict(parsed(options))
    assert check_data(cfg) == []


def test_heads_below_a_wrapper_and_of_lists_of_heads():
    detector = dict(
        bbox_head=dict(num_classes=4, loss_cls=dict(num_classes=9)),
        roi_head=[dict(bbox_head=dict(num_classes=5))],
        semantic_head=dict(num_classes=183),
        backbone=dict(num_classes=1000),
        mask_head=dict(num_classes=80, class_agnostic=True),
    )
    assert list(heads(dict(type="SoftTeacher", detector=detector))) == [
        ("model.detector.bbox_head", 4),
        ("model.detector.roi_head.0.bbox_head", 5),
    ]


def test_heads_are_compared_with_the_tested_dataset(coco):
    cfg = config(dict(), num_classes=None, test_dataloader=dict(dataset=coco_dataset(coco, "val")))
    message = errors_of(cfg, ("test",))
    assert "model.bbox_head.num_classes=80, but test_dataloader.dataset has 3" in message


def test_models_with_text_may_have_other_numbers(coco):
    cfg = config(coco_dataset(coco), num_classes=256)
    cfg.model.language_model = dict(type="BertModel")
    assert check_data(cfg) == []


def test_panoptic_data_count_more_classes_than_the_heads_of_things(coco):
    dataset = coco_dataset(coco, type="CocoPanopticDataset", metainfo=None)
    assert check_data(config(dataset, num_classes=80)) == []


# --- images


def test_missing_images(coco):
    for i in (1, 3):
        (coco / "images" / f"{i}.jpg").unlink()
    message = errors_of(config(coco_dataset(coco)))
    assert f"2 of 4 images are missing from '{coco}/images'" in message
    assert "1.jpg, 3.jpg" in message


def test_wrong_image_folder(coco):
    message = errors_of(config(coco_dataset(coco, data_prefix=dict(img="image/"))))
    assert "4 of 4 images are missing" in message
    assert "data_prefix={'img': 'image/'}" in message
    assert "nearest" in message


def test_voc_images_of_another_type(voc):
    (voc / "JPEGImages" / "1.jpg").rename(voc / "JPEGImages" / "1.png")
    message = errors_of(config(voc_dataset(voc)))
    assert "1.jpg does not exist" in message
    assert "1.png" in message


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_truncated_images_wherever_they_are_cut(tmp_path, ending, data):
    path = tmp_path / f"a{ending}"
    write_image(path)
    assert image_damage(str(path)) is None
    whole = path.read_bytes()
    # Below four bytes no format can be told.
    cut = data.draw(st.integers(4, len(whole) - 1))
    path.write_bytes(whole[:cut])
    assert image_damage(str(path)).startswith("truncated")


@pytest.mark.parametrize("ending", [".jpg", ".png"])
@pytest.mark.parametrize("behind", [b"\0" * 5000, b"\r\n", b"metadata of a camera" * 500])
def test_what_is_behind_the_end_of_an_image_does_not_matter(tmp_path, ending, behind):
    path = tmp_path / f"a{ending}"
    write_image(path)
    path.write_bytes(path.read_bytes() + behind)
    assert image_damage(str(path)) is None


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image(tmp_path):
    path = tmp_path / "a.jpg"
    write_image(path)
    whole = path.read_bytes()
    thumbnail = b"\xff\xe1" + (2 + len(whole)).to_bytes(2, "big") + whole
    path.write_bytes(whole[:2] + thumbnail + whole[2:])
    assert image_damage(str(path)) is None
    path.write_bytes(whole[:2] + thumbnail + whole[2:-300])
    assert image_damage(str(path)).startswith("truncated JPEG")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_files_that_are_no_images(coco, content, words):
    (coco / "images" / "2.jpg").write_bytes(content)
    message = errors_of(config(coco_dataset(coco)))
    assert f"1 of 4 images are damaged: {coco}/images/2.jpg" in message
    assert words in message


def test_unknown_formats_are_left_alone(tmp_path):
    (tmp_path / "a.bmp").write_bytes(b"BM1234")
    assert image_damage(str(tmp_path / "a.bmp")) is None


def test_folder_instead_of_an_image(tmp_path):
    assert image_damage(str(tmp_path)).startswith("unreadable")


def test_images_that_the_run_does_not_read_may_be_missing(coco):
    def take_from_first(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 0]

    edit_json(coco / "train.json", take_from_first)
    (coco / "images" / "0.jpg").unlink()
    assert check_data(config(coco_dataset(coco))) == []
    assert "1 of 4 images" in errors_of(config(coco_dataset(coco, filter_cfg=None)))
    (coco / "images" / "3.jpg").unlink()
    assert check_data(config(coco_dataset(coco, indices=2))) == []


# --- boxes


@pytest.mark.parametrize("what", ["images", "annotations"])
def test_nothing_to_train_on(coco, what):
    edit_json(coco / "train.json", lambda content: content.update({what: []}))
    message = errors_of(config(coco_dataset(coco)))
    assert "is left to read (filter_cfg={'filter_empty_gt': True" in message


def test_no_boxes_without_a_filter(coco):
    edit_json(coco / "train.json", lambda content: content.update(annotations=[]))
    message = errors_of(config(coco_dataset(coco, filter_cfg=None)))
    assert "the 4 images of" in message
    assert "have no box to learn from" in message


def test_unlabelled_data_beside_labelled_are_a_warning(coco):
    edit_json(coco / "val.json", lambda content: content.update(annotations=[]))
    unlabelled = coco_dataset(coco, "val", test_mode=False)
    both = dict(type="ConcatDataset", datasets=[coco_dataset(coco), unlabelled])
    (warning,) = check_data(config(both))
    assert "datasets.1: the 4 images of" in warning


def test_voc_images_filtered_out_by_a_size_of_zero(voc):
    for path in (voc / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<width>64", "<width>0"))
    message = errors_of(config(voc_dataset(voc, filter_cfg=dict(min_size=32))))
    assert "none of the 3 images" in message
    assert "write as 0" in message


def test_inverted_boxes_of_coco_are_a_warning(coco):
    edit_json(coco / "train.json", lambda c: c["annotations"][5].update(bbox=[5, 5, 0, 9]))
    (warning,) = check_data(config(coco_dataset(coco)))
    assert "1 boxes of" in warning
    assert "1.jpg" in warning


INVERTED = [(30, 5, 5, 30), (5, 30, 30, 5), (5, 5, 5, 30), (5, 5, 5.9, 30)]


@pytest.mark.parametrize("box", INVERTED)
def test_inverted_boxes_of_voc_are_an_error_with_the_line_that_mends_it(voc, box):
    good = (CLASSES[0], 0, (5, 5, 30, 30))
    (voc / "Annotations" / "0.xml").write_text(voc_xml(good, (CLASSES[0], 0, box)))
    message = errors_of(config(voc_dataset(voc)))
    assert "1 boxes are inverted or empty" in message
    assert "0.xml" in message
    line = message.split("LoadAnnotations:  ")[1]
    mended = [*LOAD, eval(line)]  # as the user would paste it
    for dataset in (
        voc_dataset(voc, pipeline=mended),
        dict(type="MultiImageMixDataset", dataset=voc_dataset(voc), pipeline=mended),
    ):
        (warning,) = check_data(config(dataset))
        assert "left out of training" in warning
    theirs = DATASETS.build(voc_dataset(voc, pipeline=mended, _scope_="mmdet"))
    (kept,) = theirs[0]["gt_bboxes"].tensor.tolist()
    assert kept == [4, 4, 29, 29]


def test_inverted_boxes_of_voc_that_mmdet_ignores_are_a_warning(voc):
    (voc / "Annotations" / "0.xml").write_text(
        voc_xml((CLASSES[0], 0, (1, 1, 9, 9)), (CLASSES[0], 1, INVERTED[0]))
    )
    assert len(check_data(config(voc_dataset(voc)))) == 1
    (voc / "Annotations" / "0.xml").write_text(
        voc_xml((CLASSES[0], 0, (1, 1, 9, 9)), (CLASSES[0], 0, INVERTED[0]))
    )
    assert len(check_data(config(voc_dataset(voc, filter_cfg=dict(bbox_min_size=1))))) == 1
    val = voc_dataset(voc, test_mode=True)
    (warning,) = check_data(config(val, val), ("val",))
    assert "counts them as missed" in warning


# --- what is not checked


def test_remote_data_are_not_checked(coco):
    dataset = coco_dataset(coco, ann_file="gone.json", backend_args=dict(backend="petrel"))
    (warning,) = check_data(config(dataset))
    assert "not checked: remote storage" in warning
    local = coco_dataset(coco, ann_file="gone.json", backend_args=dict(backend="local"))
    assert "gone.json does not exist" in errors_of(config(local))


def test_other_datasets_need_their_annotation_file_only(tmp_path):
    dataset = dict(type="BaseDetDataset", data_root=str(tmp_path), ann_file="a.json")
    assert "a.json does not exist" in errors_of(config(dataset))
    (tmp_path / "a.json").write_text("{}")
    assert check_data(config(dataset)) == []


def test_wrong_arguments_of_a_dataset(coco):
    for wrong in ("annfile", "file_client_args"):
        message = errors_of(config(coco_dataset(coco, **{wrong: "train.json"})))
        assert "train_dataloader.dataset cannot be built" in message
        assert wrong in message
