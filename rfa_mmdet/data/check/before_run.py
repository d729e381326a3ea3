"""What is wrong with the data of a config, found before a run starts, in words."""

import os
from collections.abc import Sequence

from mmdet.datasets import CocoDataset, CocoPanopticDataset, XMLDataset
from mmengine.config import Config
from mmengine.dataset import BaseDataset

from rfa_mmdet.data.check.classes import check_given, check_heads, check_same_labels
from rfa_mmdet.data.check.coco import check_coco
from rfa_mmdet.data.check.find import Leaf, evaluator_files, is_local, leaves
from rfa_mmdet.data.check.images import check_images
from rfa_mmdet.data.check.loaded import Loaded
from rfa_mmdet.data.check.report import DataError, Findings, missing_path
from rfa_mmdet.data.check.voc import check_voc
from rfa_mmdet.data.voc_dataset import AnyImageXMLDataset


def check_data(cfg: Config, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """Check the annotation files, images and classes that a run would use.

    Datasets of COCO's and VOC's format are read; of others, only the annotation file must exist.

    Args:
        cfg (Config): Of a detector.
        splits (Sequence[str]): Of 'train', 'val', 'test'. The first says how many classes the
            heads must have.

    Returns:
        list[str]: Warnings: things to know that do not keep the run from its aim.

    Raises:
        DataError: The run would fail, or learn or measure nothing, or the wrong thing. The
            message names everything found.
    """
    found = find_problems(cfg, splits)
    found.raise_errors()
    return found.warnings


def find_problems(cfg: Config, splits: Sequence[str]) -> Findings:
    """Do what :func:`check_data` does, and return what was found, without raising.

    Args:
        cfg (Config): Of a detector.
        splits (Sequence[str]): Of 'train', 'val', 'test'; see :func:`check_data`.

    Returns:
        Findings: Errors and warnings.
    """
    found = Findings()
    labelled = []
    for split in splits:
        files = {}
        boxes = []
        for leaf in leaves(cfg, split):
            dataset = _build(leaf, found)
            if dataset is None:
                continue
            loaded = _load(leaf, dataset, found)
            labels = loaded.labels if loaded else dataset.metainfo.get("classes")
            # Others count things apart (panoptic), or map classes in their own way (video).
            if isinstance(dataset, (CocoDataset, XMLDataset)) and not isinstance(
                dataset, CocoPanopticDataset
            ):
                labelled.append((leaf, tuple(labels)))
            files[leaf.key] = dataset.ann_file
            if loaded:
                check_images(leaf, loaded.images, found)
                found.read.update(loaded.images)
                boxes += [] if dataset.test_mode else [(leaf, dataset, loaded)]
        _check_any_boxes(boxes, found)
        if split != "train":
            _check_evaluators(cfg, split, files, found)
    if labelled and cfg.get("model"):
        check_heads(cfg.model, *labelled[0], found)
        if not cfg.model.get("language_model"):
            check_same_labels(labelled, found)
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


def _load(leaf: Leaf, dataset: BaseDataset, found: Findings) -> Loaded | None:
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
        return kind(leaf, dataset, found)
    except DataError as error:
        text = str(error)
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


def _check_any_boxes(trained: list[tuple[Leaf, BaseDataset, Loaded]], found: Findings) -> None:
    """Report datasets without boxes; unlabelled ones beside a labelled one are on purpose."""
    any_boxes = any(loaded.boxes for _, _, loaded in trained)
    for leaf, dataset, loaded in trained:
        if not loaded.boxes:
            (found.warnings if any_boxes else found.errors).append(
                f"{leaf.key}: the {len(loaded.images)} images of {dataset.ann_file} have no box "
                f"to learn from, of classes {tuple(loaded.labels)!r}"
            )


def _check_evaluators(cfg: Config, split: str, files: dict[str, str], found: Findings) -> None:
    for key, path in evaluator_files(cfg, split):
        if not os.path.isfile(path):
            found.errors.append(f"{key}={path!r}: {missing_path(path)}")
        elif len(files) == 1:
            dataset, own = next(iter(files.items()))
            if os.path.realpath(own) != os.path.realpath(path):
                found.warnings.append(
                    f"{key}={path!r} is another file than {dataset} reads ({own!r}); if it has "
                    "other images, the evaluation fails"
                )
