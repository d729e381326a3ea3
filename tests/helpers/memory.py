"""Fill new memory with NaN, so values that a layer forgets to set are noticed."""

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
    # torch only fills memory in deterministic mode; ignore that some algorithms have no
    # deterministic variant.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
