"""What is wrong with a config, found before anything is built, in words."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import mmcv.ops
import mmdet.registry
import mmengine.registry
import torch
from mmengine.config import Config
from mmengine.registry import Registry

from rfa_mmdet.errors import ConfigError

PACKAGE = "rfa_mmdet"
# What a Runner builds; other top-level keys are the config file's own variables.
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
SYNC_BN = ("SyncBN", "MMSyncBN", "NaiveSyncBN1d", "NaiveSyncBN2d", "NaiveSyncBN3d")


def check_config(cfg: Config) -> None:
    """Raise if ``cfg`` names what is not there, or asks for what this machine cannot do.

    Args:
        cfg (Config): A detector's config, with ``cfg.launcher`` set.

    Raises:
        ConfigError: A ``type`` that is registered nowhere (with the nearest names); this package
            used but not imported by ``custom_imports``; SyncBN in several processes, or mixed
            precision, without CUDA.

    Example:
        >>> check_config(Config(dict(launcher="none", model=dict(type="RetinaNett"))))
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: model.type='RetinaNett' is registered nowhere...
    """
    types = [(path, name) for path, name in _types(cfg) if not isinstance(name, type)]
    _check_registered(types)
    _check_custom_imports(cfg, types)
    if not torch.cuda.is_available():
        _check_cpu(cfg, types)


def _types(cfg: Config) -> Iterator[tuple[str, Any]]:
    """Yield ('model.backbone.type', 'ResNet') for every ``type`` that a Runner would build."""

    def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            if "type" in node:
                yield f"{path}.type", node["type"]
            for key, value in node.items():
                yield from walk(value, f"{path}.{key}")
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                yield from walk(value, f"{path}[{i}]")

    for key in BUILT:
        yield from walk(cfg.get(key), key)


def _registered() -> dict[str, Any]:
    """Everything that MMEngine, mmcv, mmdet and what they imported have registered, by name."""
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


def _check_registered(types: list[tuple[str, Any]]) -> None:
    known = _registered()
    for path, name in types:
        scope, _, bare = name.rpartition(".") if isinstance(name, str) else ("", "", "")
        # Lower-case types are switches inside a module (FPG's 'conv'), not registered names; other
        # packages' scopes ('mmpretrain.ConvNeXt') import themselves when they are built.
        if not bare or bare.islower() or scope not in ("", "mmdet", "mmengine", "mmcv"):
            continue
        if bare not in known:
            near = get_close_matches(bare, known, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise ConfigError(
                f"{path}={name!r} is registered nowhere{hint}. A class of your own needs its "
                "module in custom_imports"
            )


def _check_custom_imports(cfg: Config, types: list[tuple[str, Any]]) -> None:
    imports = cfg.get("custom_imports", {}).get("imports", [])
    imports = [imports] if isinstance(imports, str) else imports
    if any(name.split(".")[0] == PACKAGE for name in imports):
        return
    known = _registered()
    for path, name in types:
        module = getattr(known.get(name), "__module__", "") if isinstance(name, str) else ""
        if module.split(".")[0] == PACKAGE:
            raise ConfigError(
                f"{path}={name!r} is {PACKAGE}'s, but the config's custom_imports={imports} does "
                f"not name it, so other tools cannot build it; add "
                f"custom_imports = dict(imports=['{PACKAGE}'])"
            )


def _check_cpu(cfg: Config, types: list[tuple[str, Any]]) -> None:
    amp = next((p for p, name in types if name == "AmpOptimWrapper"), None)
    if amp:
        raise ConfigError(
            f"{amp}='AmpOptimWrapper': MMEngine's mixed precision needs CUDA, and torch "
            f"{torch.__version__} sees none here; leave out --amp, or use OptimWrapper"
        )
    if cfg.launcher == "none":
        return  # The Runner turns SyncBN into BN, which is the same for one process.
    sync = next((f"{p}={name!r}" for p, name in types if name in SYNC_BN), None)
    if cfg.get("sync_bn"):
        sync = f"sync_bn={cfg.sync_bn!r}"
    if sync:
        raise ConfigError(
            f"{sync}: SyncBN over several processes needs CUDA, and torch {torch.__version__} sees "
            "none here; use BN or GN (--cfg-options ...norm_cfg.type=BN), or one process"
        )
