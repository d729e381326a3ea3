"""Read an image's XML file in Pascal VOC format, both for the dataset and for its check."""

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mmengine.fileio import get

from rfa_mmdet.errors import DataError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Largest corner coordinate in pixels: anything beyond is a typo, and infinite in float16.
LARGEST = 1_000_000
# Values that tools write for <difficult>, other than integers.
_DIFFICULT = dict.fromkeys(("", "unspecified", "none", "null", "false", "no", "0.0"), False)
_DIFFICULT |= dict.fromkeys(("true", "yes", "1.0"), True)
_ENCODING = re.compile(rb"""<\?xml[^>]*?\bencoding\s*=\s*["']([^"']*)["']""")


@dataclass(frozen=True)
class VocBox:
    """A box: corners, and whether it is marked as difficult, which excludes it from training."""

    name: str
    xyxy: tuple[int, int, int, int]
    difficult: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height."""
        return self.xyxy[2] - self.xyxy[0], self.xyxy[3] - self.xyxy[1]

    def is_empty(self, size: tuple[int, int] | None = None) -> bool:
        """Return whether the box has no area in an image of width and height ``size``.

        Example:
            >>> box = VocBox("cat", (65, 1, 80, 9), False)  # pixels are counted from 1
            >>> box.is_empty(), box.is_empty((64, 48)), box.is_empty((65, 48))
            (False, True, False)
        """
        x1, y1, x2, y2 = self.xyxy
        if size:
            x1, y1 = max(x1, 1), max(y1, 1)
            x2, y2 = min(x2, size[0] + 1), min(y2, size[1] + 1)
        return x2 <= x1 or y2 <= y1


@dataclass(frozen=True)
class VocImage:
    """The content of an XML file.

    Attributes:
        filename (str | None): The image's ``<filename>``, as written.
        size (tuple[int, int] | None): Width and height, if the file gives them.
        names (tuple[str, ...]): Class names of all objects.
        boxes (tuple[VocBox, ...]): Boxes of the objects of the wanted classes.
        corrected (tuple[str, ...]): Descriptions of what was corrected.
        path (str): The image file, if it was searched for.
    """

    filename: str | None
    size: tuple[int, int] | None
    names: tuple[str, ...]
    boxes: tuple[VocBox, ...]
    corrected: tuple[str, ...] = ()
    path: str = ""


def read_voc(
    path: str, classes: Collection[str], correct: bool = False, backend_args: dict | None = None
) -> VocImage:
    """Read an XML file.

    Args:
        path (str): The XML file.
        classes (Collection[str]): Wanted classes; other objects are only named.
        correct (bool): Correct what is unambiguous: encodings, an empty or unusual
            ``<difficult>``, an invalid ``<size>``, blanks around names. If False, anything that
            MMDetection's XMLDataset cannot read is an error. Defaults to False.
        backend_args (dict | None): Arguments of MMEngine's file backend. Defaults to None: local.

    Raises:
        DataError: The file is truncated, not XML, or a field is invalid.
        FileNotFoundError: The file does not exist.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would block
        raise DataError(f"{path}: is not a file")
    return _Reader(path, classes, correct).read(get(path, backend_args))


def describe_corrections(corrected: Mapping[str, Sequence[str]]) -> str:
    """Return a one-line summary of corrections.

    Args:
        corrected (Mapping[str, Sequence[str]]): Correction -> ids of the images.

    Example:
        >>> describe_corrections({"encoding 'gbk'": ["a", "b", "c", "d"]})
        "corrected: encoding 'gbk' (4 XML files: a, b, c, ...)"
    """
    parts = [
        f"{what} ({len(ids)} XML files: {', '.join(ids[:3])}{', ...' * (len(ids) > 3)})"
        for what, ids in corrected.items()
    ]
    more = f"; and {len(parts) - 5} more" if len(parts) > 5 else ""
    return "corrected: " + "; ".join(parts[:5]) + more


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


class _Reader:
    def __init__(self, path: str, classes: Collection[str], correct: bool) -> None:
        self.path, self.classes, self.correct = path, classes, correct
        self.corrected: list[str] = []

    def read(self, content: bytes) -> VocImage:
        root = self._parse(content)
        if root.tag.startswith("{"):
            self._correct(f"namespace {root.tag[: root.tag.index('}') + 1]!r} removed")
            for node in root.iter():
                node.tag = node.tag.rpartition("}")[2]
        objects = root.findall("object")
        if len(objects) != sum(1 for _ in root.iter("object")) or not (
            objects or root.tag == "annotation"
        ):
            self._fail(
                f"<{root.tag}> is not in VOC format, where every <object> is a direct child of "
                "<annotation>"
            )
        names, boxes = [], []
        for number, node in enumerate(objects, 1):
            name = self._name(node, number)
            names.append(name)
            if name in self.classes:
                boxes.append(self._box(node, name, f"object {number} ({name!r})"))
        filename = (root.findtext("filename") or "").strip() or None
        size = self._size(root.find("size"))
        return VocImage(filename, size, tuple(names), tuple(boxes), tuple(self.corrected))

    def _fail(self, what: str) -> NoReturn:
        raise DataError(f"{self.path}: {_short(what)}")

    def _correct(self, what: str) -> None:
        if not self.correct:
            self._fail(
                f"MMDetection's XMLDataset cannot read this; type='AnyImageXMLDataset' can: {what}"
            )
        self.corrected.append(_short(what))

    def _parse(self, content: bytes) -> Any:
        try:
            return ET.fromstring(content.strip() if self.correct else content)
        # LookupError and ValueError: encodings that expat does not support.
        except (ET.ParseError, LookupError, ValueError) as error:
            reason = str(error)
        content = content.strip()
        declared = _ENCODING.match(content)
        encoding = declared[1].decode("latin-1") if declared else "UTF-8"
        # .NET declares UTF-16 but then writes UTF-8.
        for codec in dict.fromkeys((encoding, "UTF-8")):
            try:
                root = ET.fromstring(content.decode(codec))
            except LookupError:
                reason = f"its encoding {encoding!r} is unknown"
            except (ET.ParseError, ValueError) as error:  # UnicodeDecodeError
                reason = str(error) if codec == encoding else reason
            else:
                self._correct(f"encoding {encoding!r}" + " read as UTF-8" * (codec != encoding))
                return root
        raise DataError(f"{self.path} ({len(content):,} bytes) is truncated or not XML: {reason}")

    def _name(self, node: Any, number: int) -> str:
        name = node.findtext("name")
        if name is None or not name.strip():
            self._fail(f"object {number} has {'no' if name is None else 'an empty'} <name>")
        if self.correct and name not in self.classes and name.strip() in self.classes:
            self._correct(f"blanks around <name>{name.strip()}</name> removed")
            return name.strip()
        return name

    def _box(self, node: Any, name: str, where: str) -> VocBox:
        corners = node.find("bndbox")
        if corners is None:
            rotated = node.find("robndbox") is not None
            self._fail(
                f"{where} has no <bndbox> ({', '.join(CORNERS)})"
                + (", only a rotated <robndbox>, which is not supported" * rotated)
            )
        x1, y1, x2, y2 = (self._corner(corners, key, where) for key in CORNERS)
        return VocBox(name, (x1, y1, x2, y2), self._difficult(node, where))

    def _corner(self, node: Any, key: str, where: str) -> int:
        text = node.findtext(key)
        if text is None:
            have = ", ".join(f"<{child.tag}>" for child in node) or "nothing"
            self._fail(f"<bndbox> of {where} has no <{key}>, only {have}")
        try:
            value = int(float(text))
        except (ValueError, OverflowError):  # NaN, infinite
            value = LARGEST + 1
        if abs(value) > LARGEST:
            self._fail(f"<{key}> of {where} is {text!r}, not a number up to {LARGEST:,}")
        return value

    def _difficult(self, node: Any, where: str) -> bool:
        text = node.findtext("difficult", "0")
        try:
            return int(text) != 0
        except ValueError:
            value = _DIFFICULT.get(text.strip().lower())
        if value is None:
            self._fail(f"<difficult> of {where} is {text!r}; must be 0 or 1")
        self._correct(f"<difficult>{text.strip()}</difficult> read as {int(value)}")
        return value

    def _size(self, node: Any) -> tuple[int, int] | None:
        if node is None:
            return None
        width, height = (node.findtext(key) for key in ("width", "height"))
        try:
            size = int(width), int(height)
            valid = min(size) > 0
        except (TypeError, ValueError):
            size, valid = None, False
        # MMDetection accepts any integer.
        if not valid and (self.correct or size is None):
            self._correct(f"<size> of {width} x {height} taken from the image")
            return None
        return size
