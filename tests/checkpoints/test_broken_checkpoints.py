"""Truncated, missing and invalid checkpoints give clear errors."""

import pytest
import torch
from mmengine.runner.checkpoint import _load_checkpoint

from rfa_mmdet.checkpoints.safe_loading import BrokenCheckpointError


@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_checkpoint(trained, tmp_path, part, zipped):
    whole, path = tmp_path / "whole.pth", tmp_path / "cut.pth"
    content = _load_checkpoint(str(trained / "epoch_1.pth"))
    torch.save(content, whole, _use_new_zipfile_serialization=zipped)
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    message = f"{path} .{path.stat().st_size} bytes. is truncated"
    with pytest.raises(BrokenCheckpointError, match=message):
        _load_checkpoint(str(path))


@pytest.mark.parametrize("data", [b"", b"\0" * 20000, b"hello world\n" * 9, b"<html></html>" * 99])
def test_file_that_is_not_a_checkpoint(tmp_path, data):
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} .{len(data)} bytes. is truncated or not a check"):
        _load_checkpoint(str(path))


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none.pth")):
        _load_checkpoint(str(tmp_path / "none.pth"))


def test_unknown_model_zoo_name_is_not_reported_as_damage():
    with pytest.raises(KeyError):
        _load_checkpoint("openmmlab://no_such_model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_missing_device_is_not_reported_as_damage(trained):
    with pytest.raises(RuntimeError, match="CUDA"):
        _load_checkpoint(str(trained / "epoch_1.pth"), map_location="cuda")
