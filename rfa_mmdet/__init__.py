"""Attention convolutions and plug-ins for MMDetection 3.x.

``custom_imports = dict(imports=["rfa_mmdet"])`` in a config registers everything below
:mod:`rfa_mmdet.layers`, :mod:`rfa_mmdet.models` and :mod:`rfa_mmdet.hooks`.

The formulas in :mod:`rfa_mmdet.ops` need torch alone: where OpenMMLab's packages are missing,
they can be imported, and anything else says what to install.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

_MISSING = [name for name in ("mmengine", "mmcv", "mmdet") if find_spec(name) is None]

if not _MISSING:
    from rfa_mmdet import compat, hooks, layers, models

    __all__ = ["__version__", "compat", "hooks", "layers", "models"]
else:
    __all__ = ["__version__"]


def __getattr__(name: str):
    if name in ("compat", "hooks", "layers", "models"):
        raise ImportError(
            f"rfa_mmdet.{name} needs {', '.join(_MISSING)}, which cannot be imported here. "
            "`make env` in the checkout installs versions that work together."
        )
    raise AttributeError(f"module 'rfa_mmdet' has no attribute {name!r}")
