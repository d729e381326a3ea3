"""Waiting for processes: long enough for a busy machine, and not without end for one that hangs."""

import subprocess
import time
from collections.abc import Callable

# Seconds: the longest command, the demo, takes a fifth of it on a quiet machine. Less than gloo's
# half an hour, so that a rank that waits for another one fails the test.
PATIENCE = 1500


def wait_until(
    happened: Callable[[], object],
    process: subprocess.Popen | None = None,
    printed: Callable[[], str] = str,
) -> None:
    """Wait until ``happened()``, as long as ``process``, if given, is alive.

    Args:
        happened: Asked again and again.
        process: Whose end before that fails the test.
        printed: What it has printed so far, shown where the test fails.
    """
    until = time.monotonic() + PATIENCE
    while not happened():
        assert process is None or process.poll() is None, f"it ended before:\n{printed()}"
        assert time.monotonic() < until, f"it did not happen:\n{printed()}"
        time.sleep(0.01)
