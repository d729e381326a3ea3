"""New memory is full of NaN, as for the layers."""

from tests.layers.conftest import nan_filled_memory  # noqa: F401
