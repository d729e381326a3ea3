"""New memory is full of NaN: what a layer forgets to fill shows."""

import pytest
import torch

from tests.helpers.torch_features import FILLS_MEMORY


@pytest.fixture(autouse=True, scope="module")
def nan_filled_memory():
    if not FILLS_MEMORY:
        yield
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Torch fills memory in its deterministic mode only; that some algorithm has no such form is
    # another matter.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
