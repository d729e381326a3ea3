"""Configs in MMEngine's pure-Python style, which name classes themselves instead of their names."""

from typing import Any

from mmengine.config import Config

from rfa_mmdet.config.check import _registered


class _Written:
    """What its code is written as."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __repr__(self) -> str:
        return self.code


def pure_python(cfg: Config) -> str:
    """Return the text of a config with every registered name as the class or function itself."""
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

    # As the values are looked up nowhere, there is no scope to look in.
    values = {k: written(v) for k, v in cfg.to_dict().items() if k != "default_scope"}
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    return "\n".join([*sorted(imports), *lines])
