"""What each method costs: parameters, FLOPs, and seconds an image.

Measured in one process when nothing else runs, the methods in turns, so that what else the
machine does meets all of them alike.
"""

import copy
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope, init_default_scope
from torch import nn

from rfa_mmdet.engine.ablation.folders import Folder, read_json, write_json
from rfa_mmdet.engine.ablation.spec import Spec
from rfa_mmdet.engine.complexity import detector_complexity
from rfa_mmdet.engine.errors import UserError
from rfa_mmdet.engine.model_weights import load_weights, read_checkpoint

IMAGES = 4
ROUNDS = 5


def method_costs(spec: Spec, work_dir: str | os.PathLike) -> dict[str, Any]:
    """Return what each method with a finished run costs, measured once and kept in costs.json.

    Args:
        spec (Spec): What is compared.
        work_dir (str | os.PathLike): Of the comparison.

    Returns:
        dict[str, Any]: ``device``, ``threads``, ``image_size`` (height, width as the network sees
        it), and ``methods``: by name ``parameters``, ``flops`` (None where they cannot be
        counted), and ``image_seconds``, a median, with post-processing and without loading.

    Raises:
        UserError: A checkpoint or the test data cannot be read.
    """
    path = Path(work_dir, "costs.json")
    found = {}
    for run in spec.runs():
        folder = Folder(work_dir, run)
        if run.method not in found and folder.finished and folder.checkpoint(spec.checkpoint):
            found[run.method] = folder
    known = read_json(path) or dict(methods={})
    if not found.keys() - known["methods"].keys():
        return known
    costs = _measure({m: (Config.fromfile(f.config), f) for m, f in found.items()}, spec.checkpoint)
    write_json(path, costs)
    return costs


def _measure(found: dict[str, tuple[Config, Folder]], which: str) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {
        method: _model(cfg, str(folder.checkpoint(which))).to(device)
        for method, (cfg, folder) in found.items()
    }
    cfg = next(iter(found.values()))[0]
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    batches = [pseudo_collate([dataset[i]]) for i in range(min(IMAGES, len(dataset)))]
    seconds = _time_in_turns(models, batches, device)
    first = next(iter(models.values()))
    shape = first.data_preprocessor(copy.deepcopy(batches[0]), False)["inputs"].shape[-2:]
    methods = {}
    for method, (cfg, _) in found.items():
        try:
            flops = detector_complexity(cfg, tuple(shape)).flops
        except UserError:  # a kind of detector that cannot be counted
            flops = None
        parameters = sum(parameter.numel() for parameter in models[method].parameters())
        methods[method] = dict(
            parameters=parameters, flops=flops, image_seconds=statistics.median(seconds[method])
        )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return dict(
        device=name, threads=torch.get_num_threads(), image_size=list(shape), methods=methods
    )


def _model(cfg: Config, checkpoint: str) -> nn.Module:
    init_default_scope(cfg.get("default_scope") or "mmdet")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
    load_weights(model, read_checkpoint(checkpoint), checkpoint)
    return model.eval()


@torch.no_grad()
def _time_in_turns(
    models: dict[str, nn.Module], batches: list[dict], device: torch.device
) -> dict[str, list[float]]:
    def seconds(model: nn.Module, batch: dict) -> float:
        batch = copy.deepcopy(batch)  # the detections are written into it
        start = time.perf_counter()
        model.test_step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for model in models.values():  # to warm up
        for batch in batches:
            seconds(model, batch)
    found: dict[str, list[float]] = {method: [] for method in models}
    for _ in range(ROUNDS):
        for batch in batches:
            for method, model in models.items():
                found[method].append(seconds(model, batch))
    return found
