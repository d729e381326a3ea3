"""XML files in VOC format as written by tools: read, corrected with a log line, or rejected.

Each case uses both the check before a run and the dataset itself, which must agree.
"""

import pytest
from mmdet.registry import DATASETS

from rfa_mmdet.data.check import DataError, check_data
from rfa_mmdet.data.voc import read_voc
from tests.helpers.damaged_sets import CLASSES, config, errors_of, voc_dataset, voc_xml

DOG = voc_xml((CLASSES[1], 0, (5, 6, 30, 31)))
BOX = dict(ignore_flag=0, bbox=[4, 5, 29, 30], bbox_label=1)
SIZE = "<width>64</width><height>48</height>"


def ours(root, **changes):
    return voc_dataset(root, type="AnyImageXMLDataset", **changes)


def write(voc, content):
    content = content.encode() if isinstance(content, str) else content
    (voc / "Annotations" / "1.xml").write_bytes(content)


def loaded(dataset):
    """Return what training reads from the written file, including the decoded image."""
    built = DATASETS.build({**dataset, "serialize_data": False, "_scope_": "mmdet"})
    (info,) = (one for one in built.data_list if one["img_id"] == "1")
    assert built[built.data_list.index(info)]["img"].shape[:2] == (info["height"], info["width"])
    return info["instances"]


def declared(encoding, body=DOG, codec=None):
    return f'<?xml version="1.0" encoding="{encoding}"?>\n{body}'.encode(codec or encoding)


def difficult(text):
    return DOG.replace("<difficult>0", f"<difficult>{text}")


def corner(text):
    return DOG.replace("<xmin>5", f"<xmin>{text}")


SILENT = {
    "doctype": "<!DOCTYPE annotation [<!ENTITY d 'dog'>]>" + DOG.replace(">dog<", ">&d;<"),
    "comments": DOG.replace("<xmin>5", "<!-- a --><xmin>5<!-- b -->"),
    "cdata": DOG.replace(">dog<", "><![CDATA[dog]]><"),
    "latin-1": declared("iso-8859-1", DOG.replace("</size>", "</size><folder>é</folder>")),
    "utf-16": declared("utf-16"),
    "byte order mark": declared("utf-8", codec="utf-8-sig"),
    "blanks before": b"\n " + declared("utf-8"),
    "no size": DOG.replace(f"<size>{SIZE}</size>", ""),
    "float": corner("5.9"),
    "exponent": corner("0.5e1"),
    "blanks around a number": corner(" 5\n"),
    "no difficult": DOG.replace("<difficult>0</difficult>", ""),
    "blanks around difficult": difficult(" 0 "),
    "part": DOG.replace("</object>", "<part><name>head</name><bndbox/></part></object>"),
}
CORRECTED = {
    "gbk": (declared("gbk", DOG.replace("</size>", "</size><folder>狗</folder>")), "'gbk'"),
    "utf-16 that is utf-8": (declared("utf-16", codec="utf-8"), "'utf-16' read as UTF-8"),
    "unknown encoding": (declared("klingon", codec="utf-8"), "'klingon' read as UTF-8"),
    "namespace": (DOG.replace("<annotation>", "<annotation xmlns='http://a'>"), "'{http://a}'"),
    "empty difficult": (difficult(""), "<difficult></difficult> read as 0"),
    "unspecified": (difficult("Unspecified"), "<difficult>Unspecified</difficult> read as 0"),
    "false": (difficult("false"), "<difficult>false</difficult> read as 0"),
    "size of 0": (DOG.replace(SIZE, SIZE.replace("64", "0")), "<size> of 0 x 48"),
    "negative size": (DOG.replace(SIZE, SIZE.replace("48", "-1")), "<size> of 64 x -1"),
    "size in floats": (DOG.replace(SIZE, SIZE.replace("64", "64.0")), "<size> of 64.0 x 48"),
    "empty size": (DOG.replace(SIZE, ""), "<size> of None x None"),
    "blanks around a name": (DOG.replace(">dog<", ">\n dog <"), "around <name>dog</name>"),
}
REFUSED = {
    "not xml": ("dog", "not XML"),
    "unescaped": (DOG.replace("</size>", "</size><path>R&D</path>"), "not XML"),
    "entity of a file": (
        "<!DOCTYPE a [<!ENTITY d SYSTEM 'file:///etc/passwd'>]>" + DOG.replace(">dog<", ">&d;<"),
        "undefined entity",
    ),
    "bytes of another encoding": (DOG.replace("dog", "d\xf6g").encode("latin-1"), "'utf-8' codec"),
    "gbk cut off": (declared("gbk")[:-20], "bytes) is truncated or not XML: unclosed token"),
    "another format": ("<annotations><image/></annotations>", "<annotations> is not in VOC format"),
    "objects below": (
        DOG.replace("<object>", "<all><object>").replace("</object>", "</object></all>"),
        "every <object> is a direct child",
    ),
    "no name": (DOG.replace("<name>dog</name>", ""), "object 1 has no <name>"),
    "empty name": (DOG.replace(">dog<", "> <"), "object 1 has an empty <name>"),
    "rotated": (DOG.replace("bndbox", "robndbox"), "object 1 ('dog') has no <bndbox>"),
    "no corner": (DOG.replace("xmin", "xMin"), "has no <xmin>, only <xMin>, <ymin>"),
    "empty corner": (corner(""), "<xmin> of object 1 ('dog') is ''"),
    "nan": (corner("nan"), "<xmin> of object 1 ('dog') is 'nan'"),
    "infinite": (corner("-inf"), "<xmin> of object 1 ('dog') is '-inf'"),
    "decimal comma": (corner("5,5"), "<xmin> of object 1 ('dog') is '5,5'"),
    "far too large": (corner("1e300"), "is '1e300', not a number up to 1,000,000"),
    "difficult in words": (difficult("maybe"), "is 'maybe'; must be 0 or 1"),
}


@pytest.mark.parametrize("content", SILENT.values(), ids=SILENT)
def test_valid_files_are_read_without_warnings(voc, content):
    write(voc, content)
    assert check_data(config(ours(voc))) == []
    assert loaded(ours(voc)) == [BOX]


@pytest.mark.parametrize(("content", "words"), CORRECTED.values(), ids=CORRECTED)
def test_corrections_are_logged_in_one_line(voc, content, words):
    write(voc, content)
    (warning,) = check_data(config(ours(voc)))
    assert warning.startswith("train_dataloader.dataset: corrected: ")
    assert words in warning
    assert warning.endswith("(1 XML files: 1)")
    assert loaded(ours(voc)) == [BOX]


@pytest.mark.parametrize(
    "case", sorted(CORRECTED.keys() - {"size of 0", "negative size", "blanks around a name"})
)
def test_mmdets_own_dataset_rejects_them(voc, case):
    content, words = CORRECTED[case]
    write(voc, content)
    message = errors_of(config(voc_dataset(voc)))
    assert "MMDetection's XMLDataset cannot read this; type='AnyImageXMLDataset' can" in message
    assert words in message


def test_images_skipped_by_mmdet_for_size_0_are_counted(voc):
    write(voc, DOG.replace(SIZE, SIZE.replace("64", "0")))
    dataset = voc_dataset(voc, filter_cfg=dict(min_size=32))
    (warning,) = check_data(config(dataset))
    assert (
        "1 of 3 images are skipped by filter_cfg={'min_size': 32}, because <size> is 0 in 1"
        in warning
    )
    assert len(DATASETS.build({**dataset, "pipeline": []})) == 2
    assert len(DATASETS.build(ours(voc, filter_cfg=dict(min_size=32)))) == 3


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_unreadable_files_raise_with_file_field_and_value(voc, content, words):
    write(voc, content)
    message = errors_of(config(ours(voc)))
    assert "1 of the 3 XML files" in message
    assert f"{voc}/Annotations/1.xml" in message
    assert words in message
    with pytest.raises(DataError, match="1 of the 3 images") as caught:
        DATASETS.build(ours(voc))
    assert words in str(caught.value)
    assert words in errors_of(config(voc_dataset(voc)))


def test_long_values_are_shortened(voc):
    write(voc, corner("5" * 8000))
    assert len(errors_of(config(ours(voc)))) < 1000


def test_values_of_difficult(voc):
    write(voc, "")
    path = voc / "Annotations" / "1.xml"
    for text, expected in {"1": True, " 2 ": True, "-1": True, "True": True, "1.0": True}.items():
        path.write_text(difficult(text))
        (box,) = read_voc(str(path), CLASSES, correct=True).boxes
        assert box.difficult == expected


def test_objects_of_other_classes_are_not_parsed(voc):
    write(voc, DOG.replace("</size>", "</size><object><name>ship</name><robndbox/></object>"))
    (warning,) = check_data(config(ours(voc)))
    assert "other classes are ignored: 'ship' (1)" in warning
    assert loaded(ours(voc)) == [BOX]


OUTSIDE = [(65, 5, 80, 30), (5, 60, 30, 90), (-9, 5, 1, 30), (-9, -9, -2, -2)]
INVERTED = [(30, 5, 5, 30), (5, 5, 5.9, 30)]


@pytest.mark.parametrize("box", OUTSIDE + INVERTED)
def test_boxes_outside_the_image_are_ignored_in_training(voc, box):
    write(voc, voc_xml(("dog", 0, (5, 6, 30, 31)), ("dog", 0, box)))
    (warning,) = check_data(config(ours(voc)))
    assert "1.xml; they are ignored in training" in warning
    assert [one["ignore_flag"] for one in loaded(ours(voc))] == [0, 1]
    # As in MMDetection, they count in an evaluation.
    val = ours(voc, test_mode=True)
    (warning,) = check_data(config(val, val), ("val",))
    assert "counts them as missed" in warning
    assert [one["ignore_flag"] for one in loaded(val)] == [0, 0]


@pytest.mark.parametrize("box", OUTSIDE)
def test_boxes_outside_raise_if_resize_makes_them_empty(voc, box):
    write(voc, voc_xml(("dog", 0, (5, 6, 30, 31)), ("dog", 0, box)))
    load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
    resize = dict(type="Resize", scale=(32, 32))
    drop = dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1))
    message = errors_of(config(voc_dataset(voc, pipeline=[*load, drop, resize])))
    assert "1 boxes are outside their image, in 1.xml" in message
    assert "after Resize:  dict(type='FilterAnnotations'" in message
    behind = voc_dataset(voc, pipeline=[*load, resize, drop])
    (warning,) = check_data(config(behind))
    assert "ignored in training" in warning
    assert len(DATASETS.build({**behind, "_scope_": "mmdet"})[1]["gt_bboxes"]) == 1


def test_wrong_size_in_the_file_does_not_put_boxes_outside(voc):
    write(voc, DOG.replace(SIZE, "<width>4</width><height>4</height>"))
    (warning,) = check_data(config(ours(voc)))
    assert "1.jpg: 64 x 48, annotated 4 x 4" in warning
    built = DATASETS.build(ours(voc, pipeline=[], serialize_data=False))
    assert built.data_list[1]["instances"] == [BOX]


@pytest.mark.parametrize(
    "content", ["0\n1 \n2\n\n", "\ufeff0\r\n1\r\n2\r\n", "\n0\n\t1\n2"], ids=repr
)
def test_blanks_in_an_image_set_do_not_matter(voc, content):
    (voc / "train.txt").write_bytes(content.encode())
    assert check_data(config(ours(voc))) == []
    built = DATASETS.build(ours(voc, pipeline=[], serialize_data=False))
    assert [one["img_id"] for one in built.data_list] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"0  1\n1 -1\n2 -1\n", "per-class lists ('0  1')"), (b"0\n\xe9\n", "is not UTF-8 text")],
)
def test_invalid_image_sets(voc, content, words):
    (voc / "train.txt").write_bytes(content)
    assert words in errors_of(config(ours(voc)))
    with pytest.raises(DataError) as caught:
        DATASETS.build(ours(voc))
    assert words in str(caught.value)
