"""Hypothesis profiles: `ci` repeats the same examples in every run; `thorough` looks for new ones.

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

# Tensors here are small: a thread of its own for each slice of them, on cores that others use as
# well, takes ten times as long. Processes that tests start are not touched.
torch.set_num_threads(1)
