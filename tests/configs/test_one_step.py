"""One training step and one test step with every shipped config.

The datasets are drawn at the paths and in the formats of the configs, in a folder of the test, so
paths, classes and evaluators are the shipped ones. Only sizes are changed.
"""

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.data.shapes import make_shapes
from tests.helpers.sets import draw_sets
from tests.helpers.shipped import CONFIGS, METHODS, build, method_layers, nodes

# Each method, detector and dataset once, with the smallest model; other combinations are slow.
QUICK = [
    *(f"retinanet_r18-{method}_fpn_1x_coco" for method in METHODS),
    "faster-rcnn_r50-rfcaconv_fpn_1x_voc0712",
    "retinanet_r50-conam_fpn_1x_voc0712",
    "faster-rcnn_r50-ema_fpn_1x_visdrone",
    "mask-rcnn_r50-conam_fpn_1x_coco",
    "cascade-rcnn_r50-rfaconv_fpn_1x_coco",
    "fcos_r50-caffe-ema_fpn_gn-head_1x_coco",
    "atss_r50-conam_fpn_1x_coco",
    "rtmdet_s-rfaconv_8xb32-300e_coco",
    "yolox_s-ema_8xb8-300e_coco",
    "retinanet_r18-rfaconv_fpn_50e_custom-coco",
    "retinanet_r18-rfaconv_fpn_50e_custom-voc",
    "retinanet_r18-rfaconv_fpn_50e_roboflow",
    "atss_r18-rfaconv_fpn_8e_shapes",
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Return two training and two validation images of 160 x 128, which are 5 x 4 in stage 4.

    ConAM needs more than one 4 x 4 patch there, for a softmax over several patches.
    """
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, num_train=2, num_val=2, image_size=(160, 128), seed=3, max_objects=5)
    return root


def shrink(cfg: Config) -> Config:
    """Make a config's images, regions and batches small; keep everything else."""
    for part in nodes(cfg._cfg_dict):
        for key in ("scale", "img_scale", "crop_size", "size", "border"):
            sides = part.get(key)
            if isinstance(sides, (tuple, list)) and max(map(abs, sides)) >= 320:
                wide = sides[0] != sides[1]
                part[key] = (160, 128) if wide else tuple(side // 4 for side in sides)
        if part.get("type") == "BatchSyncRandomResize":
            part["random_size_range"] = (128, 192)
        if part.get("type") == "RandomSampler":
            part["num"] = 32
        if "nms_pre" in part and "max_per_img" in part:
            part.update(nms_pre=100, max_per_img=30)
        if "score_thr" in part:
            part["score_thr"] = 0.0  # untrained models only have low scores
    for key in ("train_dataloader", "val_dataloader"):
        cfg[key].update(batch_size=2, num_workers=0, persistent_workers=False, pin_memory=False)
    return cfg


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Replace the weights that a config downloads by random weights of a plain backbone."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def replace(cfg: Config) -> bool:
        base = plain_base(cfg)
        pretrained = [
            part["init_cfg"]
            for part in nodes(cfg._cfg_dict)
            if part.get("init_cfg") and part["init_cfg"]["type"] == "Pretrained"
        ]
        for init in pretrained:
            path = folder / re.sub(r"\W", "_", init["checkpoint"])
            if not path.exists():
                backbone = {**base.model.backbone, "init_cfg": None}
                state = build(backbone).state_dict()
                prefix = init.get("prefix", "")
                torch.save({prefix + key: value for key, value in state.items()}, path)
            init["checkpoint"] = str(path)
        return bool(pretrained)

    yield replace
    shutil.rmtree(folder)  # pytest keeps temporary files, and these are large


def batch_of(dataloader: dict) -> tuple[dict, Any]:
    loader = Runner.build_dataloader(dataloader, seed=0)
    return next(iter(loader)), loader.dataset


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in CONFIGS
    ],
)
def test_one_training_step_and_one_prediction(path, shapes, stand_in, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("DATA_ROOT", "CLASSES"):
        monkeypatch.delenv(variable, raising=False)
    # The Runner's iteration count, which BatchSyncRandomResize needs.
    MessageHub.get_current_instance().update_info("iter", 0)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    cfg = shrink(Config.fromfile(path))
    draw_sets(cfg, shapes)
    pretrained = stand_in(cfg)
    model = revert_sync_batchnorm(build(cfg.model))
    model.init_weights()

    batch, dataset = batch_of(cfg.train_dataloader)
    assert len(batch["inputs"]) == 2
    assert sum(len(sample.gt_instances) for sample in batch["data_samples"]) > 0
    classes = len(dataset.metainfo["classes"])
    slopes = {}

    def note(name):
        def add(parameter):
            slopes[name] = slopes.get(name, 0) + parameter.grad.abs().sum().item()

        return add

    found = method_layers(path, model)
    for name, layer in found.items():
        for parameter in layer.parameters():
            assert parameter.requires_grad
            parameter.register_post_accumulate_grad_hook(note(name))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    assert all(trained.issuperset(layer.parameters()) for layer in found.values())
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3  # as at the start of warm-up
    # The branches of an untrained ResNet start at zero, without gradients.
    for _ in range(1 if pretrained else 2):
        loss = model.train().train_step(batch, optimizer)["loss"].item()
        assert 0 < loss < float("inf")
    assert slopes.keys() == found.keys()
    assert min(slopes.values()) > 0
    after = [p for p in model.parameters() if p.requires_grad]
    assert any((new != old).any() for new, old in zip(after, before, strict=True))

    for name, parameter in model.named_parameters():
        if re.search(r"rtm_reg.*bias$", name):
            # Untrained, RTMDet may predict distances below zero, and such boxes are dropped.
            parameter.data.fill_(1)
    batch, dataset = batch_of(cfg.val_dataloader)
    with torch.no_grad():
        samples = model.eval().test_step(batch)
    assert len(samples) == 2
    for sample in samples:
        assert len(sample.pred_instances) > 0
        assert torch.isfinite(sample.pred_instances.bboxes).all()
        assert (
            0 <= sample.pred_instances.labels.min() <= sample.pred_instances.labels.max() < classes
        )
    evaluator = Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    evaluator.process(data_samples=samples, data_batch=batch)
    metrics = evaluator.evaluate(len(dataset))
    assert metrics
    assert all(np.isfinite(value) for value in metrics.values())
