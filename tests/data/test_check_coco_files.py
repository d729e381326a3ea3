"""COCO files that are not JSON or have another structure, and names unsafe for terminals."""

import codecs
import gzip
import subprocess

import pytest

from rfa_mmdet.data.check import check_data
from tests.helpers.damaged_sets import CLASSES, coco_dataset, config, errors_of, setting, told_of


@pytest.mark.parametrize("entry", [None, 7, "image", [1]])
@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_entries_must_be_dicts(coco, name, entry):
    (line,) = told_of(coco, lambda content: content[name].insert(1, entry))
    assert f"train.json: 1 entries are not dicts: {name}[1]" in line


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, {"1": {}}, "list", 7])
def test_lists_must_be_lists(coco, name, value):
    (line,) = told_of(coco, lambda content: content.update({name: value}))
    assert f"train.json has no list '{name}'" in line
    assert f"'{name}' ({type(value).__name__})" in line


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda text: b"", "is truncated or not JSON"),
        (lambda text: codecs.BOM_UTF8 + text, "starts with a byte order mark"),
        (lambda text: text.decode().encode("utf-16"), "is encoded in UTF-16"),
        (lambda text: text.decode().encode("utf-16-be"), "is encoded in UTF-16"),
        (lambda text: text.decode().encode("utf-32"), "is encoded in UTF-32"),
        (gzip.compress, "is compressed (run gunzip), not JSON"),
        (lambda text: text.replace(b"cat", b"ca\xe9"), "invalid UTF-8 at byte"),
        (lambda text: text + b"\n" + text, "continues after the end of its JSON: another value"),
        (lambda text: text + b"garbage", "continues after the end of its JSON: 'garbage'"),
        (lambda text: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (lambda text: b"<!DOCTYPE html>", "is a web page, not JSON"),
        (lambda text: b"[" * 200_000, "nested too deeply"),
        (lambda text: text.replace(b"400", b"4" * 5000), "digits"),
        (lambda text: b"null", "contains a NoneType"),
        (lambda text: b'"' + b"a" * 9000 + b'"', "contains a str"),
    ],
)
def test_files_that_are_not_json(coco, data, words):
    path = coco / "train.json"
    path.write_bytes(data(path.read_bytes()))
    (line,) = (line for line in told_of_file(coco))
    assert words in line
    assert str(path) in line


def told_of_file(coco):
    message = errors_of(config(coco_dataset(coco), model=None))
    assert len(message) < 1000
    return message.splitlines()


def test_suggested_command_removes_the_byte_order_mark(coco):
    path = coco / "train.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    (line,) = told_of_file(coco)
    subprocess.run(line[line.index("sed -i") :], shell=True, check=True)
    assert check_data(config(coco_dataset(coco), model=None)) == []


# --- names


def test_long_and_unusual_names_are_shortened(coco):
    long = "a" * 8000

    def change(content):
        content["categories"].append(dict(id=50, name=long))
        content["categories"].append(dict(id=51, name="‮evil"))

    classes = (*CLASSES, long[:-1], "gone\x1b[2J")
    for message in (
        "\n".join(told_of(coco, change, metainfo=dict(classes=classes))),
        "\n".join(told_of(coco, setting("images", file_name=long + ".jpg"))),
    ):
        assert len(message) < 2500
        assert "\x1b" not in message
        assert "‮" not in message


def test_duplicate_or_non_string_classes(coco):
    for classes, words in (
        (("cat", "cat", "dog"), "'cat' more than once"),
        (("cat", 7), "7 is not valid"),
    ):
        (line,) = told_of(coco, lambda content: None, metainfo=dict(classes=classes))
        assert words in line
