"""All kinds of tensors and plain values that torch.save writes are loaded unchanged."""

import collections
import io
import pickle
import sys
import zipfile
from datetime import date, datetime, timedelta, timezone
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn

from rfa_mmdet.checkpoints.safe_loading import load
from tests.helpers.raw_checkpoints import number, storage, tensor, unicode, write_raw

FORMATS = [
    dict(pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    for protocol in (2, 3, 4, 5)
    for zipped in (True, False)
]


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file


LAST = torch.channels_last
NUMBERS = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.complex128),
    *(
        getattr(torch, name)
        for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
        if hasattr(torch, "uint16")  # since 2.3; before, torch.save has no name for them
    ),
]


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_numbers(dtype, options):
    value = torch.arange(6).reshape(2, 3).to(dtype)
    got = load(saved([value, value.dtype], **options))
    assert got[1] is dtype
    assert got[0].dtype is dtype
    assert torch.equal(got[0].view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("options", FORMATS)
def test_layouts_and_sharing(options):
    base = torch.arange(24.0).reshape(4, 6)
    content = [
        *(base, base[1:3, ::2], base.t(), base[0, 0], base[:0], torch.zeros(0)),
        *(torch.ones(1).expand(1000, 1000), torch.ones(2, 3, 4, 4).to(memory_format=LAST)),
    ]
    got = load(saved(content, **options))
    for a, b in zip(got, content, strict=True):
        assert (a.shape, a.stride(), a.storage_offset()) == (
            b.shape,
            b.stride(),
            b.storage_offset(),
        )
        assert torch.equal(a, b)
    got[0][1, 0] = -1
    assert got[1][0, 0] == got[2][0, 1] == -1


@pytest.mark.parametrize("options", FORMATS)
def test_parameters(options):
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    noted = nn.Parameter(torch.ones(2))
    noted.note = ("shard", 3)
    tensor = torch.ones(2, requires_grad=True)
    tensor.note = "mine"
    got = load(saved([parameter, noted, tensor, tensor.detach()], **options))
    assert [type(p) for p in got] == [nn.Parameter] * 2 + [torch.Tensor] * 2
    assert [p.requires_grad for p in got] == [False, True, True, False]
    assert (got[1].note, got[2].note) == (("shard", 3), "mine")
    got[1].sum().backward()
    assert got[1].grad.tolist() == [1, 1]


@pytest.mark.parametrize("options", FORMATS)
def test_sparse_quantized_and_meta(options):
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    content = [
        dense.to_sparse(),
        dense.to_sparse_csr(),
        dense.to_sparse_csc(),
        torch.quantize_per_tensor(dense, 0.5, 3, torch.quint8),
        torch.quantize_per_channel(dense, torch.ones(2), torch.zeros(2), 0, torch.qint8),
    ]
    got = load(saved(content, **options))
    assert [t.layout for t in got] == [t.layout for t in content]
    for a, b in zip(got[:3], content, strict=False):
        assert torch.equal(a.to_dense(), b.to_dense())
    assert got[0].is_coalesced()
    for a, b in zip(got[3:], content[3:], strict=True):
        assert a.qscheme() == b.qscheme()
        assert torch.equal(a.dequantize(), b.dequantize())
    meta = load(saved(torch.ones(2, 3, device="meta"), **options))
    assert (meta.device.type, meta.shape) == ("meta", (2, 3))


@pytest.mark.parametrize("options", FORMATS)
def test_plain_values(options):
    shared = [1]
    content = dict(
        numbers=[None, True, False, 0, 255, 65535, -1, 2**31, -(2**70), 1.5, float("inf"), 2j],
        bytes=[b"", b"\x00\xff"],
        arrays=[bytearray(), bytearray(b"\xff")],
        strings=["", "é", "\ud800", "a" * 300],
        sets=[set(), {1, 2}],
        tuples=[(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        keys={1: 1, (1, "a"): 2, None: 3, 1.5: 4, b"k": 5},
        size=torch.Size([2, 3]),
        devices=[torch.device("cpu"), torch.device("cuda:1")],
        layout=torch.sparse_coo,
        ordered=collections.OrderedDict(b=1, a=2),
        milestones=collections.Counter([3, 3, 5]),
        shared=[shared, shared],
        config=ConfigDict(pose=dict(names=["a"]), sizes=[dict(x=(1, 2))], at=[np.ones(1)] * 0),
        last=collections.deque([1, [2]], maxlen=3),
        counts=collections.defaultdict(list, a=[1]),
        frozen=frozenset([1, "a"]),
        slices=[slice(1, None, 2), range(3)],
        paths=[Path("a/b.pth"), PureWindowsPath("c:/d")],
        times=[datetime(2026, 1, 2, 3, 4, 5, 6, timezone.utc), date(2026, 1, 2), timedelta(1, 2)],
        words=[np.str_("é"), np.bytes_(b"a")],
    )
    if options["pickle_protocol"] == 5:
        del content["arrays"]  # they have their own operation, which torch does not load either
    got = load(saved(content, **options))
    assert got == content
    assert [type(v) for v in got.values()] == [type(v) for v in content.values()]
    assert got["shared"][0] is got["shared"][1]
    for name in ("config", "last", "counts", "slices", "paths", "times", "words"):
        assert pickle.dumps(got[name]) == pickle.dumps(content[name])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("options", FORMATS)
def test_storages(options):
    tensor = torch.arange(3.0)
    typed, untyped = load(saved([tensor.storage(), torch.ones(2).untyped_storage()], **options))
    assert typed.tolist() == [0, 1, 2]
    assert typed.dtype is torch.float32
    assert bytes(untyped.untyped()) == torch.ones(2).numpy().tobytes()


def test_storage_views_from_before_torch_0_4(tmp_path):
    path = tmp_path / "a.pth"
    view = b"(" + unicode("v") + number(1) + number(2) + b"t"
    whole = storage("k", 4)
    data = tensor("k", 4, 0, (2,), (1,)).replace(whole, whole[:-2] + view + b"tQ")
    four = torch.arange(4.0).numpy().tobytes()
    write_raw(path, b"\x80\x02" + data + b".", False, k=four)
    assert load(path).tolist() == [1, 2]


@pytest.mark.parametrize("zipped", [True, False])
def test_map_location(tmp_path, zipped):
    path = str(tmp_path / "a.pth")
    torch.save(torch.ones(2), path, _use_new_zipfile_serialization=zipped)
    seen = []

    def stay(storage, location):
        seen.append((storage.nbytes(), location))

    for place in (None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, {}, stay):
        assert load(path, map_location=place).tolist() == [1, 1]
    assert seen == [(8, "cpu")]

    def away(storage, location):
        return torch.UntypedStorage(storage.nbytes(), device="meta")

    for place in ("meta", torch.device("meta"), {"cpu": "meta"}, away):
        assert load(path, map_location=place).device.type == "meta"


def test_errors_of_map_location_are_not_reported_as_damage(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save(torch.ones(2), path)

    def fail(storage, location):
        raise KeyError(location)

    with pytest.raises(KeyError, match="cpu"):
        load(path, map_location=fail)


def test_other_byte_order(tmp_path):
    path, swapped = tmp_path / "a.pth", tmp_path / "b.pth"
    other = "big" if sys.byteorder == "little" else "little"
    torch.save(torch.tensor([1, 256], dtype=torch.int16), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(swapped, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, other if name == "a/byteorder" else data)
        if "a/byteorder" not in source.namelist():
            target.writestr("a/byteorder", other)
    assert load(swapped).tolist() == [256, 1]


def test_strings_of_python_2(tmp_path):
    path = tmp_path / "a.pth"
    write_raw(path, b"\x80\x02U\x02\xc3\xa9.", True)
    assert load(path) == "é"
    assert load(path, encoding="latin1") == "Ã©"
    assert load(path, encoding="bytes") == b"\xc3\xa9"


def test_compressed_records_are_reported_as_damage(tmp_path):
    path, packed = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save(torch.zeros(10**4), path)
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match=r"data\.pkl is compressed"):
        load(packed)


def test_pickle_of_another_program_is_rejected(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(dict(a=1), 2))
    with pytest.raises(ValueError, match=r"truncated or not a checkpoint of torch.save"):
        load(path)
