"""Read the two file formats of ``torch.save`` with a restricted unpickler.

``torch.load`` cannot be used: whether it accepts another unpickler depends on environment
variables, it runs TorchScript, unpacks tar files, and trusts the sizes that a pickle gives.
"""

import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.serialization import default_restore_location

from rfa_mmdet.checkpoints.tensors import Storage
from rfa_mmdet.checkpoints.unpickler import (
    Damaged,
    Maker,
    Refused,
    Scanner,
    StorageId,
    UnknownNames,
)

# First number and protocol of the format before PyTorch 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DAMAGE = (
    *(AssertionError, AttributeError, EOFError, LookupError, OverflowError, TypeError, ValueError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, NotImplementedError),
)


class _MovingError(Exception):
    """An error of map_location or of a missing device, not of the file."""

    def __init__(self, error: Exception):
        self.error = error


class Tables(NamedTuple):
    """The types that a pickle may contain.

    Attributes:
        names (Mapping[str, Any]): See :class:`~rfa_mmdet.checkpoints.unpickler.Maker`.
        builders (Mapping[type, Callable]): See :class:`~rfa_mmdet.checkpoints.unpickler.Maker`.
    """

    names: Mapping[str, Any]
    builders: Mapping[type, Callable[[Any, Any], None]]


def read(file: BinaryIO, map_location: Any, tables: Tables, encoding: str = "utf-8") -> Any:
    """Read a file written by ``torch.save``.

    Args:
        file (BinaryIO): An open, seekable file.
        map_location (Any): As for ``torch.load``.
        tables (Tables): The types that the pickle may contain.
        encoding (str): Encoding of strings from Python 2. Defaults to 'utf-8'.

    Returns:
        Any: The content, with stand-ins.

    Raises:
        Refused: The pickle asks for anything else.
        Damaged: The file is truncated, or not written by ``torch.save``.
    """
    try:
        reader = _Zip if file.read(4) == b"PK\x03\x04" else _Legacy
        file.seek(0)
        return reader(file, map_location, tables, encoding).content()
    except _MovingError as error:
        raise error.error from error
    except _DAMAGE as error:
        raise Damaged(f"{type(error).__name__}: {error}".partition("\n")[0]) from error


class _Reader:
    def __init__(self, file: BinaryIO, map_location: Any, tables: Tables, encoding: str):
        self.file, self.tables, self.encoding = file, tables, encoding
        self.map_location = map_location
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def content(self) -> Any:
        raise NotImplementedError

    def scan(self, file: BinaryIO) -> dict[str, StorageId]:
        """Return the storages that a pickle refers to, if all its names are known."""
        scanner = Scanner(file, self.tables.names, self.encoding)
        try:
            scanner.load()
        except (Refused, *_DAMAGE):
            if not scanner.unknown:
                raise
        if scanner.unknown:
            raise UnknownNames(list(scanner.unknown))
        if sum(found.nbytes for found in scanner.storages.values()) > self.size:
            raise Damaged("its tensors are larger than the file")
        return scanner.storages

    def make(self, file: BinaryIO, length: int, storages: dict[str, torch.UntypedStorage]) -> Any:
        def storage(asked: StorageId) -> Storage:
            untyped = storages[asked.key]
            if asked.view is not None:
                start, count = (n * asked.dtype.itemsize for n in asked.view)
                if start + count > untyped.nbytes():
                    raise Damaged(f"a view of storage {asked.key} exceeds it")
                untyped = untyped[start : start + count]
            return Storage(untyped, asked.dtype)

        # Plain data is passed to two calls, each of which gets all of it, and names to more.
        budget = 4 * length + 2**16
        names, builders = self.tables
        return Maker(file, names, builders, storage, budget, self.encoding).load()

    def storage(self, asked: StorageId, order: str) -> torch.UntypedStorage:
        """Read a storage at the file's current position."""
        try:
            storage = torch.UntypedStorage(asked.nbytes)
        except (RuntimeError, MemoryError) as error:
            what = f"storage {asked.key} of {asked.nbytes} bytes does not fit into memory"
            raise Damaged(what) from error
        if asked.nbytes:
            data = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
            done = 0
            while done < len(data):
                count = self.file.readinto(data[done:])  # type: ignore[attr-defined]
                if not count:
                    raise Damaged(f"storage {asked.key} ends after {done} of {len(data)} bytes")
                done += count
        if order != sys.byteorder:
            storage.byteswap(asked.dtype)
        try:
            return self.moved(storage, asked.location)
        except Exception as error:
            raise _MovingError(error) from error

    def moved(self, storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        target = self.map_location
        if isinstance(target, dict):
            location = target.get(location, location)
        elif isinstance(target, (str, torch.device)):
            location = str(target)
        elif target is not None:
            moved = target(storage, location)
            if moved is not None:
                return moved
        return default_restore_location(storage, location)


class _Zip(_Reader):
    """Format since PyTorch 1.6: uncompressed records, data.pkl and a storage in each data/KEY."""

    def content(self) -> Any:
        with zipfile.ZipFile(self.file) as archive:
            self.records = {record.filename: record for record in archive.infolist()}
        tops = [n.removesuffix("data.pkl") for n in self.records if n.endswith("/data.pkl")]
        if any(f"{top}constants.pkl" in self.records for top in tops):
            raise Refused("belongs to a TorchScript archive, which contains code")
        if len(tops) != 1:
            raise Damaged(f"the zip file has {len(tops)} records named data.pkl")
        self.top = tops[0]
        length = self.go_to("data.pkl")
        data = self.file.read(length)
        order = "little"
        if f"{self.top}byteorder" in self.records:
            order = self.file.read(self.go_to("byteorder")).decode()
            if order not in ("little", "big"):
                raise Damaged(f"its byte order is {order!r}")
        storages = {}
        for key, asked in self.scan(BytesIO(data)).items():
            found = self.go_to(f"data/{key}")
            if found != asked.nbytes:
                raise Damaged(f"storage {key} has {found} bytes instead of {asked.nbytes}")
            storages[key] = self.storage(asked, order)
        return self.make(BytesIO(data), length, storages)

    def go_to(self, name: str) -> int:
        """Seek to a record's data, and return its length."""
        record = self.records.get(self.top + name)
        if record is None:
            raise Damaged(f"record {name} is missing")
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise Damaged(f"record {name} is compressed or encrypted")
        self.file.seek(record.header_offset)
        header = self.file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise Damaged(f"record {name} is not where the zip file's index says")
        self.file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)
        if self.file.tell() + record.file_size > self.size:
            raise Damaged(f"record {name} exceeds the file")
        return record.file_size


class _Bounded:
    """A file that refuses to read past its end; Python would first allocate the memory."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        if count > 2**16 and count > self.size - self.file.tell():
            raise EOFError("a part is longer than the file")
        return self.file.read(count)


class _Legacy(_Reader):
    """Format before PyTorch 1.6: pickles of header, content and storage keys; then the storages."""

    def content(self) -> Any:
        bounded: Any = _Bounded(self.file, self.size)
        for expected in (_MAGIC, _PROTOCOL):
            if self.plain(bounded) != expected:
                raise Damaged("it does not start like a file of torch.save")
        self.plain(bounded)
        start = self.file.tell()
        found = self.scan(bounded)
        length = self.file.tell() - start
        storages = {}
        for key in self.plain(bounded):
            asked = found[key]
            if self.file.read(8) != struct.pack("<q", asked.numel):
                raise Damaged(f"storage {key} does not have {asked.numel} elements")
            storages[key] = self.storage(asked, "little")
        self.file.seek(start)
        return self.make(bounded, length, storages)

    def plain(self, bounded: Any) -> Any:
        return Maker(bounded, {}, {}, _no_storage, 2**16).load()


def _no_storage(asked: StorageId) -> Any:
    raise Damaged(f"its header refers to storage {asked.key}")
