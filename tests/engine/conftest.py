"""The drawn data set and thin detector of the tools' tests, for runs of real processes here."""

from tests.tools.conftest import environment, run_tool, shapes, tiny_config  # noqa: F401
