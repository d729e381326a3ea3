"""Results do not depend on the order of the Triton kernels' programs or on uninitialized memory.

Runs in Triton's interpreter, in a separate process, with a GPU's tiles and grids. The fast ones run
in that of test_triton.py.
"""

import pytest
import torch
from torch import Tensor

from rfa_mmdet.ops.common.windows import Window
from tests.helpers.memory import deterministic
from tests.helpers.torch_features import LACKS_TRITON
from tests.helpers.triton_cases import (
    INTERPRETED,
    KINDS,
    Case,
    in_chunks,
    in_the_interpreter,
    names,
    train,
)

if LACKS_TRITON:
    pytest.skip(LACKS_TRITON, allow_module_level=True)

import triton
import triton.language as tl

from rfa_mmdet.ops.receptive_field import autograd
from rfa_mmdet.ops.receptive_field.triton import launch
from tests.helpers.triton_watch import OnTriton, Watch

interpreted = pytest.mark.skipif(not INTERPRETED, reason="another process runs this")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the other tests run in this process")
def test_all_in_the_interpreter():
    in_the_interpreter("matters", 12, __file__)


@triton.jit
def faulty_kernel(x, y, BLOCK: tl.constexpr):
    """Programs write the same element, read what others write, and read out of bounds."""
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    value = tl.load(x + at + 2)
    tl.store(y + at, value)
    tl.store(x + at, value + 1)


@interpreted
def test_faults_are_found():
    x, y = torch.zeros(40)[:32], torch.zeros(32)
    watch = Watch()
    with watch.watching():
        launch.launch(faulty_kernel, (2,), x, (x, y), dict(BLOCK=16))
    assert watch.faults == {
        "faulty_kernel reads outside its tensors",
        "faulty_kernel writes one address from two programs",
        "faulty_kernel reads what another of its programs writes",
    }


def step(kind: str, case: Case) -> list[Tensor]:
    """Return the output of a layer in training, the batch statistics, and all gradients."""
    inputs = case.make()
    shift = inputs.pop("shift")
    inputs |= dict(scale=torch.full_like(shift, 1.5), offset=shift)
    if kind != "attention":
        del inputs["attention"]
    for tensor in inputs.values():
        tensor.requires_grad_()
    y, *statistics = train(kind, inputs, Window(*case.window))
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *statistics, *torch.autograd.grad(y, list(inputs.values()), grad_y)]


def compare(kind, case, monkeypatch, schedulers=528, rows=2):
    """Compare a step with NaN in new memory and watched programs with a normal step."""
    monkeypatch.setitem(launch.SCHEDULERS, "cpu", schedulers)
    launched = in_chunks(case, rows, monkeypatch)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    watch = Watch()
    with deterministic(), OnTriton():
        expected = step(kind, case)
        torch.utils.deterministic.fill_uninitialized_memory = True
        # As on a GPU, add the gradient through the moments in place.
        monkeypatch.setattr(autograd, "_is_to_spare", lambda grad: True)
        assert torch.empty(3).isnan().all()
        with watch.watching():
            found = step(kind, case)
    assert watch.faults == set()
    assert launched["features_kernel"] >= 4  # two chunks, two steps
    for a, b in zip(found, expected, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)


# The interpreter takes a second per position.
FEW = dict(kernel=(2, 2), padding=(1, 0), channels=2, outputs=3)
FEWER = FEW | dict(kernel=(2, 1), batch=1)
CASES = [
    Case(size=(2, 70), **FEWER),  # several tiles of columns
    Case(size=(3, 5), channels_last=True, **FEWER | dict(channels=35)),  # and of channels
    Case(size=(6, 5), stride=(2, 2), channels_last=True, **FEW),
    Case(size=(6, 5), stride=(2, 1), **FEWER),
    Case(size=(4, 3), dilation=(2, 2), channels_last=True, **FEW | dict(batch=1)),
    Case(size=(5, 4), dilation=(2, 1), dtype=torch.bfloat16, **FEWER),
]


@interpreted
def test_quick(monkeypatch):
    compare("attention", Case(size=(3, 3), **FEWER), monkeypatch)


@interpreted
@pytest.mark.parametrize("case", CASES, ids=names)
def test_neither_order_nor_new_memory_matters(case, monkeypatch):
    compare("attention", case, monkeypatch)


@interpreted
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=names)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_neither_matters_with_gates(case, kind, monkeypatch):
    compare(kind, case, monkeypatch)


@interpreted
@pytest.mark.parametrize(("channels_last", "schedulers"), [(False, 1), (True, 3)])
def test_neither_matters_with_several_rows_per_program(channels_last, schedulers, monkeypatch):
    case = Case(size=(9, 4), channels_last=channels_last, **FEWER)
    compare("attention", case, monkeypatch, schedulers, rows=5)
