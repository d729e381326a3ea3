import builtins
import collections
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint

from rfa_mmdet.checkpoints.safe_loading import BrokenCheckpointError, UnsafeCheckpointError
from rfa_mmdet.compat.safe_loading import apply

_reconstruct = np.zeros(1).__reduce__()[0]
_scalar = np.float32(1).__reduce__()[0]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    apply()


# ------------------------------------------------------------------ a real run of MMEngine


class ToyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 1)

    def forward(self, x, mode="tensor"):
        out = self.fc(torch.stack(x))
        return dict(loss=out.square().mean()) if mode == "loss" else [out]


class ToyMetric(BaseMetric):
    default_prefix = "toy"

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(acc=np.float32(0.5))


def make_runner(work_dir, epochs, resume=False):
    loader = dict(
        dataset=[dict(x=torch.ones(2) * i) for i in range(4)],
        batch_size=2,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
    )
    return Runner(
        model=ToyModel(),
        work_dir=str(work_dir),
        experiment_name=f"toy{epochs}{resume}",
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        val_evaluator=Evaluator([ToyMetric()]),
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.01)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, end=2, by_epoch=False),
            dict(type="CosineAnnealingLR", T_max=4, convert_to_iter_based=True),
        ],
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1),
            checkpoint=dict(type="CheckpointHook", interval=1, save_best="toy/acc"),
        ),
        custom_hooks=[dict(type="EMAHook")],
        default_scope="mmengine",
        log_level="ERROR",
        resume=resume,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work_dir of a run of one epoch, 2 iterations."""
    work_dir = tmp_path_factory.mktemp("run")
    make_runner(work_dir, 1).train()
    return work_dir


def test_real_checkpoint_loads_into_a_model(trained):
    for name in ("epoch_1.pth", "best_toy_acc_epoch_1.pth"):
        model = ToyModel()
        checkpoint = load_checkpoint(model, str(trained / name), map_location="cpu", strict=True)
        assert torch.equal(model.fc.weight, checkpoint["state_dict"]["fc.weight"])
    assert checkpoint["meta"]["iter"] == 2
    assert type(checkpoint["ema_state_dict"]) is collections.OrderedDict
    history = checkpoint["message_hub"]["log_scalars"]["train/loss"]
    assert type(history) is HistoryBuffer
    assert type(history.data[0]) is np.ndarray
    assert history.data[0].shape == (2,)
    assert history.mean() == history.statistics("mean") == history.data[0].mean()


def test_resumes_in_a_fresh_process(trained, tmp_path):
    work_dir = tmp_path / "run"
    shutil.copytree(trained, work_dir)
    last = work_dir / "last_checkpoint"
    last.write_text(str(work_dir / "epoch_1.pth"))
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_safe_loading import make_runner\n"
        "runner = make_runner(sys.argv[2], 2, resume=True)\n"
        "runner.train()\n"
        "loss = runner.message_hub.get_scalar('train/loss').data[0]\n"
        "print('RESUMED', runner.epoch, runner.iter, len(loss), runner.optim_wrapper.optimizer"
        ".state_dict()['state'][0]['step'].item(), loss[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(work_dir)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout[done.stdout.index("RESUMED") :].split()
    assert words[1:5] == ["2", "4", "4", "4.0"]
    before = _load_checkpoint(str(trained / "epoch_1.pth"))["message_hub"]["log_scalars"]
    assert float(words[5]) == pytest.approx(before["train/loss"].data[0][0])
    # what was resumed from stand-ins is saved as MMEngine saves it
    again = _load_checkpoint(str(work_dir / "epoch_2.pth"))["message_hub"]["log_scalars"]
    assert len(again["train/loss"].data[0]) == 4


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="default of torch >= 2.6"
)
def test_plain_torch_load_keeps_its_default(trained):
    before = set(torch.serialization.get_safe_globals())
    _load_checkpoint(str(trained / "epoch_1.pth"))
    assert set(torch.serialization.get_safe_globals()) == before
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trained / "epoch_1.pth")
    assert torch.load(trained / "epoch_1.pth", weights_only=False)["meta"]["epoch"] == 1


def test_install_twice_wraps_once():
    before = CheckpointLoader.load_checkpoint.__func__
    apply()
    assert CheckpointLoader.load_checkpoint.__func__ is before


# ------------------------------------------------------------------ all that may be in one


def rich_content():
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    mixed = np.empty(4, dtype=object)
    mixed[:] = [None, "x", [1, np.ones(2)], np.arange(3)]
    return dict(
        state_dict=torch.nn.Linear(3, 4).state_dict(),
        loss_scaler=torch.amp.GradScaler("cpu").state_dict(),
        history=history,
        same_history=history,
        no_history=HistoryBuffer(),
        mixed=mixed,
        size=torch.Size([1, 2]),
        nested=(np.zeros(2), [dict(a=np.ones(1, np.float32))]),
        scalars=[np.float32(1.5), np.float64(2.5), np.int64(-3), np.bool_(True), np.float16(0.5)],
        arrays=[
            np.arange(3, dtype=np.int32),
            np.arange(3, dtype=">i4"),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.array(3.5, np.float32),
            np.zeros((0, 3)),
            np.array([True, False]),
        ],
    )


def rename_numpy(path, module):
    """Have a checkpoint name NumPy's functions as another version of NumPy does."""

    def rename(data):
        for old in (b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"):
            data = data.replace(old, b"c" + module + b"\n")
        return data

    if not zipfile.is_zipfile(path):
        path.write_bytes(rename(path.read_bytes()))
        return
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, rename(data) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_rich_content(tmp_path, zipped, module):
    path, expected = tmp_path / "a.pth", rich_content()
    torch.save(expected, path, _use_new_zipfile_serialization=zipped)
    rename_numpy(path, module)
    if zipped:
        assert module + b"\n_reconstruct" in zipfile.ZipFile(path).read("a/data.pkl")

    got = _load_checkpoint(str(path), map_location="cpu")
    assert list(got) == list(expected)
    assert got["state_dict"]._metadata == expected["state_dict"]._metadata
    assert got["loss_scaler"] == expected["loss_scaler"]
    assert got["history"] is got["same_history"]
    assert got["history"].mean() == 1.5
    got["history"].update(3.0)
    assert got["history"].current() == 3.0
    assert len(got["no_history"].data[0]) == 0
    assert got["mixed"].dtype == object
    assert got["mixed"][:2].tolist() == [None, "x"]
    assert got["mixed"][2][1].tolist() == [1.0, 1.0]
    assert got["mixed"][3].tolist() == [0, 1, 2]
    assert type(got["size"]) is torch.Size
    assert got["nested"][0].tolist() == [0.0, 0.0]
    assert got["nested"][1][0]["a"].dtype == np.float32
    for a, b in zip(got["scalars"], expected["scalars"], strict=True):
        assert type(a) is type(b)
        assert a == b
    for a, b in zip(got["arrays"], expected["arrays"], strict=True):
        assert type(a) is np.ndarray
        assert (a.dtype, a.shape, a.flags.f_contiguous) == (b.dtype, b.shape, b.flags.f_contiguous)
        assert a.flags.writeable
        assert np.array_equal(a, b)


class Mine:
    pass


def test_what_the_user_allowed_stays_allowed(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save(dict(mine=Mine(), array=np.ones(2)), path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UnsafeCheckpointError, match=f"{Mine.__module__}.Mine"):
        _load_checkpoint(str(path))
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Mine, np.dtype, np.ndarray, _reconstruct])
    try:
        assert type(_load_checkpoint(str(path))["mine"]) is Mine
        assert np.dtype in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


# ------------------------------------------------------------------ hostile ones


class Call:
    """Pickles as a call of ``function``; ``state`` goes to BUILD."""

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
        "two": ([Call(eval, "1"), Call(os.system, "true")], r"builtins\.eval.*\.system|eval"),
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
        "string": (np.array(["a"]), r"numpy\.dtype.*U1"),
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
        "scalar": (Call(_scalar, np.dtype("O"), 1), "numpy scalar"),
        "bytes": (Call(bytes, 10**9), r"builtins\.bytes"),
        # torch's own list shares an array's memory with a tensor; BUILD would then free it
        "shared memory": (
            Call(torch._utils._rebuild_device_tensor_from_numpy, np.ones(3), f8.str, "cpu", False),
            "ndarray",
        ),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", list(hostile("")))
def test_hostile_checkpoint_is_refused(tmp_path, name, zipped):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    payload, called = hostile(marker)[name]
    content = dict(state_dict=dict(a=torch.ones(2)), meta=dict(hooks=[(payload,)]))
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=called) as info:
        _load_checkpoint(str(path))
    assert str(path) in str(info.value)
    if name != "shared memory":  # here torch is asked for nothing unknown, and fails by itself
        assert type(info.value) is UnsafeCheckpointError
        assert "nothing of it was run" in str(info.value)
        assert "weights_only" not in str(info.value)
    assert len(str(info.value)) < 900
    assert not marker.exists()


def test_marker_would_have_been_written(tmp_path):
    """The payloads above are live ones."""
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save(hostile(marker)["system"][0], path)
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_all_offending_globals_are_named(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save([Call(eval, "1"), Call(os.system, "true"), collections.deque()], path)
    with pytest.raises(UnsafeCheckpointError) as info:
        _load_checkpoint(str(path))
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        for name in ("builtins.eval", ".system", "collections.deque"):
            assert name in str(info.value)


def test_history_cannot_change_its_class(tmp_path):
    path = tmp_path / "a.pth"
    state = HistoryBuffer([1.0], [1]).__getstate__().copy()
    state |= dict(
        statistics_methods=dict(mean=collections.OrderedDict, min=torch.Tensor),
        mean=collections.OrderedDict,
        statistics=torch.Tensor,
    )
    torch.save([Call(torch.Tensor), Call(_new_history, state=state)], path)
    data = zipfile.ZipFile(path).read("a/data.pkl")
    assert b"torch\nTensor" in data
    # NEWOBJ is only written for classes: put the class in the place of its maker
    entries = {n: zipfile.ZipFile(path).read(n) for n in zipfile.ZipFile(path).namelist()}
    maker = f"c{__name__}\n_new_history\n".encode()
    assert maker in data
    with zipfile.ZipFile(path, "w") as file:
        for name, entry in entries.items():
            new = b"cmmengine.logging.history_buffer\nHistoryBuffer\n"
            file.writestr(name, entry.replace(maker, new))
    methods = dict(HistoryBuffer._statistics_methods)
    history = _load_checkpoint(str(path))[1]
    assert type(history) is HistoryBuffer
    assert set(vars(history)) == {"max_length", "_log_history", "_count_history"}
    assert history.statistics("mean") == history.mean() == 1.0
    assert HistoryBuffer._statistics_methods == methods


def _new_history():
    return HistoryBuffer()


def test_hostile_download_is_refused(tmp_path, monkeypatch):
    """``torch.hub`` loads with weights_only=False in every version."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
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


# ------------------------------------------------------------------ broken ones


@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_checkpoint(trained, tmp_path, part, zipped):
    whole, path = tmp_path / "whole.pth", tmp_path / "cut.pth"
    content = _load_checkpoint(str(trained / "epoch_1.pth"))
    torch.save(content, whole, _use_new_zipfile_serialization=zipped)
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    message = f"{path} .{path.stat().st_size} bytes. is incomplete"
    with pytest.raises(BrokenCheckpointError, match=message):
        _load_checkpoint(str(path))


@pytest.mark.parametrize("data", [b"", b"\0" * 20000, b"hello world\n" * 9, b"<html></html>" * 99])
def test_no_checkpoint_at_all(tmp_path, data):
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} .{len(data)} bytes. is incomplete, or no check"):
        _load_checkpoint(str(path))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none.pth")):
        _load_checkpoint(str(tmp_path / "none.pth"))


def test_unknown_name_in_a_zoo_is_not_called_damage():
    with pytest.raises(KeyError):
        _load_checkpoint("openmmlab://no_such_model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_missing_device_is_not_called_damage(trained):
    with pytest.raises(RuntimeError, match="CUDA"):
        _load_checkpoint(str(trained / "epoch_1.pth"), map_location="cuda")


@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_one_cycle_schedule_resumes(tmp_path, strategy):
    from mmengine.optim import OneCycleLR

    def schedule():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
        return optimizer, OneCycleLR(optimizer, 0.1, total_steps=10, anneal_strategy=strategy)

    def steps(optimizer, one_cycle, count):
        rates = []
        for _ in range(count):
            optimizer.step()
            one_cycle.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    whole, broken = schedule(), schedule()
    expected = steps(*whole, 8)[4:]
    steps(*broken, 4)
    path = tmp_path / "one_cycle.pth"
    torch.save(dict(state_dict={}, schedule=broken[1].state_dict()), path)
    resumed = schedule()
    resumed[1].load_state_dict(CheckpointLoader.load_checkpoint(str(path))["schedule"])
    assert steps(*resumed, 4) == expected
