"""Unrolling of kernels: loops over positions, arrays and shared fragments."""

import inspect

import pytest

from rfa_mmdet.ops.receptive_field.triton.unroll import include, unroll, unrolled

# ruff: noqa: F821


def _halves():
    """Reads and writes variables of the kernel."""
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


def test_loops_and_fragments_are_expanded():
    made = unrolled(kernel, N=3)
    assert made(1) == (1 + 2 + 3) + 11 * 10 + 12 * 100
    source = inspect.getsource(made)
    assert not [word for word in ("for ", "if ", "unroll(", "include(") if word in source]
    assert source.count("half_2 = value + 2") == 2


def test_loop_count_must_be_a_number():
    with pytest.raises(ValueError, match=r"unroll\(N\): must be a number"):
        unrolled(kernel)


@pytest.mark.parametrize("call", [lambda: unroll(3), lambda: include(_halves)])
def test_calling_a_marker_raises(call):
    with pytest.raises(TypeError, match="is only for the source of kernels"):
        call()
