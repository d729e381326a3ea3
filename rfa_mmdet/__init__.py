"""Attention convolutions and plug-ins for MMDetection 3.x.

``custom_imports = dict(imports=["rfa_mmdet"])`` in a config registers everything in
:mod:`rfa_mmdet.layers`, :mod:`rfa_mmdet.models` and :mod:`rfa_mmdet.hooks`, and the datasets in
:mod:`rfa_mmdet.data.voc_dataset`. :func:`rfa_mmdet.retrofit` edits an already built module from
any library.

The formulas in :mod:`rfa_mmdet.ops` only need torch and can be imported without MMEngine. If
MMEngine is installed but mmdet or mmcv's operators cannot be imported, importing this package
raises an error, so that a config never sees an empty registry.
"""

import sys
from importlib import import_module, metadata
from importlib.util import find_spec

from rfa_mmdet.version import __version__

__all__ = ["__version__", "register", "retrofit"]

_INSTALL = {
    "mmengine": 'pip install "rfa_mmdet[openmmlab]"',
    "mmcv": 'MMCV_WITH_OPS=1 pip install --no-build-isolation "mmcv>=2.0.1,<2.2"',
    "mmdet": 'pip install "rfa_mmdet[openmmlab]"',
}
# The forks install the same modules: next to one of them, the originals would overwrite its files.
_INSTALL_ONEDL = {"mmcv": "pip install onedl-mmcv", "mmdet": "pip install onedl-mmdetection"}


def register() -> None:
    """Register every layer, model, hook and dataset; importing the package already does this.

    Raises:
        ImportError: MMEngine, mmcv's operators or MMDetection cannot be imported.

    Example:
        >>> from mmdet.registry import MODELS
        >>> register()
        >>> MODELS.get("RFAConv").__name__
        'RFAConv'
    """
    for module in ("mmengine", "mmcv.ops", "mmdet.models"):
        try:
            import_module(module)
        except (ImportError, AssertionError) as error:  # mmdet asserts its supported versions
            raise ImportError(_explain(module, error)) from error
    from rfa_mmdet import compat, hooks, layers, models  # noqa: F401
    from rfa_mmdet.data import voc_dataset  # noqa: F401


def _explain(module: str, error: Exception) -> str:
    """Return why registration failed and how to fix it."""
    package = module.partition(".")[0]
    missing = getattr(error, "name", None)
    doctor = "`python -m rfa_mmdet doctor` prints the command that fixes this environment"
    if missing == package:
        onedl = any("onedl-mm" in (d.metadata["Name"] or "") for d in metadata.distributions())
        install = {**_INSTALL, **(_INSTALL_ONEDL if onedl else {})}[package]
        what, fix = f"{package} is not installed", f"run `{install}`; {doctor}"
    elif missing == "mmcv._ext":
        what = "mmcv has no compiled operators (mmcv-lite, or built without MMCV_WITH_OPS=1)"
        fix = doctor
    else:
        what, fix = f"{module} cannot be imported ({type(error).__name__}: {error})", doctor
    return f"rfa_mmdet cannot register its layers, because {what}: {fix}"


def __getattr__(name: str):
    if (
        name in ("compat", "hooks", "layers", "models", "retrofit")
        and find_spec("mmengine") is None
    ):
        raise ImportError(
            f"rfa_mmdet.{name} needs mmengine, mmcv with compiled operators, and mmdet. "
            f"mmengine is not installed: run `{_INSTALL['mmengine']}`"
        )
    if name == "retrofit":
        from rfa_mmdet.models import retrofit

        return retrofit
    raise AttributeError(f"module 'rfa_mmdet' has no attribute {name!r}")


# `python -m rfa_mmdet ...` imports the package before __main__.py, while argv[0] is still "-m".
# __main__ then does the registering, because the doctor must start even where that fails.
_RUN_AS_MAIN = (
    sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == __name__
)
if find_spec("mmengine") is not None and not _RUN_AS_MAIN:
    register()
