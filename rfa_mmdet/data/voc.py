"""An image's XML file in Pascal VOC's format, read alike by the data set and by its check."""

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mmengine.fileio import get

from rfa_mmdet.errors import DataError

CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Of a corner, in pixels: more is a slip of the pen, and infinite in float16.
LARGEST = 1_000_000
# What tools write for <difficult> beside whole numbers.
_DIFFICULT = dict.fromkeys(("", "unspecified", "none", "null", "false", "no", "0.0"), False)
_DIFFICULT |= dict.fromkeys(("true", "yes", "1.0"), True)
_ENCODING = re.compile(rb"""<\?xml[^>]*?\bencoding\s*=\s*["']([^"']*)["']""")


@dataclass(frozen=True)
class VocBox:
    """A box: corners, and whether it is marked as difficult, which keeps it out of training."""

    name: str
    xyxy: tuple[int, int, int, int]
    difficult: bool

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height."""
        return self.xyxy[2] - self.xyxy[0], self.xyxy[3] - self.xyxy[1]

    def is_empty(self, size: tuple[int, int] | None = None) -> bool:
        """Tell whether nothing of the box lies in an image of width and height ``size``.

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
    """What an XML file says.

    Attributes:
        filename (str | None): Of the image, as written.
        size (tuple[int, int] | None): Width and height, if the file gives them.
        names (tuple[str, ...]): Of all objects.
        boxes (tuple[VocBox, ...]): Of the objects of the wanted classes.
        corrected (tuple[str, ...]): What was put right.
        path (str): The image file, where it was looked for.
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
        classes (Collection[str]): Objects of other names are not looked into.
        correct (bool): Put right what can mean one thing only: encodings, an empty or odd
            difficult, a size that is none, blanks around names. Without it, what MMDetection's
            XMLDataset cannot read is an error.
        backend_args (dict | None): Of MMEngine's file backend. Defaults to None: local.

    Raises:
        DataError: It is cut off, not XML, or a field has no valid value.
        FileNotFoundError: There is no such file.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block
        raise DataError(f"{path}: is not a file")
    return _Reader(path, classes, correct).read(get(path, backend_args))


def told(corrected: Mapping[str, Sequence[str]]) -> str:
    """Say what was put right, in one line.

    Args:
        corrected (Mapping[str, Sequence[str]]): By what it was, the images' ids.

    Example:
        >>> told({"encoding 'gbk'": ["a", "b", "c", "d"]})
        "put right: encoding 'gbk' (4 XML files: a, b, c, ...)"
    """
    parts = [
        f"{what} ({len(ids)} XML files: {', '.join(ids[:3])}{', ...' * (len(ids) > 3)})"
        for what, ids in corrected.items()
    ]
    more = f"; and {len(parts) - 5} other things" if len(parts) > 5 else ""
    return "put right: " + "; ".join(parts[:5]) + more


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


class _Reader:
    def __init__(self, path: str, classes: Collection[str], correct: bool) -> None:
        self.path, self.classes, self.correct = path, classes, correct
        self.corrected: list[str] = []

    def read(self, content: bytes) -> VocImage:
        root = self._parse(content)
        if root.tag.startswith("{"):
            self._put_right(f"namespace {root.tag[: root.tag.index('}') + 1]!r} left out")
            for node in root.iter():
                node.tag = node.tag.rpartition("}")[2]
        objects = root.findall("object")
        if len(objects) != sum(1 for _ in root.iter("object")) or not (
            objects or root.tag == "annotation"
        ):
            self._fail(
                f"<{root.tag}> is not laid out as VOC's XML, where <annotation> has every <object> "
                "directly below it"
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

    def _put_right(self, what: str) -> None:
        if not self.correct:
            self._fail(
                f"MMDetection's XMLDataset cannot read this; type='AnyImageXMLDataset' can: {what}"
            )
        self.corrected.append(_short(what))

    def _parse(self, content: bytes) -> Any:
        try:
            return ET.fromstring(content.strip() if self.correct else content)
        # The last two for encodings that expat does not know.
        except (ET.ParseError, LookupError, ValueError) as error:
            reason = str(error)
        content = content.strip()
        declared = _ENCODING.match(content)
        encoding = declared[1].decode("latin-1") if declared else "UTF-8"
        # .NET declares UTF-16 in files that it then writes as UTF-8.
        for codec in dict.fromkeys((encoding, "UTF-8")):
            try:
                root = ET.fromstring(content.decode(codec))
            except LookupError:
                reason = f"its encoding {encoding!r} is unknown"
            except (ET.ParseError, ValueError) as error:  # UnicodeDecodeError
                reason = str(error) if codec == encoding else reason
            else:
                self._put_right(f"encoding {encoding!r}" + " read as UTF-8" * (codec != encoding))
                return root
        raise DataError(f"{self.path} ({len(content):,} bytes) is cut off or not XML: {reason}")

    def _name(self, node: Any, number: int) -> str:
        name = node.findtext("name")
        if name is None or not name.strip():
            self._fail(f"object {number} has {'no' if name is None else 'an empty'} <name>")
        if self.correct and name not in self.classes and name.strip() in self.classes:
            self._put_right(f"blanks around <name>{name.strip()}</name> left out")
            return name.strip()
        return name

    def _box(self, node: Any, name: str, where: str) -> VocBox:
        corners = node.find("bndbox")
        if corners is None:
            rotated = node.find("robndbox") is not None
            self._fail(
                f"{where} has no <bndbox> ({', '.join(CORNERS)})"
                + (", only the rotated <robndbox>, which this detector cannot learn" * rotated)
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
            self._fail(f"<difficult> of {where} is {text!r}; valid are 0 and 1")
        self._put_right(f"<difficult>{text.strip()}</difficult> read as {int(value)}")
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
        # MMDetection takes any whole number.
        if not valid and (self.correct or size is None):
            self._put_right(f"<size> of {width} x {height} taken from the image")
            return None
        return size
