"""How many CPUs there are to use."""

import os


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1.

    Example:
        >>> 1 <= available_cpus() <= os.cpu_count()
        True
    """
    if hasattr(os, "sched_getaffinity"):  # not on Windows and macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
