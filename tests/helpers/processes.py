"""Wait for processes: long enough on a busy machine, but not forever if one hangs."""

import subprocess
import time
from collections.abc import Callable

import torch

# In seconds: the longest command takes a tenth of it on an idle machine. Less than
# gloo's timeout of half an hour, so a rank that waits for another one fails the test.
PATIENCE = 1500
# Forking is far faster, because importing everything again takes longer than most tests. But with a
# GPU, autograd does not run in a fork of a process in which it has run.
START_METHOD = "spawn" if torch.cuda.is_available() else "fork"


def wait_until(
    happened: Callable[[], object],
    process: subprocess.Popen | None = None,
    printed: Callable[[], str] = str,
) -> None:
    """Wait until ``happened()``, as long as ``process``, if given, is alive.

    Args:
        happened: Condition, checked repeatedly.
        process: Process whose earlier end fails the test.
        printed: Returns its output so far, shown if the test fails.
    """
    until = time.monotonic() + PATIENCE
    while not happened():
        assert process is None or process.poll() is None, f"it ended before:\n{printed()}"
        assert time.monotonic() < until, f"it did not happen:\n{printed()}"
        time.sleep(0.01)
