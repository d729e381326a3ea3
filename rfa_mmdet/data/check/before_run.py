"""Check the data of a config before a run starts."""

import os
from collections.abc import Callable, Sequence
from functools import cache

from mmdet.datasets import CocoDataset, CocoPanopticDataset, XMLDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset

from rfa_mmdet.data.check.classes import check_given, check_heads, check_same_labels
from rfa_mmdet.data.check.coco import check_coco, check_evaluator
from rfa_mmdet.data.check.coco_file import garbage_kept, read_coco
from rfa_mmdet.data.check.find import (
    Evaluator,
    Leaf,
    evaluators,
    files_of,
    format_of,
    is_local,
    learns,
    leaves,
)
from rfa_mmdet.data.check.images import check_images
from rfa_mmdet.data.check.loaded import Loaded
from rfa_mmdet.data.check.report import DataError, Findings, literal, missing_path, some
from rfa_mmdet.data.check.voc import check_voc
from rfa_mmdet.texts import printable

PACK = "PackDetInputs"


def check_data(
    cfg: Config, splits: Sequence[str] = ("train", "val"), images: str = "quick"
) -> list[str]:
    """Check the annotation files, images and classes that a run uses.

    Datasets in COCO and VOC format are read completely; for others, only the existence of the
    annotation file is checked.

    Args:
        cfg (Config): A detector's config.
        splits (Sequence[str]): Splits to check: 'train', 'val' or 'test'. The first one determines
            how many classes the heads must have. Defaults to ('train', 'val').
        images (str): 'full' opens every image file, 'quick' a sample of each dataset. Defaults to
            'quick'.

    Returns:
        list[str]: Warnings that do not affect the purpose of the run.

    Raises:
        DataError: The run would fail, or learn or measure nothing or the wrong thing. The message
            lists all problems.
    """
    found = find_problems(cfg, splits, images)
    found.raise_errors()
    return found.warnings


@garbage_kept()
def find_problems(cfg: Config, splits: Sequence[str], images: str = "full") -> Findings:
    """Like :func:`check_data`, but return the errors instead of raising them.

    Args:
        cfg (Config): A detector's config.
        splits (Sequence[str]): 'train', 'val' or 'test'; see :func:`check_data`.
        images (str): 'full' or 'quick'; see :func:`check_data`.

    Returns:
        Findings: Errors and warnings.
    """
    found = Findings()
    labelled = []
    trained: dict[tuple, str] = {}  # files of a dataset -> its key
    for split in splits:
        read = cache(read_coco)  # a dataset and an evaluator often share a file
        every = [] if split == "train" else [*evaluators(cfg, split)]
        _check_truth(every, leaves(cfg, split), found)
        metrics = [metric for metric in every if metric.ann_file]
        evaluated = {os.path.realpath(m.ann_file) for m in metrics if m.is_coco and m.names}
        of_leaf: dict[str, tuple[BaseDataset, Loaded | None]] = {}
        for leaf in leaves(cfg, split):
            dataset = _build(leaf, found)
            if dataset is None:
                continue
            if split == "train" and dataset.ann_file:
                trained[files_of(dataset)] = leaf.key
            elif files_of(dataset) in trained:
                found.warnings.append(
                    f"{leaf.key}: the same files as {trained[files_of(dataset)]}, so it is "
                    "evaluated on training images"
                )
            loaded = _load(leaf, dataset, found, read, evaluated)
            labels = loaded.labels if loaded else dataset.metainfo.get("classes")
            # Others count things separately (panoptic), or map classes their own way (video).
            if isinstance(dataset, (CocoDataset, XMLDataset)) and not isinstance(
                dataset, CocoPanopticDataset
            ):
                labelled.append((leaf, tuple(labels)))
            of_leaf[leaf.key] = dataset, loaded
            if loaded:
                check_images(leaf, loaded, found, images)
                found.read.update(loaded.images)
        _check_any_boxes(of_leaf, found)
        for metric in metrics:
            _check_evaluator(metric, of_leaf, found, read)
    if labelled and cfg.get("model"):
        check_heads(cfg.model, *labelled[0], found)
        if not cfg.model.get("language_model"):
            check_same_labels(labelled, found)
    found.errors = [*map(printable, found.errors)]
    found.warnings = [*map(printable, found.warnings)]
    return found


def _build(leaf: Leaf, found: Findings) -> BaseDataset | None:
    try:
        check_given(leaf)
        dataset = leaf.build()
    except DataError as error:
        found.errors.append(str(error))
        return None
    # mmdet's constructors raise these for unknown keys and values.
    except (KeyError, TypeError, OSError, RuntimeError) as error:
        found.errors.append(f"{leaf.key} cannot be built: {error}")
        return None
    if isinstance(dataset, XMLDataset) and not dataset.metainfo.get("classes"):
        found.errors.append(
            f"{leaf.key}: {leaf.cfg['type']} has no default classes; set them, e.g. "
            "metainfo=dict(classes=('cat', 'dog'))"
        )
        return None
    return dataset


def _load(
    leaf: Leaf, dataset: BaseDataset, found: Findings, read: Callable, evaluated: set[str]
) -> Loaded | None:
    path = dataset.ann_file
    if not is_local(path, getattr(dataset, "backend_args", None)):
        found.warnings.append(
            f"{leaf.key}: not checked, because it is on remote storage (ann_file={path!r}, "
            f"backend_args={leaf.cfg.get('backend_args')})"
        )
        return None
    kind = format_of(dataset)
    if (path or kind) and not os.path.isfile(path):
        root = dataset.data_root
        where = f"{leaf.key}.ann_file={leaf.cfg.get('ann_file', '')!r}"
        if root and not os.path.isdir(root):
            where = f"{leaf.key}.data_root={root!r} is not a folder; {where}"
        found.errors.append(f"{where}: {missing_path(path)}")
        return None
    if kind is None:
        return None
    try:
        if kind == "voc":
            return check_voc(leaf, dataset, found)
        measured = os.path.realpath(path) in evaluated
        content = read(path, annotated=measured or learns(dataset), evaluated=measured)
        return check_coco(leaf, dataset, content, found)
    except DataError as error:
        for text in str(error).splitlines():
            found.errors.append(text if text.startswith(leaf.key) else f"{leaf.key}: {text}")
        return None


def _check_any_boxes(of_leaf: dict, found: Findings) -> None:
    """Report datasets without boxes; next to a labelled one, they may be intended."""
    trained = {k: (d, read) for k, (d, read) in of_leaf.items() if read and not d.test_mode}
    any_boxes = any(loaded.boxes for _, loaded in trained.values())
    for key, (dataset, loaded) in trained.items():
        if not loaded.boxes:
            (found.warnings if any_boxes else found.errors).append(
                f"{key}: the {len(loaded.images)} images of {dataset.ann_file} have no box to "
                f"learn from, for classes {some(map(literal, loaded.labels), 80)}"
            )


def _check_truth(metrics: Sequence[Evaluator], split: Sequence[Leaf], found: Findings) -> None:
    """Report pipelines that do not pack the ground truth of a metric without a file."""
    for metric in metrics:
        for leaf in split if metric.takes_truth else ():
            packed = [t.get("meta_keys", ()) for name, t in leaf.transforms() if name == PACK]
            if packed and not any("instances" in keys for keys in packed):
                found.errors.append(
                    f"{metric.key}: without ann_file, CocoMetric takes the ground truth from "
                    f"'instances', which the pipeline of {leaf.key} does not pack; set ann_file, "
                    f"or add 'instances' to the meta_keys of {PACK}"
                )


def _check_evaluator(
    metric: Evaluator,
    of_leaf: dict[str, tuple[BaseDataset, Loaded | None]],
    found: Findings,
    read: Callable,
) -> None:
    path = metric.ann_file
    reported = {os.path.realpath(d.ann_file) for d, loaded in of_leaf.values() if loaded is None}
    if not os.path.isfile(path):
        found.errors.append(f"{metric.key}.ann_file={path!r}: {missing_path(path)}")
    elif metric.is_coco and metric.names and os.path.realpath(path) not in reported:
        try:
            content = read(path, annotated=True, evaluated=True)
        except DataError as error:
            found.errors += [f"{metric.key}: {text}" for text in str(error).splitlines()]
            return
        coco = [read for d, read in of_leaf.values() if read and isinstance(d, CocoDataset)]
        if coco and len(coco) == len(of_leaf):
            check_evaluator(metric, content, coco, found)
