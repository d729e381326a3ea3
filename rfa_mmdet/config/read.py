"""Read a config file and apply command-line overrides."""

import inspect
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from rfa_mmdet.errors import ConfigError

# Keys of a config that a run reads besides the arguments of Runner itself.
_READ_KEYS = {
    *("auto_scale_lr", "custom_imports", "find_unused_parameters", "model_wrapper_cfg", "sync_bn"),
    *("tta_model", "tta_pipeline", "activation_checkpointing", "compile", "runner_type"),
}


def load_config(
    path: str | os.PathLike,
    cfg_options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Read a config file and apply overrides to it.

    Args:
        path (str | os.PathLike): Config file.
        cfg_options (Mapping[str, Any] | None): Dotted key to value, such as
            ``{"train_cfg.max_epochs": 24}``. Defaults to None.
        work_dir (str | None): Where a run writes. Defaults to None: as the config says, else
            ``work_dirs/<config name>``.
        launcher (str): What started the processes of a run. Defaults to 'none'.

    Returns:
        Config: With ``launcher`` and ``work_dir`` set. Its default scope becomes the current one.

    Raises:
        ConfigError: The file or one of its bases is missing or does not parse, or an option names
            what no run reads.

    Example:
        >>> load_config("no_such_config.py")
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: config='no_such_config.py': no such file
    """
    path = Path(path)
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"config={str(path)!r}: no such file{hint}")
    try:
        cfg = Config.fromfile(path)
    except (FileNotFoundError, ImportError, SyntaxError, ConfigParsingError) as error:
        raise ConfigError(f"config={str(path)!r}: {error}") from error
    options = dict(cfg_options or {})
    _check_options(cfg, options)
    cfg.merge_from_dict(options)
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs", path.stem))
    # What is built before the Runner, such as the data sets that are checked, is looked up there.
    init_default_scope(cfg.get("default_scope") or "mmengine")
    return cfg


def _check_options(cfg: Config, options: dict[str, Any]) -> None:
    read = {*inspect.signature(Runner.__init__).parameters, *_READ_KEYS} - {"self", "cfg"}
    for key in options:
        top = key.split(".")[0]
        if top in read:
            continue
        if top in cfg:
            raise ConfigError(
                f"--cfg-options {key}=...: {top} is a variable of the config file; its value has "
                "been put to use already, and overriding it changes nothing. Override what it went "
                f"into, such as {_first_use(cfg, top)}"
            )
        near = get_close_matches(top, read, n=2)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"--cfg-options {key}=...: no run reads {top!r}{hint}")


def _first_use(cfg: Config, variable: str) -> str:
    value = cfg[variable]

    def find(node: Any, path: list[str]) -> str | None:
        if node == value and path:
            return ".".join(path)
        items = node.items() if isinstance(node, dict) else ()
        return next((hit for k, v in items if (hit := find(v, [*path, k]))), None)

    uses = (find(cfg[key], [key]) for key in ("train_dataloader", "model", "val_evaluator"))
    return next((use for use in uses if use), "train_dataloader.dataset.data_root")
