"""What writes kernels out: loops over positions, arrays, and parts that kernels share."""

import inspect

import pytest

from rfa_mmdet.ops.receptive_field.triton.unroll import include, unroll, unrolled

# ruff: noqa: F821


def _halves():
    """Reads and writes the names of the kernel."""
    half = []
    for i in unroll(N):
        half[i] = value + i
        if PLUS:
            half[i] += PLUS


def kernel(value):
    include(_halves, PLUS=0)
    total = 0
    for i in unroll(N):
        total += half[i]
    include(_halves, PLUS=10)
    for i in unroll(N):
        if i < N - 1:
            total += half[i] * (10 ** (i + 1))
    return total


def test_loops_and_parts_are_written_out():
    made = unrolled(kernel, N=3)
    assert made(1) == (1 + 2 + 3) + 11 * 10 + 12 * 100
    source = inspect.getsource(made)
    assert not [word for word in ("for ", "if ", "unroll(", "include(") if word in source]
    assert source.count("half_2 = value + 2") == 2


def test_a_loop_must_have_a_number():
    with pytest.raises(ValueError, match=r"unroll\(N\): must be a number"):
        unrolled(kernel)


@pytest.mark.parametrize("call", [lambda: unroll(3), lambda: include(_halves)])
def test_marks_are_not_for_calling(call):
    with pytest.raises(TypeError, match="is for the source of kernels"):
        call()
