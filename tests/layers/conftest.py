"""Fill new memory with NaN, so values that a layer forgets to set are noticed."""

from tests.helpers.memory import nan_filled_memory  # noqa: F401
