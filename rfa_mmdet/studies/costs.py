"""Measure parameters, FLOPs and speed of each method.

All methods take turns in one process that runs nothing else, so other load on the machine affects
them equally.
"""

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, FUNCTIONS, init_default_scope

from rfa_mmdet.analysis.complexity import Complexity, detector_complexity
from rfa_mmdet.analysis.machine import describe_machine
from rfa_mmdet.errors import UserError
from rfa_mmdet.inference.detector import load_detector
from rfa_mmdet.studies.study import Study

BATCHES = 4
ROUNDS = 5


def method_costs(study: Study, known: dict[str, Any]) -> dict[str, Any]:
    """Measure the methods that have a finished run.

    Args:
        study (Study): The study.
        known (dict): Earlier result, returned unchanged if it has all these methods, with the same
            models and pipelines.

    Returns:
        dict[str, Any]: ``machine``, ``versions`` and ``threads``; ``image_size``, (height, width)
        of the network's input; ``train_batch``, images per iteration; and ``methods``, which maps
        names to ``parameters``, ``flops`` (None if they, or operators that the first method does
        not have, cannot be counted), ``image_seconds`` with post-processing, and
        ``iteration_seconds``, both medians without data loading. ``digests`` maps names to digests
        of their configs.

    Raises:
        UserError: A checkpoint or the data cannot be read.
    """
    checkpoints, configs = {}, {}
    for run in study.runs():
        path = run.checkpoint(study.checkpoint, study.metric)
        if run.method not in configs and run.finished and path:
            checkpoints[run.method] = str(path)
            configs[run.method] = Config.fromfile(run.config)
    digests = {method: _digest(cfg) for method, cfg in configs.items()}
    if digests.items() <= known.get("digests", {}).items():
        return known
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {m: _model(cfg, checkpoints[m]).to(device) for m, cfg in configs.items()}
    cfg, model = next(iter(configs.values())), next(iter(models.values()))
    test = _batches(cfg.test_dataloader, 1)
    train = _batches(cfg.train_dataloader, cfg.train_dataloader.batch_size)
    shape = model.data_preprocessor(copy.deepcopy(test[0]), False)["inputs"].shape[-2:]
    with torch.no_grad():
        image_seconds = _time_in_turns({m: models[m].test_step for m in models}, test)
    steps = {m: _train_step(model, configs[m]) for m, model in models.items()}
    iteration_seconds = _time_in_turns(steps, train)
    counted = {method: _complexity(cfg, tuple(shape)) for method, cfg in configs.items()}
    common = next(iter(counted.values()))
    return dict(
        **describe_machine(device),
        threads=torch.get_num_threads(),
        image_size=list(shape),
        train_batch=cfg.train_dataloader.batch_size,
        methods={
            method: dict(
                parameters=sum(p.numel() for p in models[method].parameters()),
                flops=_flops(counted[method], common),
                image_seconds=image_seconds[method],
                iteration_seconds=iteration_seconds[method],
            )
            for method in configs
        },
        digests=digests,
    )


def _digest(cfg: Config) -> str:
    """Return a digest of what the costs of a method depend on."""
    parts = cfg.to_dict()
    parts = [parts[key] for key in ("model", "train_dataloader", "test_dataloader")]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _model(cfg: Config, checkpoint: str) -> BaseModel:
    init_default_scope(cfg.get("default_scope") or "mmdet")
    return load_detector(cfg, checkpoint)


def _batches(loader: dict, size: int) -> list[dict]:
    dataset = DATASETS.build(loader["dataset"])
    options = dict(loader.get("collate_fn") or dict(type="pseudo_collate"))
    kind = options.pop("type")
    collate = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    indices = [i % len(dataset) for i in range(BATCHES * size)]
    return [
        collate([dataset[i] for i in indices[start : start + size]], **options)
        for start in range(0, len(indices), size)
    ]


def _train_step(model: BaseModel, cfg: Config) -> Callable[[dict], Any]:
    wrapper = build_optim_wrapper(model.train(), cfg.optim_wrapper)
    return lambda batch: model.train_step(batch, wrapper)


def _complexity(cfg: Config, shape: tuple[int, int]) -> Complexity | None:
    try:
        return detector_complexity(cfg, shape)
    except UserError:  # not supported for this kind of detector
        return None


def _flops(own: Complexity | None, common: Complexity | None) -> int | None:
    """Return the FLOPs of a method; None if they are not comparable with another one's."""
    if own is None or common is None or own.uncounted.keys() - common.uncounted.keys():
        return None
    return own.flops


def _time_in_turns(
    steps: dict[str, Callable[[dict], Any]], batches: list[dict]
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for i in range(1 + ROUNDS):
        for batch in batches:
            for method, step in steps.items():
                own = copy.deepcopy(batch)  # a step modifies its batch
                start = time.perf_counter()
                step(own)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i:  # the first round warms up
                    seconds[method].append(time.perf_counter() - start)
    return {method: statistics.median(own) for method, own in seconds.items()}
