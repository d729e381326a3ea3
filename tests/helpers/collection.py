"""Exclude modules from doctests that cannot be imported in this environment."""

from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.torch_features import LACKS_TRITON

KERNELS = ROOT / "rfa_mmdet" / "ops" / "receptive_field" / "triton"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if LACKS_TRITON and collection_path.is_relative_to(KERNELS) else None
