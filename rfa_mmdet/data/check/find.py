"""The datasets and files that a config names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import BaseDataset


@dataclass(frozen=True)
class Leaf:
    """A dataset that reads files, below whatever wrappers.

    Attributes:
        key (str): Where it is in the config, as ``--cfg-options`` would name it.
        cfg (dict): Its config.
        pipelines (tuple): Its own pipeline and those of its wrappers.
    """

    key: str
    cfg: dict
    pipelines: tuple

    def build(self) -> BaseDataset:
        """Build the dataset without reading anything, so that its paths are MMDetection's own."""
        return DATASETS.build({**self.cfg, "lazy_init": True, "pipeline": []})

    def transforms(self) -> Iterator[tuple[str, dict]]:
        """Yield name and config of every transform, those nested in other transforms too."""
        yield from _typed(self.pipelines)


def leaves(cfg: Config, split: str) -> list[Leaf]:
    """Return the datasets of a split.

    Args:
        cfg (Config): Of a detector.
        split (str): 'train', 'val' or 'test'.

    Example:
        >>> both = dict(type="ConcatDataset", datasets=[dict(type="CocoDataset")])
        >>> loader = dict(dataset=dict(type="RepeatDataset", dataset=both))
        >>> leaves(Config(dict(train_dataloader=loader)), "train")[0].key
        'train_dataloader.dataset.dataset.datasets.0'
    """
    loader = cfg.get(f"{split}_dataloader") or {}

    def walk(node: dict, key: str, pipelines: tuple) -> Iterator[Leaf]:
        pipelines = (*pipelines, node.get("pipeline", []))
        if "dataset" not in node and "datasets" not in node:
            yield Leaf(key, node, pipelines)
        if "dataset" in node:
            yield from walk(node["dataset"], f"{key}.dataset", pipelines)
        for i, child in enumerate(node.get("datasets", [])):
            yield from walk(child, f"{key}.datasets.{i}", pipelines)

    return list(walk(loader["dataset"], f"{split}_dataloader.dataset", ())) if loader else []


def evaluator_files(cfg: Config, split: str) -> Iterator[tuple[str, str]]:
    """Yield config key and path of the annotation files that a split's evaluators read.

    Example:
        >>> evaluator = [dict(type="CocoMetric", ann_file="a.json"), dict(type="VOCMetric")]
        >>> list(evaluator_files(Config(dict(val_evaluator=evaluator)), "val"))
        [('val_evaluator.0.ann_file', 'a.json')]
    """
    key = f"{split}_evaluator"
    found = cfg.get(key) or []
    metrics = {key: found} if isinstance(found, dict) else {}
    metrics.update((f"{key}.{i}", m) for i, m in enumerate(found if not metrics else ()))
    for name, metric in metrics.items():
        if metric.get("ann_file") and is_local(metric["ann_file"], metric.get("backend_args")):
            yield f"{name}.ann_file", metric["ann_file"]


def is_local(path: str, backend_args: dict | None) -> bool:
    """Tell whether MMEngine would read ``path`` from this machine's own file system.

    Example:
        >>> is_local("s3://bucket/a.json", None), is_local("a.json", dict(backend="local"))
        (False, True)
    """
    backend = (backend_args or {}).get("backend")
    return backend == "local" or (backend_args is None and "://" not in path)


def _typed(node: Any) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if "type" in node:
            # MMEngine's new-style configs hold the class itself.
            kind: Any = node["type"]
            name = kind if isinstance(kind, str) else kind.__name__
            yield name.rpartition(".")[2], node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _typed(child)
