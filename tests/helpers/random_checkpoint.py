"""A checkpoint of an untrained detector with scores from about 0 to 1."""

import re
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope


def save_random_checkpoint(config: Path, path: Path, std: float = 0.1) -> Path:
    """Save an initialised model with classifier weights of standard deviation ``std``."""
    cfg = Config.fromfile(config)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    for name, parameter in model.named_parameters():
        if re.search(r"_(cls|reg)(\.\d+)?\.(weight|bias)$", name):
            torch.nn.init.normal_(parameter, std=std if "cls" in name else 0.01)
    # Batch norms with statistics, because maps grow from layer to layer otherwise.
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
