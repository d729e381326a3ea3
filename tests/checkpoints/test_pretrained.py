"""Pretrained weights in configs: names, URLs and files, cached and offline."""

import hashlib
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.config import Config
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner.checkpoint import CheckpointLoader

from rfa_mmdet.checkpoints import pretrained
from rfa_mmdet.checkpoints.files import read_checkpoint
from rfa_mmdet.checkpoints.pretrained import fetch_all, sources, torchvision_urls, url_of
from rfa_mmdet.errors import UserError

NOWHERE = "http://127.0.0.1:9"  # a port that nothing listens on


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return torch's download folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(tmp_path):
    """Return a URL, and the folder served there."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()


def name_weights(monkeypatch, url):
    monkeypatch.setattr(pretrained, "get_torchvision_models", lambda: {"resnet50": url})


def test_names_resolve_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # cannot be imported
    assert torchvision_urls()["resnet18"].endswith("/resnet18-f37072fd.pth")
    assert url_of("modelzoo://resnet101") == torchvision_urls()["resnet101"]
    assert url_of("open-mmlab://resnet50_caffe").startswith("https://download.openmmlab.com/")
    assert url_of("a/b.pth") is url_of("s3://a/b.pth") is None
    with pytest.raises(UserError, match="did you mean torchvision://resnet50"):
        url_of("torchvision://resnet51")


@pytest.mark.parametrize("right", [True, False])
def test_download_is_checked_against_its_hash(cache, server, monkeypatch, right):
    address, folder = server
    torch.save(dict(a=torch.ones(2)), folder / "x")
    digits = hashlib.sha256((folder / "x").read_bytes()).hexdigest()[:8] if right else "0" * 8
    (folder / "x").rename(folder / f"resnet50-{digits}.pth")
    name_weights(monkeypatch, f"{address}/resnet50-{digits}.pth")
    if right:
        loaded = CheckpointLoader.load_checkpoint("torchvision://resnet50", logger="silent")
        assert loaded["a"].tolist() == [1, 1]
        assert [file.name for file in cache.iterdir()] == [f"resnet50-{digits}.pth"]
    else:
        with pytest.raises(UserError, match="invalid hash value"):
            CheckpointLoader.load_checkpoint("torchvision://resnet50", logger="silent")
        assert not list(cache.iterdir())


def test_cached_file_needs_no_network(cache, monkeypatch, capsys):
    name_weights(monkeypatch, f"{NOWHERE}/resnet50-00000000.pth")
    torch.save(dict(a=torch.ones(2)), cache / "resnet50-00000000.pth")
    assert read_checkpoint("torchvision://resnet50")["a"].tolist() == [1, 1]
    assert "is not torchvision's file, whose SHA-256 starts" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["torchvision://resnet50", f"{NOWHERE}/resnet50-00000000.pth"])
def test_offline_error_names_the_cache_path(cache, monkeypatch, source):
    name_weights(monkeypatch, f"{NOWHERE}/resnet50-00000000.pth")
    init = dict(type=PretrainedInit, checkpoint=source)
    cfg = Config(dict(model=dict(backbone=dict(init_cfg=[init]))))
    with pytest.raises(UserError) as error:
        fetch_all(cfg, training=True)
    text = str(error.value)
    assert text.startswith(f"model.backbone.init_cfg.0.checkpoint={source!r}: ")
    assert f"copy it to {cache}/resnet50-00000000.pth" in text
    assert "--cfg-options model.backbone.init_cfg.0.checkpoint=FILE" in text
    assert "\n" not in text
    fetch_all(cfg, training=False)  # testing does not load it
    with pytest.raises(UserError, match="cannot be downloaded"):
        read_checkpoint(source)


def test_sources_of_pretrained_weights(tmp_path):
    backbone = dict(type="ResNet", init_cfg=dict(type="Pretrained", checkpoint="a"))
    model = dict(backbone=backbone, neck=dict(pretrained="b", init_cfg=dict(type="Xavier")))
    assert [source for _, source in sources(Config(dict(model=model)))] == ["a", "b"]
    with pytest.raises(UserError, match=r"load_from='no/such\.pth': no such file"):
        fetch_all(Config(dict(load_from="no/such.pth")), training=True)
