"""Remove this package's layers from a detector's config."""

import copy
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS as LAYERS


def type_name(kind: Any) -> str:
    """Return the bare name of a ``type``: a string or, in pure-Python configs, a class or function.

    Example:
        >>> type_name("mmdet.ResNet"), type_name(Config), type_name(None)
        ('ResNet', 'Config', '')
    """
    return str(getattr(kind, "__name__", kind or "")).rpartition(".")[2]


def is_retrofit(node: Any) -> bool:
    """Return whether a config is one of ``Retrofit``.

    Example:
        >>> is_retrofit(dict(type="Retrofit")), is_retrofit(dict(type="ResNet"))
        (True, False)
    """
    # The function registered as Retrofit is called retrofit.
    return isinstance(node, dict) and type_name(node.get("type")).lower() == "retrofit"


# Arguments of Retrofit itself.
_RETROFIT = ("type", "module", "edits", "dry_run", "strict_start", "example_input")


def plain_base(cfg: Config) -> Config | None:
    """Return a detector's config without this package's layers.

    Args:
        cfg (Config): A detector's config; not modified.

    Returns:
        Config | None: The config without ``Retrofit``, convolutions of this package (``rfa``,
        ``dcn``, ``conv_cfg``) and its plug-ins; None if it has none of them.

    Example:
        >>> backbone = dict(type="RFAResNet", depth=50, rfa=dict(type="RFAConv"))
        >>> plain_base(Config(dict(model=dict(backbone=backbone)))).model.backbone
        {'type': 'RFAResNet', 'depth': 50}
    """
    cfg = copy.deepcopy(cfg)
    holder = {"model": cfg.model}
    found = _take_out(holder)
    cfg.model = holder["model"]
    return cfg if found else None


def _take_out(node: Any) -> bool:
    if isinstance(node, (list, tuple)):
        return sum(map(_take_out, node)) > 0  # any() would stop at the first
    found = False
    for key, value in list(node.items()) if isinstance(node, dict) else ():
        if is_retrofit(value):
            while is_retrofit(value):
                own = {k: v for k, v in value.items() if k not in _RETROFIT}
                # Arguments other than Retrofit's own go to the module.
                value = {**value["module"], **own}
            node[key] = value
            _take_out(node[key])  # a ConfigDict holds a copy
            found = True
        elif isinstance(value, dict) and _is_ours(value):
            del node[key]
            node.pop(f"stage_with_{key}", None)
            found = True
        elif key == "plugins" and value:
            node[key] = [plugin for plugin in value if not _is_ours(plugin.get("cfg", plugin))]
            found |= len(node[key]) < len(value)
        else:
            found |= _take_out(value)
    return found


def _is_ours(cfg: dict) -> bool:
    name = cfg.get("type")
    cls = LAYERS.module_dict.get(name.rpartition(".")[2]) if isinstance(name, str) else name
    return getattr(cls, "__module__", "").startswith("rfa_mmdet.layers.")
