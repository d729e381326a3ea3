"""Read a config file and apply command-line overrides."""

import inspect
import os
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from rfa_mmdet.errors import ConfigError

# Config keys that a run reads besides the arguments of Runner.
_READ_KEYS = {
    *("auto_scale_lr", "custom_imports", "find_unused_parameters", "model_wrapper_cfg", "sync_bn"),
    *("tta_model", "tta_pipeline", "activation_checkpointing", "compile", "runner_type"),
}
_OWN_HOOKS = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
_SUFFIXES = (".py", ".json", ".yaml", ".yml")


def load_config(
    path: str | os.PathLike,
    cfg_options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Read a config file and apply overrides.

    Args:
        path (str | os.PathLike): Config file, or a config of an installed package, e.g.
            ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``.
        cfg_options (Mapping[str, Any] | None): Dotted key -> value, e.g.
            ``{"train_cfg.max_epochs": 24}``. Defaults to None.
        work_dir (str | None): Output folder. Defaults to None: the config's, or else
            ``work_dirs/<config name>``.
        launcher (str): Launcher that started the processes of the run. Defaults to 'none'.

    Returns:
        Config: The config, with ``launcher`` and ``work_dir`` set and without keys that are None,
        which mean the same as absent ones. Its default scope becomes the current one.

    Raises:
        ConfigError: The file or one of its bases is missing or cannot be read as a config, or an
            option overrides an unknown key.

    Example:
        >>> load_config("no_such_config.py")
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: config='no_such_config.py': no such file
    """
    path = _find(path)
    try:
        cfg = Config.fromfile(path)
        _import_all(cfg._cfg_dict)
    except Exception as error:  # a config is code, which may raise anything
        raise ConfigError(f"config={str(path)!r}: {_reason(error, path)}") from error
    options = dict(cfg_options or {})
    check_options(cfg, options, "--cfg-options")
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, IndexError, AssertionError) as error:
        raise ConfigError(f"--cfg-options: {_one_line(error)}") from error
    # Except default_scope, for which None has its own meaning in pure-Python configs.
    for key in _read_by_runs() - {"default_scope"}:
        if key in cfg and cfg[key] is None:
            cfg.pop(key)
    for key, hook in list(cfg.get("default_hooks", {}).items()):
        # MMEngine accepts None only for its own hooks.
        if hook is None and key not in _OWN_HOOKS:
            cfg.default_hooks.pop(key)
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif "work_dir" not in cfg:
        cfg.work_dir = str(Path("work_dirs", path.stem))
    # Anything built before the Runner, such as the datasets to check, is looked up in this scope.
    # Pure-Python configs have None: a registry then uses its own names, MMDetection's.
    if cfg.get("default_scope", "mmengine") is not None:
        init_default_scope(cfg.get("default_scope", "mmengine"))
    return cfg


def _find(path: str | os.PathLike) -> Path:
    """Return the path of an existing config file."""
    package, is_packaged, name = str(path).partition("::")
    places = [Path(path)]
    if is_packaged:
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"config={str(path)!r}: package {package!r} is not installed")
        home = Path(spec.submodule_search_locations[0])
        places = [home / ".mim" / "configs" / name, home.parent / "configs" / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        if places[0].exists():
            what = "is a folder, not a config" if places[0].is_dir() else "is not a regular file"
            raise ConfigError(f"config={str(path)!r}: {what}")
        beside = [
            p.name for place in places for p in place.parent.glob("*") if p.suffix in _SUFFIXES
        ]
        near = get_close_matches(places[0].name, beside, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"config={str(path)!r}: no such file{hint}")
    if found.suffix not in _SUFFIXES:
        raise ConfigError(f"config={str(path)!r}: must end in {', '.join(_SUFFIXES)}")
    return found


def _import_all(node: Any) -> None:
    """Resolve the lazy imports of a pure-Python config."""
    if isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            _import_all(child)


def _reason(error: Exception, path: Path) -> str:
    """Return in one line why MMEngine cannot read a config."""
    frames = list(traceback.walk_tb(error.__traceback__))
    # MMEngine's nested calls, one per file it reads.
    calls = [f for f, _ in frames if f.f_code.co_name in ("_file2dict", "_parse_lazy_import")]
    files = list(dict.fromkeys(os.path.basename(f.f_locals["filename"]) for f in calls))
    if isinstance(error, RecursionError):
        return f"its bases form a cycle: {', '.join(files[:5])}"
    if isinstance(error, ImportError) and error.__cause__ is not None:
        cause: BaseException = error.__cause__  # MMEngine's own message has all of sys.path
        return f"custom_imports: {_one_line(cause.__context__ or cause)}"
    if isinstance(error, TypeError) and "import_modules_from_strings" in str(error):
        return "custom_imports must be a dict, e.g. custom_imports = dict(imports=['my_package'])"
    if isinstance(error, AttributeError) and files and not files[-1].endswith(".py"):
        return "must contain a dict"
    in_base = files and files[-1] != path.name and not isinstance(error, OSError)
    where = f"{files[-1]}: " if in_base else ""
    line = next((n for f, n in reversed(frames) if f.f_code.co_name == "<module>"), None)
    text = _one_line(error)
    if isinstance(error, SyntaxError) and error.lineno:
        line, text = error.lineno, error.msg
    if not isinstance(error, (OSError, ImportError, ConfigParsingError)):
        text = f"{type(error).__name__}: {text}"
    return f"{where}{f'line {line}: ' if line else ''}{text}"


def _one_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def _read_by_runs() -> set[str]:
    return {*inspect.signature(Runner.__init__).parameters, *_READ_KEYS} - {"self", "cfg"}


def check_options(cfg: Config, options: Mapping[str, Any], given: str) -> None:
    """Check that a run reads the keys of some overrides: MMEngine accepts any.

    Args:
        cfg (Config): The config without them.
        options (Mapping[str, Any]): Dotted key -> value.
        given (str): Where they were given, for messages, e.g. ``--cfg-options``.

    Raises:
        ConfigError: A key is unknown, or a variable of the config file.

    Example:
        >>> check_options(Config(dict(model=dict())), {"model.type": "FCOS"}, "--cfg-options")
        >>> check_options(Config(dict(model=dict())), {"modle.type": "FCOS"}, "methods.fcos:")
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: methods.fcos: modle.type=...: unknown config key 'modle'; ...
    """
    read = _read_by_runs()
    for key in options:
        top = key.split(".")[0]
        if top in read:
            continue
        if top in cfg:
            raise ConfigError(
                f"{given} {key}=...: {top} is a variable of the config file, and overriding "
                "it has no effect. Override the keys that were set from it, e.g. "
                f"{_first_use(cfg, top)}"
            )
        near = get_close_matches(top, read, n=2)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"{given} {key}=...: unknown config key {top!r}{hint}")


def _first_use(cfg: Config, variable: str) -> str:
    value = cfg[variable]

    def find(node: Any, path: list[str]) -> str | None:
        if node == value and path:
            return ".".join(path)
        items = node.items() if isinstance(node, dict) else ()
        return next((hit for k, v in items if (hit := find(v, [*path, k]))), None)

    uses = (
        find(cfg[key], [key])
        for key in ("train_dataloader", "model", "val_evaluator")
        if key in cfg
    )
    return next((use for use in uses if use), "train_dataloader.dataset.data_root")
