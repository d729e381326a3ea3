"""Read COCO annotation files, and check every value."""

import gc
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from rfa_mmdet.data.check.report import DataError, literal, missing_path, some
from rfa_mmdet.files import file_kind, known_as
from rfa_mmdet.texts import printable

_LISTS = ("images", "annotations", "categories")
LARGEST_SIDE = 2**20  # OpenCV's
_BOM = b"\xef\xbb\xbf"


class Kind:
    """The kind of value that a field must have; ``str`` describes it."""

    code = ""  # Python expression that converts a wrong value v

    def holds(self, value: Any) -> bool:
        """Return whether a value is valid."""
        raise NotImplementedError

    def wrong(self, values: Sequence) -> list[int]:
        """Return the indices of invalid values."""
        return [i for i, value in enumerate(values) if not self.holds(value)]

    def made(self, value: Any) -> Any:
        """Convert a value as ``code`` does."""
        return value


@dataclass(frozen=True)
class Number(Kind):
    """A finite number, or an integer, which JSON may write as 1.0; a bool is not a number."""

    lowest: float = -1e30  # fits into float32
    highest: float = 1e30
    whole: bool = False

    def __str__(self) -> str:
        if self.whole:
            return f"an integer from {self.lowest:,} to {self.highest:,}"
        return "a finite number"

    @property
    def code(self) -> str:  # type: ignore[override]
        """See :class:`Kind`."""
        return "int(v)" if self.whole else "float(v)"

    def made(self, value: Any) -> Any:
        """See :class:`Kind`."""
        return int(value) if self.whole else float(value)

    def holds(self, value: Any) -> bool:
        """See :class:`Kind`; NaN is outside all limits."""
        if type(value) not in (int, float) or not self.lowest <= value <= self.highest:
            return False
        return not self.whole or value == int(value)

    def wrong(self, values: Sequence) -> list[int]:
        """See :class:`Kind`; vectorised for millions of values."""
        if set(map(type, values)) <= {int, float}:
            with suppress(OverflowError):  # integers too large for a float
                array = np.array(values, dtype=float)
                good = (self.lowest <= array) & (array <= self.highest)
                if good.all() and not (self.whole and (array % 1).any()):
                    return []
        return super().wrong(values)


class Flag(Kind):
    """0 or 1."""

    code = "int(v)"

    def __str__(self) -> str:
        return "0 or 1"

    def made(self, value: Any) -> Any:
        """See :class:`Kind`."""
        return int(value)

    def holds(self, value: Any) -> bool:
        """See :class:`Kind`."""
        return isinstance(value, (int, float)) and value in (0, 1)

    def wrong(self, values: Sequence) -> list[int]:
        """See :class:`Kind`; vectorised for millions of values."""
        few = set(map(type, values)) <= {int, bool, float} and set(values) <= {0, 1}
        return [] if few else super().wrong(values)


class Text(Kind):
    """A non-empty string that is safe for files and terminals."""

    code = "str(v)"

    def __str__(self) -> str:
        return "text without control characters"

    def holds(self, value: Any) -> bool:
        """See :class:`Kind`."""
        if not isinstance(value, str) or not value:
            return False
        # Joiners between letters are not printable either, but harmless.
        return value.isprintable() or not any(
            c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff" for c in value
        )

    def made(self, value: Any) -> Any:
        """See :class:`Kind`."""
        return str(value) if isinstance(value, int) else value


class Box(Kind):
    """``[x, y, w, h]``."""

    code = "[float(n) for n in v]"

    def __str__(self) -> str:
        return "[x, y, w, h] with finite numbers"

    def made(self, value: Any) -> Any:
        """See :class:`Kind`."""
        return [float(number) for number in value]

    def holds(self, value: Any) -> bool:
        """See :class:`Kind`."""
        return isinstance(value, list) and len(value) == 4 and all(map(Number().holds, value))

    def wrong(self, values: Sequence) -> list[int]:
        """See :class:`Kind`; vectorised for millions of values."""
        fours = set(map(type, values)) <= {list} and set(map(len, values)) <= {4}
        if fours and not Number().wrong(list(chain.from_iterable(values))):
            return []
        return super().wrong(values)


# pycocotools sorts ids with NumPy, which may confuse ids beyond 2 ** 53.
ID = Number(-(2**53), 2**53, whole=True)
SIDE = Number(1, LARGEST_SIDE, whole=True)


def read_coco(path: str, annotated: bool = True, evaluated: bool = False) -> dict:
    """Read an annotation file.

    Args:
        path (str): The file.
        annotated (bool): Whether ``annotations`` is required; COCO's test images for submissions
            have none. Defaults to True.
        evaluated (bool): Whether pycocotools evaluates detections with the file, which has more
            requirements than training. Defaults to False.

    Returns:
        dict: The content, with all lists and all required fields.

    Raises:
        DataError: The file is truncated, not JSON, or not in COCO format; one line per field.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path} contains a {type(content).__name__}; the COCO format is a dict with {_lists()}"
        )
    if not annotated:
        content.setdefault("annotations", [])
    lacking = [name for name in _LISTS if not isinstance(content.get(name), list)]
    if lacking:
        have = (f"{printable(key)[:40]!r} ({type(v).__name__})" for key, v in content.items())
        raise DataError(
            f"{path} has no list {lacking[0]!r}, only {some(have, 8)}; the COCO format needs "
            f"{_lists()}"
        )
    odd = [f"{name}[{i}]" for name in _LISTS for i, e in enumerate(content[name])
           if not isinstance(e, dict)]  # fmt: skip
    if odd:
        raise DataError(f"{path}: {len(odd)} entries are not dicts: {some(odd)}")
    problems = [*_problems(path, content, evaluated)]
    if problems:
        raise DataError("\n".join(problems))
    return content


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Disable garbage collection, which triples the time for COCO's millions of objects."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def to_fix(path: str, statement: str) -> str:
    """Return the end of a message: a command that runs ``statement`` on a file's content ``c``.

    Example:
        >>> to_fix("a.json", "c['images'].sort(key=str)")[:37]
        '. To fix the file:  python -c "import'
    """
    if not statement:
        return ""
    code = (
        f"import json; p = {path!r}; c = json.load(open(p)); {statement}; "
        "json.dump(c, open(p, 'w'))"
    )
    plain = not set(code) & set('"$`\\!')
    return ". To fix the file:  python -c " + (f'"{code}"' if plain else shlex.quote(code))


def _lists() -> str:
    return "the lists " + ", ".join(map(repr, _LISTS))


def _read_json(path: str) -> Any:
    try:
        if file_kind(path) != "a file":
            raise DataError(missing_path(path))
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with garbage_kept():
            # Given bytes, json also accepts UTF-16, which pycocotools does not.
            return json.loads(data.decode())
    except RecursionError as error:
        raise DataError(f"{path} is nested too deeply for the COCO format") from error
    except ValueError as error:  # invalid JSON or text, or a number with more than 4300 digits
        raise DataError(_no_json(path, data, error)) from error


def _no_json(path: str, data: bytes, error: ValueError) -> str:
    """Describe why a file cannot be read, and the fix."""
    what = f"{path} ({len(data):,} bytes)"
    name = shlex.quote(path)
    if known := known_as(data[:32]):
        return f"{what} is {known}, not JSON"
    if data.startswith(_BOM):
        remove = f"sed -i '1s/^\\xEF\\xBB\\xBF//' {name}"
        return (
            f"{what} starts with a byte order mark, which pycocotools cannot read; to fix the "
            f"file:  {remove}"
        )
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        wide = "UTF-32" if b"\0\0" in data[:4] else "UTF-16"
        return (
            f"{what} is encoded in {wide}, which pycocotools cannot read; to convert the file:  "
            f"iconv -f {wide} -t UTF-8 {name} > utf8.json"
        )
    if isinstance(error, UnicodeDecodeError):
        return f"{what} is not JSON: invalid UTF-8 at byte {error.start:,}"
    if not isinstance(error, json.JSONDecodeError):
        return f"{what} cannot be parsed: {error}"
    where = f"at character {error.pos:,} (line {error.lineno})"
    if error.msg == "Extra data":
        rest = error.doc[error.pos :].lstrip()
        more = "another value (JSON lines?)" if rest[:1] in "{[" else f"{literal(rest[:20])}"
        return f"{what} continues after the end of its JSON: {more}, {where}"
    return f"{what} is truncated or not JSON: {error.msg} {where}; copy or export it again"


def _problems(path: str, content: dict, evaluated: bool) -> Iterator[str]:
    images, annotations = content["images"], content["annotations"]
    of = {name: _Entries(path, name, content[name]) for name in _LISTS}
    # pycocotools also accepts strings as ids, if all are strings.
    named = bool(images) and all(isinstance(image.get("id"), str) for image in images)
    id_of_image = Text() if named else ID
    url = "[i.update(file_name=i['coco_url'].rsplit('/', 1)[-1]) for i in c['images']]"
    has_url = all(isinstance(i.get("coco_url"), str) for i in images if i.get("file_name") is None)
    yield from of["images"].check("id", id_of_image)
    yield from of["images"].check("file_name", Text(), absent=url if has_url else "")
    yield from of["images"].check("width", SIDE)
    yield from of["images"].check("height", SIDE)
    yield from of["images"].repeated()
    yield from of["categories"].check("id", ID)
    yield from of["categories"].check("name", Text())
    yield from of["categories"].repeated()

    number = "[a.update(id=i) for i, a in enumerate(c['annotations'], 1)]"
    area = (
        "[a.update(area=a['bbox'][2] * a['bbox'][3]) for a in c['annotations'] "
        "if a.get('area') is None]"
    )
    crowd = "[a.update(iscrowd=a.get('iscrowd') or 0) for a in c['annotations']]"
    check = of["annotations"].check
    # Training only needs an annotation's id as a name; pycocotools computes with it.
    ids = [annotation.get("id") for annotation in annotations]
    as_names = not evaluated and set(map(type, ids)) == {str}
    yield from check("id", Text() if as_names else ID, absent=number, wrong=number)
    if evaluated and (zeros := ids.count(0)):
        yield (
            f"{path}: {zeros} of {len(ids)} annotations have the 'id' 0, which pycocotools treats "
            f"as no match, so AP would be too low; ids must start at 1{to_fix(path, number)}"
        )
    yield from of["annotations"].repeated(number)
    yield from check("image_id", id_of_image)
    yield from check("category_id", ID)
    yield from check("bbox", Box())
    yield from check("area", Number(), absent=area)
    yield from check("iscrowd", Flag(), needed=evaluated, absent=crowd)
    yield from check("ignore", Flag(), needed=False)


class _Entries(NamedTuple):
    """One of the three lists of a file."""

    path: str
    name: str
    entries: list[dict]

    def check(
        self, key: str, kind: Kind, needed: bool = True, absent: str = "", wrong: str = ""
    ) -> Iterator[str]:
        """Yield where a field is missing, and where its value is invalid.

        Args:
            key (str): The field.
            kind (Kind): The required kind of value.
            needed (bool): Whether the field is required; null counts as missing.
            absent, wrong (str): Statements that fix missing and invalid values; see :func:`to_fix`.
        """
        entries = self.entries
        values: list = [entry.get(key) for entry in entries]
        where: Sequence[int] = range(len(values))
        if not needed and values.count(None) == len(values):
            return
        if None in values:
            lacking = [i for i, value in enumerate(values) if value is None]
            where = [i for i, value in enumerate(values) if value is not None]
            if needed:
                yield (
                    f"{self.path}: {len(lacking)} of {len(entries)} {self.name} have no {key!r}: "
                    f"{self._places(lacking)}; it must be {kind}{to_fix(self.path, absent)}"
                )
            values = [values[i] for i in where]
        bad = kind.wrong(values)
        if not bad:
            return
        if not wrong and _can_be_made(kind, [values[i] for i in bad]):
            wrong = (
                f"[e.update({key}={kind.code}) for e in c[{self.name!r}] "
                f"for v in [e.get({key!r})] if v is not None]"
            )
        counts = Counter(literal(values[i]) for i in bad).most_common()
        yield (
            f"{self.path}: {len(bad)} of {len(entries)} {self.name} have an invalid {key!r}, e.g. "
            f"{some((f'{value} ({count})' for value, count in counts), 3)}, at "
            f"{self._places([where[i] for i in bad])}; it must be {kind}"
            f"{to_fix(self.path, wrong)}"
        )

    def repeated(self, fix: str = "") -> Iterator[str]:
        """Yield the ids that occur more than once."""
        ids = [entry.get("id") for entry in self.entries]
        with suppress(TypeError):  # ids that are lists; already reported as invalid
            if len(set(ids)) == len(ids):
                return
            twice = {i: n for i, n in Counter(ids).items() if n > 1 and i is not None}
            if twice:
                yield (
                    f"{self.path}: the 'id' of {self.name} must be unique, but these occur more "
                    f"than once: {some(f'{literal(i)} ({n})' for i, n in twice.items())}"
                    f"{to_fix(self.path, fix)}"
                )

    def _places(self, indices: Sequence[int]) -> str:
        first = indices[:3]
        places = [f"{self.name}[{i}] (id {literal(self.entries[i].get('id'))})" for i in first]
        return ", ".join(places) + (", ..." if len(indices) > len(first) else "")


def _can_be_made(kind: Kind, values: list) -> bool:
    with suppress(TypeError, ValueError, OverflowError):
        return all(isinstance(v, (str, int, list)) and kind.holds(kind.made(v)) for v in values)
    return False


def of_no_category(path: str, content: dict) -> Iterator[str]:
    """Report annotations without a category, which MMDetection drops.

    Args:
        path (str): The file.
        content (dict): Returned by :func:`read_coco`.
    """
    used = [annotation["category_id"] for annotation in content["annotations"]]
    known = [category["id"] for category in content["categories"]]
    counts = Counter(used)
    absent = {number: n for number, n in counts.items() if number not in {*known}}
    if not absent:
        return
    steps = [step for step in (1, -1) if {n + step for n in counts} <= {*known}]
    if steps:
        fix = f"[a.update(category_id=a['category_id'] + {steps[0]}) for a in c['annotations']]"
        what = f"all seem to be off by {steps[0]}, as if one list started at 0 and the other at 1"
    else:
        fix = (
            "k = {k['id'] for k in c['categories']}; "
            "c['annotations'] = [a for a in c['annotations'] if a['category_id'] in k]"
        )
        what = "MMDetection would ignore them, and the command removes them from the file"
    listed = some((f"{literal(number)} ({n})" for number, n in absent.items()), 5)
    yield (
        f"{path}: {sum(absent.values())} of {len(used)} annotations have a 'category_id' without "
        f"a category: {listed}; the categories: {some(map(literal, sorted(known, key=str)), 8)}; "
        f"{what}{to_fix(path, fix)}"
    )
