"""Hypothesis profiles: `ci` uses the same examples in every run; `thorough` finds new ones.

HYPOTHESIS_PROFILE=thorough python -m pytest tests/ops tests/layers
"""

import os

import torch
from hypothesis import HealthCheck, settings

pytest_plugins = [
    "tests.helpers.collection",
    "tests.helpers.fixtures",
    "tests.helpers.isolation",
    "tests.helpers.slurm",
]

slow_to_draw = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "ci",
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=slow_to_draw,
)
settings.register_profile(
    "thorough", max_examples=1000, deadline=None, suppress_health_check=slow_to_draw
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The tensors are small: using several threads on busy cores takes ten times longer. Processes
# started by tests are not affected.
torch.set_num_threads(1)
