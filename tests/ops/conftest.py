"""Fill new memory with NaN, so that values an operator forgets to write are noticed."""

from tests.helpers.memory import nan_filled_memory  # noqa: F401
