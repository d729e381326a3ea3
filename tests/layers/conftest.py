"""New memory is full of NaN: what a layer forgets to fill shows."""

from tests.helpers.memory import nan_filled_memory  # noqa: F401
