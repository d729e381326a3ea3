"""Check a config before anything is built from it."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple

import mmcv.ops
import mmdet.registry
import mmengine.registry
import torch
from mmdet.datasets.transforms import Albu
from mmdet.models.detectors import DetectionTransformer, SingleStageDetector, TwoStageDetector
from mmengine.config import Config
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.registry import Registry

from rfa_mmdet.config.plain import is_retrofit, type_name
from rfa_mmdet.data.check.find import leaves
from rfa_mmdet.errors import ConfigError

PACKAGE = "rfa_mmdet"
# Keys that a Runner builds from; other top-level keys are the config file's own variables.
BUILT = (
    "model",
    "tta_model",
    "train_dataloader",
    "val_dataloader",
    "test_dataloader",
    "val_evaluator",
    "test_evaluator",
    "train_cfg",
    "val_cfg",
    "test_cfg",
    "optim_wrapper",
    "param_scheduler",
    "default_hooks",
    "custom_hooks",
    "visualizer",
    "log_processor",
)
# A Runner needs all keys of a group, or none.
GROUPS = {
    "train": ("train_dataloader", "train_cfg", "optim_wrapper"),
    "val": ("val_dataloader", "val_cfg", "val_evaluator"),
    "test": ("test_dataloader", "test_cfg", "test_evaluator"),
}
# Keys of MMDetection 2.x that 3.x ignores, and their replacements.
OLD_KEYS = {
    **dict(data="train_dataloader, val_dataloader and test_dataloader", runner="train_cfg"),
    **dict(optimizer="optim_wrapper", optimizer_config="optim_wrapper", fp16="optim_wrapper"),
    **dict(
        lr_config="param_scheduler", momentum_config="param_scheduler", total_epochs="train_cfg"
    ),
    **dict(evaluation="val_evaluator and train_cfg", checkpoint_config="default_hooks.checkpoint"),
    **dict(log_config="default_hooks.logger and visualizer"),
}
OLD_DATA = {"samples_per_gpu", "workers_per_gpu", "train", "val", "test"}
MIGRATION = "https://mmdetection.readthedocs.io/en/latest/migration/config_migration.html"
PACKAGES = ("mmdet", "mmengine", "mmcv", PACKAGE)  # they look up every ``type`` in a registry
WARM_UPS = ("ConstantLR", "LinearLR", "QuadraticWarmupLR")  # at the beginning of a schedule
SYNC_BN = ("SyncBatchNorm", "SyncBN", "MMSyncBN", "NaiveSyncBN1d", "NaiveSyncBN2d", "NaiveSyncBN3d")


class _Typed(NamedTuple):
    """A ``type`` in a config.

    Attributes:
        path (str): Its key, e.g. 'model.backbone.type'.
        kind (Any): Its value: a name or, in pure-Python configs, a class or function.
        built (bool): Whether it is certain to be looked up in MMDetection's registries.
    """

    path: str
    kind: Any
    built: bool


def check_config(cfg: Config) -> None:
    """Raise if ``cfg`` uses unknown types, or features that this machine does not support.

    Args:
        cfg (Config): A detector's config, with ``cfg.launcher`` set.

    Raises:
        ConfigError: The config is for MMDetection 2.x or has no model; a ``type`` is not registered
            (the message suggests similar names); this package is used but missing from
            ``custom_imports``; SyncBN in several processes or mixed precision without CUDA.

    Example:
        >>> check_config(Config(dict(launcher="none", model=dict(type="RetinaNett"))))
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: model.type='RetinaNett' is not registered...
    """
    _check_version(cfg)
    model = cfg.get("model")
    if not isinstance(model, dict) or "type" not in model:
        what = "has no model" if model is None else f"model={str(model)[:80]!r}"
        raise ConfigError(f"{_name(cfg)}{what}: model must be a dict with the 'type' of a detector")
    known = _registered()
    types = list(_types(cfg, known))
    _check_registered(types, known)
    _check_custom_imports(cfg, types, known)
    if not torch.cuda.is_available():
        _check_cpu(cfg, types)


def check_run(cfg: Config, splits: tuple[str, ...]) -> list[str]:
    """Raise if a Runner cannot train or test with ``cfg``; complements :func:`check_config`.

    Args:
        cfg (Config): A detector's config.
        splits (tuple[str, ...]): The splits that the run reads: 'train', 'val' or 'test'.

    Returns:
        list[str]: Warnings about keys without effect, and about a learning rate schedule that does
        not fit the training length.

    Raises:
        ConfigError: A dataloader, loop, evaluator or the default scope is missing; masks are
            evaluated for a detector without a mask head, or not loaded for one that has it.

    Example:
        >>> check_run(Config(dict(train_cfg=dict(max_epochs=1))), ("train",))
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: config has train_cfg, but no train_dataloader and no ...
    """
    for split, group in GROUPS.items():
        there = [key for key in group if cfg.get(key) is not None]
        lacking = " and no ".join(key for key in group if key not in there)
        if lacking and (there or split == splits[0]):
            have = f"has {' and '.join(there)}, but no" if there else "has no"
            raise ConfigError(f"{_name(cfg)}{have} {lacking}: a run needs all three of them")
    model = cfg.model["type"]
    is_scoped = cfg.get("default_scope") or not isinstance(model, str) or "." in model
    if not is_scoped and model not in mmengine.registry.MODELS.module_dict:
        raise ConfigError(
            f"{_name(cfg)}has no default_scope, so model.type={model!r} is not looked up in "
            "MMDetection; add default_scope = 'mmdet'"
        )
    if finds_masks := _finds_masks(cfg):
        _check_trained_masks(cfg, splits)
    elif finds_masks is not None:
        for split in splits:
            _check_evaluated_masks(cfg, f"{split}_evaluator")
    old = _old_keys(cfg)
    found = [f"{key}: MMDetection 3.x ignores this key; use {OLD_KEYS[key]}" for key in old]
    return found + (_schedule_warnings(cfg) if "train" in splits else [])


def _name(cfg: Config) -> str:
    return f"config={cfg.filename!r}: " if cfg.filename else "config "


def _old_keys(cfg: Config) -> list[str]:
    """Return the keys of MMDetection 2.x, except variables that the config uses elsewhere."""
    found = [key for key in OLD_KEYS if cfg.get(key) and not _occurs(cfg[key], cfg)]
    is_variable = not isinstance(cfg.get("data"), dict) or OLD_DATA.isdisjoint(cfg.data)
    return [key for key in found if key != "data" or not is_variable]


def _occurs(value: Any, cfg: Config) -> bool:
    def walk(node: Any) -> bool:
        children = node.values() if isinstance(node, dict) else node
        inside = isinstance(node, (dict, list, tuple)) and any(map(walk, children))
        return inside or node == value

    return any(walk(cfg.get(key)) for key in BUILT)


def _check_version(cfg: Config) -> None:
    old = _old_keys(cfg)
    # train_cfg and test_cfg exist in both versions.
    if old and not any(cfg.get(key) for group in GROUPS.values() for key in group[::2]):
        raise ConfigError(
            f"{_name(cfg)}is for MMDetection 2.x: it has {', '.join(old)} and no dataloader of "
            f"3.x; see {MIGRATION}"
        )


def _finds_masks(cfg: Config) -> bool | None:
    """Return whether a detector has a mask head; None if its config does not say."""
    model = _unwrapped(cfg.model)
    kind = _resolve(model.get("type"))
    head = _unwrapped(model.get("roi_head") or model.get("bbox_head"))
    if not isinstance(kind, type) or not isinstance(head, dict):
        return None
    if issubclass(kind, TwoStageDetector):
        return any("mask" in part for part, own in head.items() if own is not None)
    if issubclass(kind, (SingleStageDetector, DetectionTransformer)):
        return any("mask" in name for name in dir(_resolve(head.get("type"))))
    return None


def _check_trained_masks(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise if a mask head gets no masks, which would fail in the first iteration."""
    model = _unwrapped(cfg.model)
    if "train" not in splits or not _unwrapped(model.get("roi_head") or {}).get("mask_head"):
        return
    for leaf in leaves(cfg, "train"):
        for name, transform in leaf.transforms():
            if name == "LoadAnnotations" and not transform.get("with_mask"):
                raise ConfigError(
                    f"{leaf.key}: the pipeline loads no masks, but model.roi_head.mask_head needs "
                    "them; use dict(type='LoadAnnotations', with_bbox=True, with_mask=True), or "
                    "model.roi_head.mask_head=None"
                )


def _schedule_warnings(cfg: Config) -> list[str]:
    """Warn if the training length was changed, but the learning rate schedule was not."""
    unit = "max_iters" if cfg.train_cfg.get("max_iters") else "max_epochs"
    length = cfg.train_cfg.get(unit)
    if not length:
        return []
    steps = [
        s
        for s in _schedulers(cfg.get("param_scheduler"))
        if s.get("by_epoch", True) is (unit == "max_epochs") and type_name(s["type"]).endswith("LR")
    ]
    # A warm-up may end early.
    ends = [end for s in steps if (end := _end(s, length)) > length or not _warms_up(s)]
    late = [m for s in steps for m in s.get("milestones", ()) if s.get("begin", 0) + m >= length]
    if ends and max(ends) != length:
        why = f"ends at {max(ends)}"
    elif late:
        why = f"has the milestones {late}"
    else:
        return []
    return [
        f"train_cfg.{unit}={length}, but param_scheduler {why}: {unit} does not change the "
        "schedule; set end, milestones and T_max of its entries to match"
    ]


def _schedulers(cfg: Any) -> Iterator[dict[str, Any]]:
    """Yield the entries of ``param_scheduler``: one, a list, or a dict of these by optimizer."""
    if isinstance(cfg, dict) and "type" in cfg:
        yield cfg
    elif isinstance(cfg, (dict, list, tuple)):
        for entry in cfg.values() if isinstance(cfg, dict) else cfg:
            yield from _schedulers(entry)


def _end(scheduler: dict[str, Any], length: int) -> int:
    """Return when a scheduler ends; MMEngine lets it run to the end of training by default."""
    end = scheduler.get("end", INF)
    cycle = scheduler.get("T_max", scheduler.get("total_steps"))
    if end >= INF:
        end = length if cycle is None else scheduler.get("begin", 0) + cycle
    return int(end)


def _warms_up(scheduler: dict[str, Any]) -> bool:
    return type_name(scheduler["type"]) in WARM_UPS and scheduler.get("begin", 0) == 0


def _check_evaluated_masks(cfg: Config, key: str) -> None:
    """Raise if masks are evaluated for a detector that predicts none.

    CocoMetric would only notice after the first epoch.
    """
    model = _unwrapped(cfg.model)
    metrics = cfg.get(key)
    for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        wanted = metric.get("metric", ()) if isinstance(metric, dict) else ()
        wanted = [wanted] if isinstance(wanted, str) else wanted or ()
        if "segm" in wanted:
            raise ConfigError(
                f"{key}.metric={metric['metric']!r}: evaluates masks, but model.type="
                f"{type_name(model['type'])!r} has no mask head; use 'bbox', or a detector with a "
                "mask head such as MaskRCNN"
            )


def _unwrapped(cfg: Any) -> Any:
    """Return the config of the module inside ``Retrofit``."""
    while is_retrofit(cfg):
        cfg = cfg["module"]
    return cfg


def _resolve(kind: Any) -> Any:
    """Return the class of a model's ``type``, or None if it is unknown."""
    return mmdet.registry.MODELS.get(kind) if isinstance(kind, str) else kind


def _types(cfg: Config, known: dict[str, Any]) -> Iterator[_Typed]:
    """Yield every ``type`` that a Runner would build."""

    def walk(node: Any, path: str, built: bool) -> Iterator[_Typed]:
        if isinstance(node, dict):
            if "type" in node:
                kind = node["type"]
                built &= node.get("_scope_", PACKAGE) in PACKAGES
                yield _Typed(f"{path}.type", kind, built)
                cls = known.get(type_name(kind)) if isinstance(kind, str) else kind
                if isinstance(cls, type) and issubclass(cls, Albu):
                    return  # Its transforms belong to albumentations.
                # Below a third-party class, only that class knows what a ``type`` means.
                built &= getattr(cls, "__module__", PACKAGE).split(".")[0] in PACKAGES
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}", built)
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                yield from walk(value, f"{path}[{i}]", built)

    for key in BUILT:
        yield from walk(cfg.get(key), key, (cfg.get("default_scope") or PACKAGE) in PACKAGES)


def _registered() -> dict[str, Any]:
    """Return every class registered so far with MMEngine, mmcv and mmdet, by name."""
    registries = [
        value
        for module in (mmengine.registry, mmdet.registry)
        for value in vars(module).values()
        if isinstance(value, Registry)
    ]
    for registry in registries:
        registry.import_from_location()
    found = {name: cls for registry in registries for name, cls in registry.module_dict.items()}
    # RoI layers and NMS are looked up in mmcv.ops by attribute.
    return {**vars(mmcv.ops), **found}


def _check_registered(types: list[_Typed], known: dict[str, Any]) -> None:
    for path, name, built in types:
        scope, _, bare = name.rpartition(".") if isinstance(name, str) else ("", "", "")
        # Lower-case types are switches inside a module (FPG's 'conv'), not registered names; other
        # packages' scopes ('mmpretrain.ConvNeXt') are imported when they are built.
        if not (built and bare) or bare.islower() or scope not in ("", "mmdet", "mmengine", "mmcv"):
            continue
        if bare not in known:
            near = get_close_matches(bare, known, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise ConfigError(
                f"{path}={name!r} is not registered{hint} To use your own class, add its module to "
                "custom_imports"
            )


def _check_custom_imports(cfg: Config, types: list[_Typed], known: dict[str, Any]) -> None:
    imports = cfg.get("custom_imports", {}).get("imports") or []
    imports = [imports] if isinstance(imports, str) else imports
    # A pure-Python config imports what it names.
    modules = [*imports, *(getattr(kind, "__module__", "") for _, kind, _ in types)]
    if any(module.split(".")[0] == PACKAGE for module in modules):
        return
    for path, name, _ in types:
        module = getattr(known.get(name), "__module__", "") if isinstance(name, str) else ""
        if module.split(".")[0] == PACKAGE:
            raise ConfigError(
                f"{path}={name!r} belongs to {PACKAGE}, which is missing from the config's "
                f"custom_imports={imports}, so other tools cannot build it; add "
                f"custom_imports = dict(imports=['{PACKAGE}'])"
            )


def _check_cpu(cfg: Config, types: list[_Typed]) -> None:
    amp = next((p for p, kind, _ in types if type_name(kind) == "AmpOptimWrapper"), None)
    if amp:
        raise ConfigError(
            f"{amp}='AmpOptimWrapper': mixed precision in MMEngine needs CUDA, but torch "
            f"{torch.__version__} finds none; remove --amp, or use OptimWrapper"
        )
    if cfg.launcher == "none":
        return  # The Runner turns SyncBN into BN, which is equivalent in one process.
    names = ((path, type_name(kind)) for path, kind, _ in types)
    sync = next((f"{path}={name!r}" for path, name in names if name in SYNC_BN), None)
    if cfg.get("sync_bn"):
        sync = f"sync_bn={cfg.sync_bn!r}"
    if sync:
        raise ConfigError(
            f"{sync}: SyncBN in several processes needs CUDA, but torch {torch.__version__} finds "
            "none; use BN or GN (--cfg-options ...norm_cfg.type=BN), or one process"
        )
