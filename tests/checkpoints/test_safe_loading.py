"""Checkpoints of MMEngine load with their original content."""

import collections
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint

from rfa_mmdet.compat.safe_loading import apply
from tests.helpers.paths import ROOT
from tests.helpers.toy_checkpoints import ToyModel, rich_content

_reconstruct = np.zeros(1).__reduce__()[0]


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
        "import sys\n"
        "from tests.helpers.toy_checkpoints import apply, make_runner\n"
        "apply()\n"
        "runner = make_runner(sys.argv[1], 2, resume=True)\n"
        "runner.train()\n"
        "loss = runner.message_hub.get_scalar('train/loss').data[0]\n"
        "print('RESUMED', runner.epoch, runner.iter, len(loss), runner.optim_wrapper.optimizer"
        ".state_dict()['state'][0]['step'].item(), loss[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(work_dir)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    words = done.stdout[done.stdout.index("RESUMED") :].split()
    assert words[1:5] == ["2", "4", "4", "4.0"]
    before = _load_checkpoint(str(trained / "epoch_1.pth"))["message_hub"]["log_scalars"]
    assert float(words[5]) == pytest.approx(before["train/loss"].data[0][0])
    # state resumed from stand-ins is saved as usual
    again = _load_checkpoint(str(work_dir / "epoch_2.pth"))["message_hub"]["log_scalars"]
    assert len(again["train/loss"].data[0]) == 4


def test_applying_twice_wraps_once():
    before = CheckpointLoader.load_checkpoint.__func__
    apply()
    assert CheckpointLoader.load_checkpoint.__func__ is before


# ------------------------------------------------------------------ all that may be in one


def rename_numpy(path, module):
    """Make a checkpoint use the function names of another NumPy version."""

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
