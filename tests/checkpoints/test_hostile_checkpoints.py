"""Checkpoints that would run code are rejected, and the error says what they ask for."""

import builtins
import collections
import fractions
import http.server
import os
import threading
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import _load_checkpoint

from rfa_mmdet.checkpoints.safe_loading import UnsafeCheckpointError
from tests.helpers.toy_checkpoints import rich_content

_reconstruct = np.zeros(1).__reduce__()[0]
_scalar = np.float32(1).__reduce__()[0]


class Call:
    """An object that pickles as a call of ``function``; ``state`` is passed to BUILD."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def hostile(marker):
    init = Call(getattr, HistoryBuffer, "__init__")
    f8 = np.dtype("f8")
    return {
        "system": (Call(os.system, f"touch {marker}"), r"(posix|nt)\.system"),
        "eval": (Call(eval, f"open({str(marker)!r}, 'w')"), "eval"),
        "exec": (Call(exec, f"open({str(marker)!r}, 'w')"), "exec"),
        "import": (Call(builtins.__import__, "os"), "__import__"),
        "open": (Call(open, str(marker), "w"), r"open"),
        "two": ([Call(eval, "1"), Call(os.system, "true")], r"builtins\.eval, (posix|nt)\.system;"),
        "init": (init, r"builtins\.getattr.*HistoryBuffer.*__init__"),
        "globals": (Call(getattr, init, "__globals__"), r"getattr.*__init__"),
        "subclasses": (Call(getattr, HistoryBuffer, "__subclasses__"), "getattr.*__subclasses__"),
        "mro": (Call(getattr, HistoryBuffer, "__mro__"), "getattr.*__mro__"),
        "register": (Call(getattr, HistoryBuffer, "register_statistics"), "getattr.*register_"),
        "other object": (Call(getattr, torch.Tensor, "mean"), r"getattr.*torch\.Tensor"),
        "default": (Call(getattr, HistoryBuffer, "mean", None), r"builtins\.getattr"),
        "HistoryBuffer called": (Call(HistoryBuffer, [1], [1]), "HistoryBuffer"),
        "reconstruct": (Call(_reconstruct, collections.OrderedDict, (0,), b"b"), "_reconstruct"),
        "subtype": (Call(_reconstruct, np.recarray, (0,), b"b"), r"numpy\.\S*recarray"),
        "ndarray called": (Call(np.ndarray, (4,), f8), "ndarray"),
        "structured": (np.zeros(1, "f8,O"), r"numpy\.dtype.*V16"),
        "date": (np.array(["2026-01-01"], "M8[D]"), r"numpy\.dtype.*M8"),
        "dtype state": (
            Call(np.dtype, "f8", False, True, state=(3, "<", (f8, (9,)), None, None, -1, -1, 0)),
            r"numpy\.dtype",
        ),
        "array size": (
            Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (99,), f8, False, b"1")),
            r"numpy\.ndarray",
        ),
        "array shape": (
            Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (-1, -2), f8, False, b"1" * 16)),
            r"shape",
        ),
        "object from bytes": (
            Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), 0, b"1" * 8)),
            r"numpy\.ndarray",
        ),
        "scalar": (Call(_scalar, np.dtype("O"), 1), r"numpy\S*\.scalar"),
        "bytes": (Call(bytes, 10**9), r"builtins\.bytes"),
        # torch's own list has it: a tensor in an array's memory, which BUILD would free
        "shared memory": (
            Call(torch._utils._rebuild_device_tensor_from_numpy, np.ones(3), f8.str, "cpu", False),
            r"torch\._utils\._rebuild_device_tensor_from_numpy",
        ),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", list(hostile("")))
def test_hostile_checkpoint_is_rejected(tmp_path, name, zipped):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    payload, called = hostile(marker)[name]
    content = dict(state_dict=dict(a=torch.ones(2)), meta=dict(hooks=[(payload,)]))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match=called) as info:
        _load_checkpoint(str(path))
    assert str(path) in str(info.value)
    assert "no code from it was run" in str(info.value)
    assert len(str(info.value)) < 900
    assert not marker.exists()


def test_marker_would_have_been_written(tmp_path):
    """Prove that the payloads above work."""
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save(hostile(marker)["system"][0], path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_all_unknown_names_are_listed(tmp_path, zipped):
    path = tmp_path / "evil.pth"
    content = [Call(eval, "1"), torch.ones(2), Call(os.system, "true"), fractions.Fraction()]
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    listed = r"asks for builtins\.eval, (posix|nt)\.system, fractions\.Fraction; no code"
    with pytest.raises(UnsafeCheckpointError, match=listed):
        _load_checkpoint(str(path))


def test_history_cannot_change_its_class(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    state = HistoryBuffer([1.0], [1]).__getstate__() | dict(
        statistics_methods=dict(mean=collections.OrderedDict, min=torch.Tensor),
        mean=collections.OrderedDict,
        statistics=torch.Tensor,
    )
    with monkeypatch.context() as patch:
        patch.setattr(HistoryBuffer, "__getstate__", lambda self: state)
        torch.save(dict(history=HistoryBuffer()), path)
    assert b"torch\nTensor" in zipfile.ZipFile(path).read("a/data.pkl")
    methods = dict(HistoryBuffer._statistics_methods)
    history = _load_checkpoint(str(path))["history"]
    assert type(history) is HistoryBuffer
    assert set(vars(history)) == {"max_length", "_log_history", "_count_history"}
    assert history.statistics("mean") == history.mean() == 1.0
    assert HistoryBuffer._statistics_methods == methods


def test_hostile_download_is_rejected(tmp_path, monkeypatch):
    """``torch.hub`` loads with weights_only=False."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    marker = tmp_path / "marker"
    torch.save(hostile(marker)["system"][0], tmp_path / "evil.pth")
    torch.save(rich_content(), tmp_path / "good.pth")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(UnsafeCheckpointError, match=rf"{url}/evil.pth: .*\.system"):
            _load_checkpoint(f"{url}/evil.pth")
        assert _load_checkpoint(f"{url}/good.pth")["history"].mean() == 1.5
        server.shutdown()
    assert not marker.exists()
