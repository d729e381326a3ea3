"""Malicious pickles raise errors and have no side effects."""

import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from rfa_mmdet.checkpoints.safe_loading import (
    BrokenCheckpointError,
    UnsafeCheckpointError,
    load,
)
from tests.helpers.raw_checkpoints import number, storage, tensor, torchscript, unicode, write_raw

V2 = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED = b"ccollections\nOrderedDict\n"
SIZE = b"ctorch\nSize\n"
ENCODE = b"c_codecs\nencode\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
F8 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR"
AGAIN = b"h\x00" + unicode("latin1") + b"\x86R"  # encodes the first memo entry
ATTRIBUTE = b"}" + unicode("__defaults__") + b"Ns"
FOUR = struct.pack("<4f", 0, 1, 2, 3)
LOOKS_LIKE_ONE = b"\x80\x02cos\nsystem\n" + unicode("true") + b"\x85R."

REFUSED = {
    "BUILD on a function": (V2 + ATTRIBUTE + b"b", "new attributes of torch._utils._rebuild_te"),
    "BUILD on a class": (b"ctorch\nTensor\n" + ATTRIBUTE + b"b", r"attributes of torch\.Tensor"),
    "BUILD on a dtype": (b"ctorch\nfloat32\n" + ATTRIBUTE + b"b", "attributes of dtype"),
    "BUILD on a storage class": (b"ctorch\nFloatStorage\n}b", "attributes of StorageKind"),
    "BUILD on a list": (b"]}b", "attributes of list"),
    "BUILD that hides a method": (
        ORDERED + b")R}" + unicode("items") + b"K\x01sb",
        r"OrderedDict\.__setstate__.*'items'",
    ),
    "BUILD with slots": (ORDERED + b")R}}\x86b", "OrderedDict.__setstate__"),
    "BUILD of an array by a class": (ARRAY + ORDERED + b"b", r"numpy\.ndarray\.__setstate__"),
    "call of too many": (ORDERED + b"K\x01K\x02K\x03\x87R", r"collections\.OrderedDict\(1, 2, 3\)"),
    "call with a list": (SIZE + b"]R", r"torch\.Size\(list\)"),
    "call of a number": (b"K\x01)R", "a call of a int"),
    "call of a dtype": (b"ctorch\nfloat32\n)R", "a call of a dtype"),
    "call of a class that is none": (b"ctorch\nTensor\n)R", r"torch\.Tensor\(\)"),
    "size of strings": (SIZE + unicode("a") + b"\x85\x85R", r"torch\.Size\(tuple\)"),
    "size below zero": (SIZE + number(-1) + b"\x85\x85R", r"torch\.Size\(tuple\)"),
    "bytes by another codec": (ENCODE + unicode("a") + unicode("rot13") + b"\x86R", "rot13"),
    "bytearray by length": (b"c__builtin__\nbytearray\n" + number(10**11) + b"\x85R", "bytearray"),
    "counter of a list": (b"ccollections\nCounter\n]\x85R", r"collections\.Counter\(list\)"),
    "NEWOBJ of a function": (V2 + b")\x81", r"_rebuild_tensor_v2\.__new__\(\)"),
    "NEWOBJ of an array": (b"cnumpy\nndarray\n)\x81", r"numpy\.ndarray\.__new__\(\)"),
    "NEWOBJ_EX": (ORDERED + b")}\x92", "the operation NEWOBJ_EX"),
    "INST": (b"(icollections\nOrderedDict\n", "the operation INST"),
    "OBJ": (b"(" + ORDERED + b"o", "the operation OBJ"),
    "EXT1": (b"\x82\x01", "the operation EXT1"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "the operation EXT4"),
    "PERSID": (b"Pstorage\n", "the operation PERSID"),
    "PUT": (b"]p-1\n", "the operation PUT"),
    "NEXT_BUFFER": (b"\x97", "the operation NEXT_BUFFER"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 2**40), "the operation BYTEARRAY8"),
    "LONG4": (b"\x8b" + struct.pack("<i", 2**30), "the operation LONG4"),
    "id: a number": (b"K\x01Q", "not a tensor storage"),
    "id: nothing": (b")Q", "not a tensor storage"),
    "id: a module": (b"(" + unicode("module") + b"NNNNtQ", "not a tensor storage"),
    "id: of a class": (storage("0", 1).replace(b"FloatStorage", b"Tensor"), "not a tensor storage"),
    "id: less than nothing": (storage("0", -1), "not a tensor storage"),
    "id: of a half": (
        storage("0", 1).replace(b"K\x01tQ", b"G" + bytes(8) + b"tQ"),
        "not a tensor storage",
    ),
    "name: of numbers": (b"K\x01K\x02\x93", "a name that is not a string"),
    "name: by attributes": (unicode("os") + unicode("path.join") + b"\x93", r"os\.path\.join"),
    "name: of a method": (b"ccollections\nOrderedDict.fromkeys\n", r"OrderedDict\.fromkeys"),
    "item of a class": (b"ctorch\nTensor\nK\x01K\x01s", r"new items of torch\.Tensor"),
    "item of a tuple": (b")K\x01a", "new items of tuple"),
    "member of a list": (b"](K\x01\x90", "new items of list"),
    "key: a list": (b"}]Ns", "a list as a key"),
    "key: a class": (b"}ctorch\nTensor\nNs", "a Callee as a key"),
    "key: a deep tuple": (b"})" + b"\x85" * (3 * 10**5) + b"Ns", "a tuple as a key"),
    "member: a deep tuple": (b"\x8f()" + b"\x85" * (3 * 10**5) + b"\x90", "a tuple as a key"),
    "deep lists": (b"]" * 10**5 + b"a" * (10**5 - 1), "nests its data too deeply"),
    "deep tuples": (b"K\x01" + b"\x85" * 10**5, "nests its data too deeply"),
    "a class as a value": (b"]ctorch\nTensor\na", r"torch\.Tensor as a value"),
    "an array without content": (b"]" + ARRAY + b"a", "ndarray without content"),
    # 100 kB, passed to 1000 calls that copy them
    "much from little": (
        b"(" + unicode("a" * 10**5) + b"q\x00" + 1000 * (ENCODE + AGAIN) + b"t",
        "too often, for more data than the file contains",
    ),
    "array of many": (
        ARRAY + b"(K\x01" + number(10**9) + b"\x85" + F8 + b"\x89C\x01btb",
        r"numpy\.ndarray\.__setstate__.*of invalid size",
    ),
    "array of objects": (
        ARRAY + b"(K\x01" + number(10**9) + b"\x85" + F8.replace(b"f8", b"O8") + b"\x89]tb",
        r"numpy\.ndarray\.__setstate__.*of invalid size",
    ),
    "meta tensor": (
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n"
        + number(2**62)
        + number(2**62)
        + b"\x86K\x01K\x01\x86\x89tR",
        "_rebuild_meta_tensor_no_storage",
    ),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", list(REFUSED))
def test_hostile_pickle_is_rejected(tmp_path, name, zipped):
    data, asked = REFUSED[name]
    path = tmp_path / "evil.pth"
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    write_raw(path, b"\x80\x02" + data + b".", zipped)
    with pytest.raises(UnsafeCheckpointError, match=f"^{path}: not loaded, .*{asked}") as info:
        load(path)
    assert len(str(info.value)) < 900
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    assert "__defaults__" not in vars(torch.Tensor)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "EOF"),
        (b"K\x01", "EOF"),
        (b".", "IndexError"),
        (b"\xff", "the invalid operation 255"),
        (b"j\xff\xff\xff\x7f.", "Memo value not found"),
        (b"r\xff\xff\xff\x7f.", "IndexError"),
        (b"e.", "IndexError"),
        (b"\x80\x09N.", "unsupported pickle protocol: 9"),
        (b"\x95" + b"\xff" * 8 + b"N.", "FRAME|frame|EOF"),
        (b"\x8d" + b"\xff" * 8 + b"N.", "exceeds|EOF"),
        (b"X\xff\xff\xff\x7fabc", "EOF"),
        (b"X\x01\x00\x00\x00\xff.", "UnicodeDecodeError"),
        (b"}(K\x01u.", "ValueError"),
        (storage("0", 2**50) + b".", "larger than the file"),
        (storage("0", 2**70) + b".", "larger than the file"),
    ],
)
def test_invalid_pickle_bytes_are_reported_as_damage(tmp_path, data, reason, zipped):
    path = tmp_path / "broken.pth"
    write_raw(path, data, zipped)
    if not data and not zipped:  # the list of keys is read instead
        reason = "KeyError|EOF|of bytes|EOFError|IndexError"
    with pytest.raises(BrokenCheckpointError, match=f"{path} .*truncated or not.*({reason})"):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("index", [0, 255, 256, 2**31 - 1, 2**32 - 1])
def test_any_memo_index_can_be_used(tmp_path, index, zipped):
    path = tmp_path / "a.pth"
    place = struct.pack("<I", index)
    write_raw(path, b"\x80\x02]r" + place + b"j" + place + b"\x86.", zipped)
    first, second = load(path)
    assert first is second


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "array"])
def test_shared_references_do_not_blow_up(tmp_path, kind):
    """Each list contains the previous one twice; MMEngine visits all of them when saving."""

    def nested(levels):
        value = ()
        for _ in range(levels):
            array = np.empty(2, object)
            array[:] = [value, value]
            twice = dict(tuple=(value, value), list=[value, value], array=array)
            value = dict(twice, dict=dict(a=value, b=value))[kind]
        return value

    torch.save(nested(20), tmp_path / "a.pth")
    value = load(tmp_path / "a.pth")
    for _ in range(20):
        value, other = value.values() if kind == "dict" else value
        assert value is other
    assert value == ()
    torch.save(nested(90), tmp_path / "b.pth")
    with pytest.raises(UnsafeCheckpointError, match="its pickle repeats its data too often"):
        load(tmp_path / "b.pth")


def test_recursive_data_is_rejected(tmp_path):
    content = dict(a=[])
    content["a"].append(content)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match="asks for data that contains itself"):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_nested_pickle_stays_bytes(tmp_path, zipped):
    path = tmp_path / "a.pth"
    content = dict(a=LOOKS_LIKE_ONE, b=LOOKS_LIKE_ONE.decode("latin1"))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert load(path) == content


# ------------------------------------------------------------------ tensors and their storages


@pytest.mark.parametrize("zipped", [True, False])
def test_tensor_inside_its_storage(tmp_path, zipped):
    path = tmp_path / "a.pth"
    write_raw(path, b"\x80\x02" + tensor("k", 4, 1, (2, 2), (1, 1)) + b".", zipped, k=FOUR)
    assert load(path).tolist() == [[1, 2], [2, 3]]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (4, 1)),
        (5, (), ()),
        (4, (), ()),
        (9, (0,), (1,)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (2**62, 2**62), (1, 1)),
        (0, (2**63,), (0,)),
        (0, (2,), (2**62,)),
        (0, (1, 1), (1,)),
        (0, (1,) * 65, (1,) * 65),
        (0, (True,), (1,)),
        (0, 4, 1),
    ],
)
def test_tensor_outside_its_storage_is_rejected(tmp_path, offset, size, stride, zipped):
    path = tmp_path / "evil.pth"
    write_raw(path, b"\x80\x02" + tensor("k", 4, offset, size, stride) + b".", zipped, k=FOUR)
    with pytest.raises(UnsafeCheckpointError, match=r"_rebuild_tensor_v2\(.*(shape|storage)"):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("numel", [3, 5, 0])
def test_storage_of_wrong_length_is_reported_as_damage(tmp_path, numel, zipped):
    path = tmp_path / "evil.pth"
    write_raw(path, b"\x80\x02" + tensor("k", numel, 0, (0,), (1,)) + b".", zipped, k=FOUR)
    with pytest.raises(BrokenCheckpointError, match=r"storage k (has 16 bytes|does not have)"):
        load(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_missing_storage_is_reported_as_damage(tmp_path, zipped):
    path = tmp_path / "evil.pth"
    write_raw(path, b"\x80\x02" + tensor("other", 4, 0, (4,), (1,)) + b".", zipped, k=FOUR)
    with pytest.raises(BrokenCheckpointError, match=r"data/other is missing|KeyError"):
        load(path)


def test_tensor_hooks_are_rejected(tmp_path):
    path = tmp_path / "evil.pth"
    hooks = b"OrderedDict\n)R"
    data = tensor("k", 4, 0, (4,), (1,)).replace(hooks, hooks + b"K\x01K\x01s")
    write_raw(path, b"\x80\x02" + data + b".", True, k=FOUR)
    with pytest.raises(UnsafeCheckpointError, match=r"_rebuild_tensor_v2\(.*with hooks"):
        load(path)


def test_torchscript_is_rejected(tmp_path):
    path = tmp_path / "script.pth"
    path.write_bytes(torchscript())
    with pytest.raises(UnsafeCheckpointError, match="TorchScript archive, which contains code"):
        load(path)


def test_tar_file_is_rejected(tmp_path):
    """Check the format of torch 0.1, which torch.load would unpack."""
    path = tmp_path / "a.pth"
    (tmp_path / "storages").write_bytes(pickle.dumps(0, 2))
    with tarfile.open(path, "w") as file:
        file.add(tmp_path / "storages", "storages")
    with pytest.raises(BrokenCheckpointError, match=r"truncated or not a checkpoint of torch.save"):
        load(path)
