"""MMDetection's scope, and logs of loading checkpoints."""

import pytest
from mmengine.registry import init_default_scope

from rfa_mmdet.models.retrofit import new_layers


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope("mmdet")


@pytest.fixture
def reports(monkeypatch) -> list[str]:
    """Return the messages logged while loading."""
    found = []
    monkeypatch.setattr(new_layers, "print_log", lambda text, logger: found.append(text))
    return found
