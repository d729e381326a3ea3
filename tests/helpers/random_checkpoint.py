"""A checkpoint of a detector that was not trained, with scores from near 0 to near 1."""

import re
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope


def save_random_checkpoint(config: Path, path: Path, std: float = 0.1) -> Path:
    """Save a model as it starts, but with weights of deviation ``std`` in its classifiers."""
    cfg = Config.fromfile(config)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    for name, parameter in model.named_parameters():
        if re.search(r"_(cls|reg)(\.\d+)?\.(weight|bias)$", name):
            torch.nn.init.normal_(parameter, std=std if "cls" in name else 0.01)
    # Batch norms that have seen something: else, maps grow from layer to layer.
    noise = torch.rand(8, 3, 1, 1) + 0.2 * torch.randn(8, 3, 128, 128)
    noise = (noise - 0.5) * 4 if "mean" in cfg.model.data_preprocessor else noise * 255
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.train()
    with torch.no_grad():
        maps = model.extract_feat(noise)
        if model.with_bbox and not hasattr(model, "roi_head"):
            model.bbox_head(maps)
    metainfo = cfg.train_dataloader.dataset.get("metainfo", {})
    meta = dict(dataset_meta=dict(metainfo)) if metainfo else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path
