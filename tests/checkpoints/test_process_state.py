"""Loading does not affect the rest of the process, or depend on it."""

import copy
import inspect
import io
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint

from rfa_mmdet.checkpoints.safe_loading import UnsafeCheckpointError, load, load_safely
from tests.helpers.toy_checkpoints import rich_content

FORCE, DONT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_reconstruct = np.zeros(1).__reduce__()[0]

has_safe_list = pytest.mark.skipif(
    not hasattr(torch.serialization, "get_safe_globals"), reason="torch >= 2.4 has the list"
)


class Mine:
    pass


class Holder:
    def __init__(self, array=None):
        self.array = array

    def __reduce__(self):
        return (Holder, (self.array,), {"again": [self.array]})


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.pth"
    torch.save(dict(mine=Mine(), array=np.ones(2)), path)
    return str(path)


@pytest.fixture
def allowed():
    """Add objects to torch's safe globals, as a user does."""
    before = torch.serialization.get_safe_globals()
    yield torch.serialization.add_safe_globals
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def test_torch_load_is_unchanged_outside_mmengine(mine):
    original = torch.load.__wrapped__
    assert inspect.signature(torch.load) == inspect.signature(original)
    assert torch.load.__doc__ == original.__doc__
    assert pickle.loads(pickle.dumps(torch.load)) is torch.load
    assert copy.deepcopy(torch.load) is torch.load
    assert type(torch.load(mine, weights_only=False)["mine"]) is Mine
    with pytest.raises(pickle.UnpicklingError):
        torch.load(mine, weights_only=True)
    with pytest.raises(TypeError):
        torch.load()


def test_torch_load_is_restored_after_an_error(mine):
    with pytest.raises(UnsafeCheckpointError):
        _load_checkpoint(mine)
    assert type(torch.load(mine, weights_only=False)["mine"]) is Mine


@pytest.mark.parametrize("force", [None, "0", "1"])
@pytest.mark.parametrize("dont", [None, "0", "1"])
def test_torchs_environment_variables_have_no_effect(mine, tmp_path, monkeypatch, force, dont):
    for name, value in ((FORCE, force), (DONT, dont)):
        if value is not None:
            monkeypatch.setenv(name, value)
    torch.save(rich_content(), tmp_path / "good.pth")
    before = dict(os.environ)
    with pytest.raises(UnsafeCheckpointError, match=f"{__name__}.Mine"):
        _load_checkpoint(mine)
    assert _load_checkpoint(str(tmp_path / "good.pth"))["history"].mean() == 1.5
    assert dict(os.environ) == before


def test_loaders_arguments_have_no_effect(mine, tmp_path):
    torch.save(rich_content(), tmp_path / "good.pth")
    calls = [
        lambda path: torch.load(path, weights_only=False),
        lambda path: torch.load(path, "cpu", pickle, weights_only=False),
        lambda path: torch.load(f=path, map_location="cpu", pickle_module=pickle),
        lambda path: torch.serialization.load(io.BytesIO(Path(path).read_bytes()), mmap=False),
    ]

    @CheckpointLoader.register_scheme(prefixes="own://", force=True)
    def load_from_own(filename, map_location):
        number, path = filename.removeprefix("own://").split(",")
        return calls[int(number)](path)

    for number in range(len(calls)):
        with pytest.raises(UnsafeCheckpointError, match=rf"own://{number},.*Mine"):
            _load_checkpoint(f"own://{number},{mine}")
        assert _load_checkpoint(f"own://{number},{tmp_path}/good.pth")["history"].mean() == 1.5


def test_threads_do_not_see_each_other(mine, tmp_path):
    """Both are correct if one thread is in a safe load while another loads normally.

    Events enforce the order.
    """
    inside, done = threading.Event(), threading.Event()
    results = {}

    @CheckpointLoader.register_scheme(prefixes="wait://", force=True)
    def load_from_wait(filename, map_location):
        inside.set()
        assert done.wait(60)
        return torch.load(filename.removeprefix("wait://"), weights_only=False)

    def safe():
        try:
            _load_checkpoint(f"wait://{mine}")
        except UnsafeCheckpointError as error:
            results["safe"] = error

    thread = threading.Thread(target=safe)
    thread.start()
    assert inside.wait(60)
    try:
        assert type(torch.load(mine, weights_only=False)["mine"]) is Mine
    finally:
        done.set()
        thread.join(60)
    assert "Mine" in str(results["safe"])


def test_many_loads_at_once(mine, tmp_path):
    good = tmp_path / "good.pth"
    torch.save(rich_content(), good)
    wrong = []

    def plain():
        if type(torch.load(mine, weights_only=False)["mine"]) is not Mine:
            wrong.append("plain")

    def safe():
        if _load_checkpoint(str(good))["history"].mean() != 1.5:
            wrong.append("safe")

    def refused():
        try:
            _load_checkpoint(mine)
            wrong.append("refused")
        except UnsafeCheckpointError:
            pass

    def repeat(function):
        try:
            for _ in range(20):
                function()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=(f,)) for f in (plain, safe, refused) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@has_safe_list
def test_types_allowed_by_the_user_stay_allowed(mine, allowed):
    allowed([Mine, np.dtype, np.ndarray, _reconstruct])
    before = set(torch.serialization.get_safe_globals())
    content = _load_checkpoint(mine)
    assert type(content["mine"]) is Mine
    assert content["array"].tolist() == [1, 1]
    # OneDL's MMEngine changes the list while loading.
    allowed([Mine, np.dtype, np.ndarray, _reconstruct])
    assert type(load(mine)["mine"]) is Mine
    assert set(torch.serialization.get_safe_globals()) == before


@has_safe_list
def test_types_allowed_by_a_loader_are_rejected(mine, allowed):
    def load_as_onedl(cls, filename, map_location, logger):
        allowed([Mine])
        return torch.load(filename)

    with pytest.raises(UnsafeCheckpointError, match=r"asks for .*Mine"):
        load_safely(load_as_onedl)(None, str(mine))
    assert type(load(mine)["mine"]) is Mine


@has_safe_list
@pytest.mark.parametrize("zipped", [True, False])
def test_types_allowed_by_the_user_get_real_objects(tmp_path, allowed, zipped):
    allowed([(Holder, f"{__name__}.Holder")])
    content = dict(holder=Holder(np.ones(2)), kind=Holder)
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    got = _load_checkpoint(str(tmp_path / "a.pth"))
    assert got["kind"] is Holder
    assert type(got["holder"].array) is np.ndarray
    assert got["holder"].again[0].tolist() == [1, 1]


@has_safe_list
def test_modules_that_torch_blocks_are_rejected(tmp_path, allowed):
    class Call:
        def __reduce__(self):
            return os.system, ("true",)

    allowed([os.system])
    torch.save(Call(), tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match=r"(posix|nt)\.system"):
        _load_checkpoint(str(tmp_path / "a.pth"))


@has_safe_list
def test_torchs_own_safe_globals_are_rejected(tmp_path):
    """Some of these types start process groups when they are created."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    torch.save(tensor.Shard(0), tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match=r"asks for torch\.distributed\.\S+\.Shard"):
        load(tmp_path / "a.pth")


@has_safe_list
def test_add_safe_globals_is_suggested_only_for_unknown_names(tmp_path, mine):
    with pytest.raises(
        UnsafeCheckpointError, match=r"allow the types with torch.serialization.add_safe"
    ):
        _load_checkpoint(mine)
    torch.save(np.zeros(1, "f8,f8"), tmp_path / "a.pth")
    with pytest.raises(UnsafeCheckpointError, match=r"dtype\('V16'.*with plain values instead\.$"):
        _load_checkpoint(str(tmp_path / "a.pth"))
