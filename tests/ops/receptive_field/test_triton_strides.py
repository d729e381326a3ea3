"""Fake tensors on a GPU have the strides of what the Triton kernels return.

Otherwise, Inductor's code fails: it asserts what fake tensors promise. Runs on a GPU; otherwise in
Triton's interpreter, by test_triton.py.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.operator_calls import operator_calls
from tests.helpers.torch_features import LACKS_TRITON
from tests.helpers.triton_cases import (
    DEVICE,
    INTERPRETED,
    in_the_interpreter,
    register_instead_of_cpu_kernels,
    runs,
)

if LACKS_TRITON:
    pytest.skip(LACKS_TRITON, allow_module_level=True)


def strides(results):
    """Return shapes, dtypes, and strides of axes along which there is something to step."""
    results = (results,) if isinstance(results, Tensor) else results
    return [
        (t.shape, t.dtype, [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1])
        for t in results
    ]


def fake(value):
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def compare(layout):
    if INTERPRETED:
        register_instead_of_cpu_kernels()
    given = dict(gradients=False, groups=1, size=(3, 2))
    for operator, inputs in operator_calls(torch.float32, layout, **given):
        inputs = [v.to(DEVICE) if isinstance(v, Tensor) else v for v in inputs]
        found = strides(operator(*inputs))
        with FakeTensorMode():
            promised = strides(operator(*map(fake, inputs)))
        assert found == promised, operator


@runs
def test_channels_last_results():
    compare(torch.channels_last)


@runs
def test_nchw_results():
    compare(torch.contiguous_format)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE is not None, reason="the other tests run in this process")
def test_nchw_in_the_interpreter():
    in_the_interpreter("nchw_results", 1, __file__)
