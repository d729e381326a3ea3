"""Wait for processes: long enough on a busy machine, but not forever if one hangs."""

import subprocess
import time
from collections.abc import Callable

# In seconds: the longest command, the demo, takes a fifth of it on an idle machine. Less than
# gloo's timeout of half an hour, so a rank that waits for another one fails the test.
PATIENCE = 1500


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
