"""The configs of configs/mmseg, with MMSegmentation: dilations, two steps and predictions."""

import re

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict

from rfa_mmdet.layers import RFAConv
from tests.helpers.pages import code
from tests.helpers.paths import ROOT

pytest.importorskip("mmseg.models", reason="mmseg is not installed", exc_type=ImportError)
pytestmark = pytest.mark.slow

CONFIGS = sorted(ROOT.glob("configs/mmseg/*.py"))
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
SIZE = (64, 64)


def build(model: dict):
    init_default_scope("mmseg")
    net = revert_sync_batchnorm(MODELS.build(model))
    net.eval()  # returns None for MMSegmentation's ResNet
    return net


def retrofitted(**options):
    plain = dict(type="mmseg.ResNetV1c", depth=18, **options)
    edits = [dict(where=r"layer\d\.\d\.conv[12]", conv=dict(type="RFAConv"))]
    return build(plain), build(dict(type="mmdet.Retrofit", module=plain, edits=edits))


def test_all_promised_configs_are_shipped():
    assert {path.stem for path in CONFIGS} == {
        f"{model}_4xb4-{data}-512x512"
        for model in ("deeplabv3plus_r18-d8-rfaconv", "upernet_r18-rfaconv")
        for data in ("20k_voc12aug", "80k_ade20k")
    }


@pytest.mark.parametrize("contract", [False, True])
@pytest.mark.parametrize("multi_grid", [None, (1, 2)])
def test_dilations_hold(contract, multi_grid):
    plain, net = retrofitted(
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=contract,
        multi_grid=multi_grid,
    )
    found = {name: m for name, m in net.named_modules() if isinstance(m, RFAConv)}
    assert len(found) == 16
    for name, layer in found.items():
        conv = plain.get_submodule(name)
        for key in ("stride", "padding", "dilation"):
            assert getattr(layer, key) == getattr(conv, key), name
    assert {layer.dilation for layer in found.values()} >= {(1, 1), (2, 2)}
    load_state_dict(net, plain.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        for ours, theirs in zip(net(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def draw(root, data: str) -> None:
    random = np.random.default_rng(0)
    if data == "voc12aug":
        images, maps = "JPEGImages", ("SegmentationClass", "SegmentationClassAug")
        lists = root / "ImageSets/Segmentation"
        lists.mkdir(parents=True)
        for name in ("train", "aug", "val"):
            (lists / f"{name}.txt").write_text("0\n1\n")
        folders = [(images, maps)]
    else:
        folders = [(f"images/{s}", (f"annotations/{s}",)) for s in ("training", "validation")]
    for images, maps in folders:
        for i in range(2):
            image = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            mmcv.imwrite(image, str(root / images / f"{i}.jpg"))
            for folder in maps:
                labels = random.integers(0, 21, SIZE, dtype=np.uint8)
                mmcv.imwrite(labels, str(root / folder / f"{i}.png"))


def shrink(node) -> None:
    """Make all crops and scales of a config small."""
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            shrink(child)
    if isinstance(node, dict):
        for key in ("crop_size", "size", "scale"):
            if isinstance(node.get(key), (list, tuple)):
                node[key] = SIZE


@each_config
def test_two_steps_and_predictions(path, tmp_path):
    cfg = Config.fromfile(path)
    draw(tmp_path, "voc12aug" if "voc12aug" in path.stem else "ade20k")
    assert cfg.model.pretrained == "open-mmlab://resnet18_v1c"
    cfg.model.pretrained = str(tmp_path / "plain.pth")
    torch.save(build(cfg.model.backbone.module).state_dict(), cfg.model.pretrained)
    shrink(cfg._cfg_dict)
    for part in ("train", "val"):
        loader = cfg[f"{part}_dataloader"]
        loader.update(batch_size=2 if part == "train" else 1, num_workers=0)
        loader.persistent_workers = False
        for dataset in loader.dataset.get("datasets", [loader.dataset]):
            dataset.data_root = str(tmp_path)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    for key in ("test_dataloader", "test_evaluator", "test_cfg"):
        cfg.pop(key)
    cfg.work_dir = str(tmp_path / "work")
    runner = Runner.from_cfg(cfg)
    found = {n: m for n, m in runner.model.named_modules() if isinstance(m, RFAConv)}
    assert list(found) == [f"backbone.layer{s}.{b}.conv1" for s in (2, 3, 4) for b in (0, 1)]
    layer = next(iter(found.values()))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    runner.train()
    assert all(m.start.plain for m in found.values())
    assert any(not torch.equal(before[name], p) for name, p in layer.named_parameters())
    runner.model.eval()
    with torch.no_grad():
        (sample,) = runner.model.val_step(next(iter(runner.val_dataloader)))
    assert sample.pred_sem_seg.data.shape == (1, *SIZE)
    assert sample.seg_logits.data.shape[0] == cfg.model.decode_head.num_classes


@each_config
def test_pretrained_weights_give_the_plain_outputs(path, tmp_path):
    cfg = Config.fromfile(path)
    backbone = dict(cfg.model.backbone)
    plain = build(backbone["module"])
    plain.init_weights()
    file = tmp_path / "plain.pth"
    torch.save(plain.state_dict(), file)
    # As EncoderDecoder passes its own ``pretrained`` on.
    net = build({**backbone, "pretrained": str(file)})
    net.init_weights()
    assert all(m.start.plain for m in net.modules() if isinstance(m, RFAConv))
    x = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        for ours, theirs in zip(net(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_ten_lines_of_the_documentation_build_the_shipped_model(tmp_path):
    (text,) = [text for _, text in code("python") if '"mmseg::' in text]
    (tmp_path / "config.py").write_text(text)
    shipped = ROOT / "configs/mmseg/upernet_r18-rfaconv_4xb4-20k_voc12aug-512x512.py"
    own, theirs = (Config.fromfile(f).model for f in (tmp_path / "config.py", shipped))
    assert own.to_dict() == theirs.to_dict()
    build(own)


def test_readme_has_the_models_parameters():
    text = (ROOT / "configs/mmseg/README.md").read_text()
    rows = dict(re.findall(r"(?m)^\| \[(\S+)\]\(\1\.py\) \| [^|]+ \| ([\d,]+) \|", text))
    assert set(rows) == {path.stem for path in CONFIGS}
    for path in CONFIGS:
        model = build(Config.fromfile(path).model)
        assert rows[path.stem] == f"{sum(p.numel() for p in model.parameters()):,}"
