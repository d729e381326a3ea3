"""Find the datasets and annotation files of a config."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.dataset import BaseDataset

from rfa_mmdet.data.voc_dataset import AnyImageXMLDataset


@dataclass(frozen=True)
class Leaf:
    """A dataset that reads files, inside any wrappers.

    Attributes:
        key (str): Its config key, as in ``--cfg-options``.
        cfg (dict): Its config.
        pipelines (tuple): Its own pipeline and those of its wrappers.
    """

    key: str
    cfg: dict
    pipelines: tuple

    def build(self) -> BaseDataset:
        """Build the dataset without reading files, so MMDetection resolves its paths."""
        return DATASETS.build({**self.cfg, "lazy_init": True, "pipeline": []})

    def transforms(self) -> Iterator[tuple[str, dict]]:
        """Yield the name and config of every transform in running order, including nested ones."""
        yield from _typed(self.pipelines[::-1])

    def reads_locally(self, image: str) -> bool:
        """Return whether the pipeline reads an image file from the local file system."""
        args = (t.get("backend_args") for name, t in self.transforms() if "LoadImage" in name)
        return all(is_local(image, one) for one in (None, *args))

    def asks(self, what: str) -> bool:
        """Return whether annotations are loaded with an option such as 'with_mask'."""
        return any(name == "LoadAnnotations" and t.get(what) for name, t in self.transforms())


def format_of(dataset: BaseDataset) -> str | None:
    """Return a dataset's format: 'coco', 'voc', or None if it reads files in its own way."""
    for base, name in ((CocoDataset, "coco"), (XMLDataset, "voc"), (AnyImageXMLDataset, "voc")):
        own = (
            getattr(type(dataset), method) is not getattr(base, method, None)
            for method in ("load_data_list", "parse_data_info")
        )
        if isinstance(dataset, base) and not any(own):
            return name
    return None


def files_of(dataset: BaseDataset) -> tuple:
    """Return what identifies a dataset's images; they may be a part of its files, ``indices``."""
    prefix = str(sorted(dataset.data_prefix.items()))
    return os.path.realpath(dataset.ann_file), prefix, str(dataset._indices)


def learns(dataset: BaseDataset) -> bool:
    """Return whether a dataset needs annotations.

    Not for tests, and not the unlabelled part of semi-supervised training, which keeps images
    without boxes.
    """
    keeps_empty = not (dataset.filter_cfg or {}).get("filter_empty_gt")
    return not (dataset.test_mode or keeps_empty)


def leaves(cfg: Config, split: str) -> list[Leaf]:
    """Return the datasets of a split.

    Args:
        cfg (Config): A detector's config.
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


@dataclass(frozen=True)
class Evaluator:
    """A metric.

    Attributes:
        key (str): Its config key.
        cfg (dict): Its config.
    """

    key: str
    cfg: dict

    @property
    def ann_file(self) -> str:
        """Its annotation file; empty if it has none."""
        return self.cfg.get("ann_file") or ""

    @property
    def takes_truth(self) -> bool:
        """Whether it is a CocoMetric that takes the ground truth from the detections' metainfo."""
        return self.is_coco and bool(self.names) and not self.ann_file

    @property
    def names(self) -> list[str]:
        """What a CocoMetric measures, e.g. 'bbox' and 'segm'; empty if it only writes results."""
        found = [] if self.cfg.get("format_only") else self.cfg.get("metric", "bbox")
        return [found] if isinstance(found, str) else list(found)

    @property
    def is_coco(self) -> bool:
        """Whether it is MMDetection's CocoMetric itself."""
        return METRICS.get(_name(self.cfg["type"])) is CocoMetric


def evaluators(cfg: Config, split: str) -> Iterator[Evaluator]:
    """Yield the evaluators of a split, except those whose annotation file is on remote storage.

    Example:
        >>> evaluator = [dict(type="CocoMetric", ann_file="s3://a.json"), dict(type="VOCMetric")]
        >>> [e.key for e in evaluators(Config(dict(val_evaluator=evaluator)), "val")]
        ['val_evaluator.1']
    """
    key = f"{split}_evaluator"
    found = cfg.get(key) or []
    metrics = {key: found} if isinstance(found, dict) else {}
    metrics.update((f"{key}.{i}", m) for i, m in enumerate(found if not metrics else ()))
    for name, metric in metrics.items():
        if is_local(metric.get("ann_file") or "", metric.get("backend_args")):
            yield Evaluator(name, metric)


def is_local(path: str, backend_args: dict | None) -> bool:
    """Return whether MMEngine reads ``path`` from the local file system.

    Example:
        >>> is_local("s3://bucket/a.json", None), is_local("a.json", dict(backend="local"))
        (False, True)
    """
    backend = (backend_args or {}).get("backend")
    return backend == "local" or (backend is None and "://" not in path)


def _typed(node: Any) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        if "type" in node:
            yield _name(node["type"]), node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _typed(child)


def _name(kind: Any) -> str:
    """Return the name of a type; in pure-Python configs, it is the class itself."""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
