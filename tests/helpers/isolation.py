"""Isolate tests from those that ran before in the same process."""

import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

# Servers of tests are not behind a proxy.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    # Some tools raise KeyboardInterrupt on SIGTERM. In a later test, a pool that ends its workers
    # with SIGTERM would fork processes that unwind into pytest and run it a second time.
    before = signal.getsignal(signal.SIGTERM)
    try:
        return (yield)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed(0)
    # A tool that ran in this process may have enabled it.
    torch.use_deterministic_algorithms(False)
    # MMEngine's default scope from the last build: reset it, as in a new process.
    DefaultScope._instance_dict.clear()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    # Another one, or a test would draw what its fixtures have drawn.
    seed(1)
