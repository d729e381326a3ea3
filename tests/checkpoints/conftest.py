"""Enable safe loading, and provide checkpoints of a real run."""

from tests.helpers.toy_checkpoints import _installed, trained  # noqa: F401
