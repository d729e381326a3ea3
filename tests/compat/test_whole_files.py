"""A process that dies while MMEngine writes a checkpoint leaves no truncated file."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.fileio import LocalBackend, dump, get_file_backend, load
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.runner import save_checkpoint

from rfa_mmdet.compat.whole_files import WholeFileBackend, apply
from rfa_mmdet.errors import UserError
from tests.helpers.processes import PATIENCE

# The kernel kills it, like SIGKILL, in the middle of the write that exceeds the limit.
DIES = """
import resource, signal, sys
import torch
from mmengine.runner import save_checkpoint
import rfa_mmdet

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
save_checkpoint(dict(state_dict=dict(a=torch.ones(2**16))), sys.argv[1])
"""


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setitem(backends, "local", LocalBackend)
    monkeypatch.setitem(prefix_to_backends, "", LocalBackend)
    apply()


@pytest.mark.parametrize("how", ["whole", pytest.param("mmengine", marks=pytest.mark.slow)])
@pytest.mark.parametrize("before", [True, False])
def test_killed_while_writing_a_checkpoint(tmp_path, how, before):
    path = tmp_path / "epoch_1.pth"
    if before:
        torch.save(dict(state_dict=dict(a=torch.zeros(2))), path)
    command = [sys.executable, "-W", "ignore", "-c", DIES, str(path)]
    compat = dict(RFA_MMDET_COMPAT="-whole_files" if how == "mmengine" else "")
    done = subprocess.run(
        command, env={**os.environ, **compat}, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    assert sum(file.stat().st_size == 2**16 for file in tmp_path.iterdir()) == 1
    if how == "mmengine":  # the failure that the patch prevents
        assert path.stat().st_size == 2**16
    elif before:
        assert torch.load(path)["state_dict"]["a"].tolist() == [0, 0]
    else:
        assert not path.exists()


@pytest.mark.parametrize("backend_args", [None, dict(backend="local")])
def test_files_written_by_mmengine_are_unchanged(installed, tmp_path, backend_args):
    assert type(get_file_backend(tmp_path, backend_args=backend_args)) is WholeFileBackend
    path = tmp_path / "new" / "a.pth"
    for value in (1, 2):
        save_checkpoint(dict(a=torch.full((3,), value)), str(path), backend_args=backend_args)
        assert torch.load(path)["a"].tolist() == [value] * 3
    dump(dict(name="größer"), path.with_name("a.json"), backend_args=backend_args)
    assert load(path.with_name("a.json")) == dict(name="größer")
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.json", "a.pth"]


def test_other_prefixes_keep_their_backends(installed):
    assert type(get_file_backend("https://a.org/b.pth")) is backends["http"]


def test_symbolic_links_are_kept(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("old")
    os.symlink("file", link)
    WholeFileBackend().put(b"new", link)
    assert link.is_symlink()
    assert file.read_text() == "new"


def test_unwritable_files_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a\.pth: cannot be written"):
        WholeFileBackend().put(b"", tmp_path / "file" / "a.pth")
