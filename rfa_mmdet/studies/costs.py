"""What each method costs: parameters, FLOPs, seconds an image and seconds a training iteration.

Measured in one process when nothing else runs, the methods in turns, so that what else the
machine does meets all of them alike.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from rfa_mmdet.analysis.complexity import detector_complexity
from rfa_mmdet.analysis.machine import describe_machine
from rfa_mmdet.errors import UserError
from rfa_mmdet.inference.detector import load_detector
from rfa_mmdet.studies.folders import Folder, read_json, write_json
from rfa_mmdet.studies.spec import Spec

IMAGES = 4
ROUNDS = 5


def method_costs(spec: Spec, work_dir: str | os.PathLike) -> dict[str, Any]:
    """Return what each method with a finished run costs, measured once and kept in costs.json.

    Args:
        spec (Spec): What is compared.
        work_dir (str | os.PathLike): Of the comparison.

    Returns:
        dict[str, Any]: ``machine`` and ``versions``, ``threads``, ``image_size`` (height, width as
        the network sees it), ``train_batch`` (images an iteration), and ``methods``: by name
        ``parameters``, ``flops`` (None where they cannot be counted), and, medians without
        loading, ``image_seconds``, with post-processing, and ``iteration_seconds``.

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
    train_batch, iteration_seconds = _train_in_turns(
        models, {method: cfg for method, (cfg, _) in found.items()}, device
    )
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
            parameters=parameters,
            flops=flops,
            image_seconds=statistics.median(seconds[method]),
            iteration_seconds=statistics.median(iteration_seconds[method]),
        )
    return dict(
        **describe_machine(device),
        threads=torch.get_num_threads(),
        image_size=list(shape),
        train_batch=train_batch,
        methods=methods,
    )


def _model(cfg: Config, checkpoint: str) -> nn.Module:
    init_default_scope(cfg.get("default_scope") or "mmdet")
    return load_detector(cfg, checkpoint)


@torch.no_grad()
def _time_in_turns(
    models: dict[str, nn.Module], batches: list[dict], device: torch.device
) -> dict[str, list[float]]:
    # The detections are written into a batch.
    runs = {m: lambda b, m=m: models[m].test_step(copy.deepcopy(b)) for m in models}
    return _in_turns(runs, batches, device)


def _train_in_turns(
    models: dict[str, nn.Module], configs: dict[str, Config], device: torch.device
) -> tuple[int, dict[str, list[float]]]:
    cfg = next(iter(configs.values()))
    size = cfg.train_dataloader.batch_size
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    batches = [
        pseudo_collate([dataset[(i * size + j) % len(dataset)] for j in range(size)])
        for i in range(IMAGES)
    ]
    runs = {}
    for method, model in models.items():
        wrapper = build_optim_wrapper(model.train(), configs[method].optim_wrapper)
        runs[method] = lambda b, m=model, w=wrapper: m.train_step(copy.deepcopy(b), w)
    return size, _in_turns(runs, batches, device)


def _in_turns(
    runs: dict[str, Callable[[dict], Any]], batches: list[dict], device: torch.device
) -> dict[str, list[float]]:
    def seconds(run: Callable[[dict], Any], batch: dict) -> float:
        start = time.perf_counter()
        run(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in runs.values():  # to warm up
        for batch in batches:
            seconds(run, batch)
    found: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(ROUNDS):
        for batch in batches:
            for method, run in runs.items():
                found[method].append(seconds(run, batch))
    return found
