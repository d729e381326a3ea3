"""Configs in MMEngine's pure-Python style, with classes instead of their names."""

from typing import Any

from mmengine.config import Config

from rfa_mmdet.config.check import _registered


class _Written:
    """An object whose repr is a given piece of code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __repr__(self) -> str:
        return self.code


def pure_python(cfg: Config) -> str:
    """Return the text of a config with classes and functions instead of registered names."""
    known, imports = _registered(), set()

    def written(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {k: written(v, k) for k, v in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(written(child) for child in node)
        if key == "type" and node in known:
            cls = known[node]
            imports.add(f"from {cls.__module__} import {cls.__name__}")
            return _Written(cls.__name__)
        return node

    # Nothing is looked up in a registry, so there is no scope.
    values = {k: written(v) for k, v in cfg.to_dict().items() if k != "default_scope"}
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    return "\n".join([*sorted(imports), *lines])
