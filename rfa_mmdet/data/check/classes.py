"""Check that the classes of the datasets match each other and the model's heads."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rfa_mmdet.data.check.find import Leaf
from rfa_mmdet.data.check.report import DataError, Findings, literal, some

# Heads whose num_classes does not refer to the dataset's classes.
_OTHER_HEADS = ("rpn_head", "semantic_head", "panoptic_head", "panoptic_fusion_head")


def heads(model: dict) -> Iterator[tuple[str, int]]:
    """Yield the config key and ``num_classes`` of each head that classifies boxes or masks.

    Args:
        model (dict): ``cfg.model``; heads may be in lists (cascades) and inside wrappers.

    Example:
        >>> roi_head = dict(bbox_head=[dict(num_classes=80), dict(num_classes=3)])
        >>> list(heads(dict(rpn_head=dict(num_classes=1), roi_head=roi_head)))
        [('model.roi_head.bbox_head.0', 80), ('model.roi_head.bbox_head.1', 3)]
        >>> list(heads(dict(bbox_head=dict(type="Retrofit", module=dict(num_classes=3)))))
        [('model.bbox_head.module', 3)]
    """

    def walk(node: Any, key: str, name: str) -> Iterator[tuple[str, int]]:
        # In pure-Python configs, the type is the function ``retrofit`` itself.
        kind = node.get("type") if isinstance(node, dict) else None
        if str(getattr(kind, "__name__", kind)).rpartition(".")[2].lower() == "retrofit":
            yield from walk(node.get("module"), f"{key}.module", name)
        elif isinstance(node, dict) and name not in _OTHER_HEADS:
            # A class-agnostic mask head ignores the number.
            if name.endswith(("_head", "_heads")) and not node.get("class_agnostic"):
                count = node.get("num_classes")
                if isinstance(count, int):
                    yield key, count
            for child, value in node.items():
                yield from walk(value, f"{key}.{child}", child)
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                yield from walk(value, f"{key}.{i}", name)

    yield from walk(model, "model", "model")


def check_heads(model: dict, leaf: Leaf, labels: tuple[str, ...], found: Findings) -> None:
    """Report heads whose ``num_classes`` differs from the dataset's number of classes.

    Args:
        model (dict): ``cfg.model``.
        leaf (Leaf): The dataset for training or testing.
        labels (tuple[str, ...]): Its classes.
        found (Findings): Collects the error.
    """
    # Models that get the classes as text have one output per text token.
    if model.get("language_model"):
        return
    wrong = [(key, count) for key, count in heads(model) if count != len(labels)]
    if not wrong:
        return
    have = ", ".join(f"{key}.num_classes={count}" for key, count in wrong)
    fix = " ".join(f"{key}.num_classes={len(labels)}" for key, _ in wrong)
    in_list = any(part.isdigit() for key, _ in wrong for part in key.split("."))
    limit = (
        " (list indices only work on the command line; in a config file, write the whole list)"
        if in_list
        else ""
    )
    found.errors.append(
        f"{have}, but {leaf.key} has {len(labels)} classes: {some(map(literal, labels), 80)} "
        f"({class_source(leaf)}). Use --cfg-options {fix}{limit}, or set other classes"
    )


def check_same_labels(labelled: list[tuple[Leaf, tuple[str, ...]]], found: Findings) -> None:
    """Report datasets whose labels mean other classes than in the first dataset.

    Args:
        labelled (list): Datasets with their class names in label order.
        found (Findings): Collects the errors.
    """
    for leaf, labels in labelled[1:]:
        first, expected = labelled[0]
        if labels != expected:
            found.errors.append(
                f"{leaf.key} has the classes {some(map(literal, labels), 80)}, but {first.key} has "
                f"{some(map(literal, expected), 80)}: the same label would mean different classes. "
                "In COCO files, the order of 'categories' determines the labels"
            )


def check_given(leaf: Leaf) -> None:
    """Check ``metainfo.classes`` as written, before MMDetection splits a string into letters.

    Raises:
        DataError: It is a bare string but not an existing file, or contains non-strings or
            duplicates.
    """
    classes = (leaf.cfg.get("metainfo") or {}).get("classes")
    if isinstance(classes, str) and "://" not in classes and not os.path.isfile(classes):
        raise DataError(
            f"{leaf.key}.metainfo.classes={classes!r} is a string, so every letter would be a "
            f"class, and no such file exists. For a single class, write a tuple with a comma: "
            f"metainfo=dict(classes=({classes!r},))"
        )
    names = classes if isinstance(classes, (list, tuple)) else ()
    odd = [literal(name) for name in names if not isinstance(name, str) or not name]
    if odd:
        raise DataError(
            f"{leaf.key}.metainfo.classes: {some(odd)} is not valid; classes must be non-empty "
            "strings"
        )
    twice = [literal(name) for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{leaf.key}.metainfo.classes contains {some(twice)} more than once")


def class_source(leaf: Leaf) -> str:
    """Describe where a dataset's classes come from."""
    metainfo = leaf.cfg.get("metainfo") or {}
    if "classes" in metainfo:
        return "from metainfo.classes"
    other = next((key for key in metainfo if key.lower() in ("classes", "class")), None)
    reason = f"metainfo has {other!r} instead of 'classes'" if other else "no metainfo.classes"
    return f"the defaults of {getattr(leaf.cfg['type'], '__name__', leaf.cfg['type'])}: {reason}"


def metainfo_fix(leaf: Leaf, names: tuple[str, ...]) -> str:
    """Describe how to set ``names`` as the classes."""
    written = repr(names)
    if len(written) > 4000:  # too long to paste
        written = f"({some(map(literal, names))})"
    text = f"To use the file's classes, set metainfo=dict(classes={written}) in the dataset"
    # MMEngine's command-line parser drops blanks and reads digits as numbers.
    if (
        len(written) < 4000
        and names
        and all(name.replace("-", "").replace("_", "").isalpha() for name in names)
    ):
        listed = "".join(f"{name}," for name in names)
        text += f', or --cfg-options {leaf.key}.metainfo.classes="({listed})"'
    return f"{text}, and set num_classes of the heads to match"
