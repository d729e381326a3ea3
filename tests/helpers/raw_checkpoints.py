"""Checkpoint files with a handwritten pickle, in both formats of torch.save."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import torch

_MAGIC = 0x1950A86A20F9469CFC6C


def write_raw(path: Path, data: bytes, zipped: bool, **storages: bytes) -> None:
    """Write a file with this pickle and float32 storages."""
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", data)
            for key, content in storages.items():
                file.writestr(f"a/data/{key}", content)
        return
    head = b"".join(pickle.dumps(part, 2) for part in (_MAGIC, 1001, {}))
    tail = b"".join(struct.pack("<q", len(c) // 4) + c for c in storages.values())
    path.write_bytes(head + data + pickle.dumps(list(storages), 2) + tail)


def unicode(text: str) -> bytes:
    """Push a string."""
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    """Push a storage on the CPU."""
    parts = unicode("storage"), f"ctorch\n{kind}\n".encode(), unicode(key), unicode("cpu")
    return b"(" + b"".join(parts) + number(numel) + b"tQ"


def number(value: int) -> bytes:
    """Push an integer."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(key: str, numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """Push a tensor."""
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    where = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride))
    hooks = b"\x89ccollections\nOrderedDict\n)R"  # requires_grad=False before
    return name + b"(" + storage(key, numel) + where + hooks + b"tR"


def torchscript() -> bytes:
    """Return a file of torch.jit.save."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), file)
    return file.getvalue()
