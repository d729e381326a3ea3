"""What is wrong with the data of a config, found before a run starts, in words."""

import os
from collections.abc import Callable, Sequence
from functools import cache

from mmdet.datasets import CocoDataset, CocoPanopticDataset, XMLDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset

from rfa_mmdet.data.check.classes import check_given, check_heads, check_same_labels
from rfa_mmdet.data.check.coco import check_coco, check_evaluator
from rfa_mmdet.data.check.coco_file import garbage_kept, read_coco
from rfa_mmdet.data.check.find import Evaluator, Leaf, evaluators, is_local, leaves
from rfa_mmdet.data.check.images import check_images
from rfa_mmdet.data.check.loaded import Loaded
from rfa_mmdet.data.check.report import DataError, Findings, literal, missing_path, some
from rfa_mmdet.data.check.voc import check_voc
from rfa_mmdet.data.voc_dataset import AnyImageXMLDataset
from rfa_mmdet.texts import printable


def check_data(
    cfg: Config, splits: Sequence[str] = ("train", "val"), images: str = "quick"
) -> list[str]:
    """Check the annotation files, images and classes that a run would use.

    Datasets of COCO's and VOC's format are read; of others, only the annotation file must exist.
    Annotations are always read whole.

    Args:
        cfg (Config): Of a detector.
        splits (Sequence[str]): Of 'train', 'val', 'test'. The first says how many classes the
            heads must have.
        images (str): 'full' opens every image file, 'quick' some of each dataset.

    Returns:
        list[str]: Warnings: things to know that do not keep the run from its aim.

    Raises:
        DataError: The run would fail, or learn or measure nothing, or the wrong thing. The
            message names everything found.
    """
    found = find_problems(cfg, splits, images)
    found.raise_errors()
    return found.warnings


@garbage_kept()
def find_problems(cfg: Config, splits: Sequence[str], images: str = "full") -> Findings:
    """Do what :func:`check_data` does, and return what was found, without raising.

    Args:
        cfg (Config): Of a detector.
        splits (Sequence[str]): Of 'train', 'val', 'test'; see :func:`check_data`.
        images (str): 'full' or 'quick'; see :func:`check_data`.

    Returns:
        Findings: Errors and warnings.
    """
    found = Findings()
    labelled = []
    for split in splits:
        read = cache(read_coco)  # one file is often a dataset's and an evaluator's
        metrics = [] if split == "train" else [*evaluators(cfg, split)]
        evaluated = {os.path.realpath(m.ann_file) for m in metrics if m.is_coco and m.names}
        of_leaf: dict[str, tuple[BaseDataset, Loaded | None]] = {}
        for leaf in leaves(cfg, split):
            dataset = _build(leaf, found)
            if dataset is None:
                continue
            loaded = _load(leaf, dataset, found, read, evaluated)
            labels = loaded.labels if loaded else dataset.metainfo.get("classes")
            # Others count things apart (panoptic), or map classes in their own way (video).
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
    # What mmdet's constructors raise for keys and values that they do not know.
    except (KeyError, TypeError, OSError, RuntimeError) as error:
        found.errors.append(f"{leaf.key} cannot be built: {error}")
        return None
    if isinstance(dataset, XMLDataset) and not dataset.metainfo.get("classes"):
        found.errors.append(
            f"{leaf.key}: {leaf.cfg['type']} has no classes of its own; give them, such as "
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
            f"{leaf.key}: not checked: remote storage (ann_file={path!r}, "
            f"backend_args={leaf.cfg.get('backend_args')})"
        )
        return None
    kind = _kind(dataset)
    if (path or kind) and not os.path.isfile(path):
        root = dataset.data_root
        where = f"{leaf.key}.ann_file={leaf.cfg.get('ann_file', '')!r}"
        if root and not os.path.isdir(root):
            where = f"{leaf.key}.data_root={root!r} is no folder; {where}"
        found.errors.append(f"{where}: {missing_path(path)}")
        return None
    if kind is None:
        return None
    try:
        if kind is check_voc:
            return check_voc(leaf, dataset, found)
        measured = os.path.realpath(path) in evaluated
        content = read(path, annotated=measured or not dataset.test_mode, evaluated=measured)
        return check_coco(leaf, dataset, content, found)
    except DataError as error:
        for text in str(error).splitlines():
            found.errors.append(text if text.startswith(leaf.key) else f"{leaf.key}: {text}")
        return None


def _kind(dataset: BaseDataset):
    """Return the check that fits; none does for a subclass that reads its files in its own way."""
    for base, check in (
        (CocoDataset, check_coco),
        (XMLDataset, check_voc),
        (AnyImageXMLDataset, check_voc),
    ):
        own = (
            getattr(type(dataset), method) is not getattr(base, method, None)
            for method in ("load_data_list", "parse_data_info")
        )
        if isinstance(dataset, base) and not any(own):
            return check
    return None


def _check_any_boxes(of_leaf: dict, found: Findings) -> None:
    """Report datasets without boxes; unlabelled ones beside a labelled one are on purpose."""
    trained = {k: (d, read) for k, (d, read) in of_leaf.items() if read and not d.test_mode}
    any_boxes = any(loaded.boxes for _, loaded in trained.values())
    for key, (dataset, loaded) in trained.items():
        if not loaded.boxes:
            (found.warnings if any_boxes else found.errors).append(
                f"{key}: the {len(loaded.images)} images of {dataset.ann_file} have no box "
                f"to learn from, of classes {some(map(literal, loaded.labels), 80)}"
            )


def _check_evaluator(
    metric: Evaluator,
    of_leaf: dict[str, tuple[BaseDataset, Loaded | None]],
    found: Findings,
    read: Callable,
) -> None:
    path = metric.ann_file
    told = {os.path.realpath(d.ann_file) for d, loaded in of_leaf.values() if loaded is None}
    if not os.path.isfile(path):
        found.errors.append(f"{metric.key}.ann_file={path!r}: {missing_path(path)}")
    elif metric.is_coco and metric.names and os.path.realpath(path) not in told:
        try:
            content = read(path, annotated=True, evaluated=True)
        except DataError as error:
            found.errors += [f"{metric.key}: {text}" for text in str(error).splitlines()]
            return
        coco = [read for d, read in of_leaf.values() if read and isinstance(d, CocoDataset)]
        if coco and len(coco) == len(of_leaf):
            check_evaluator(metric, content, coco, found)
