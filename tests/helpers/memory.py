"""Fill new memory with NaN, so values that a layer forgets to set are noticed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.helpers.torch_features import FILLS_MEMORY


@contextmanager
def deterministic(warn_only: bool = False) -> Iterator[None]:
    """Use torch's deterministic mode."""
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=only_warned)


@pytest.fixture(autouse=True)
def nan_filled_memory(monkeypatch):
    if not FILLS_MEMORY:
        yield
        return
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    # torch only fills memory in deterministic mode; ignore that some algorithms have no
    # deterministic variant.
    with deterministic(warn_only=True):
        yield
        # Otherwise the test, or a part of it, ran without.
        assert torch.empty(64).isnan().all()
