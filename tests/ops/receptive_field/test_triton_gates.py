"""Gated and pooled features in Triton, compared with plain torch in float64.

Runs on a GPU if there is one; otherwise in Triton's interpreter, in a separate process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tolerances import TOLERANCES, without_tf32
from tests.helpers.torch_features import LACKS_TRITON
from tests.helpers.triton_cases import (
    DEVICE,
    SHARE,
    Case,
    error,
    in_chunks,
    in_the_interpreter,
    names,
    out_size,
    runs,
)

if LACKS_TRITON:
    pytest.skip(LACKS_TRITON, allow_module_level=True)


@pytest.fixture(autouse=True)
def full_precision():
    with without_tf32():
        yield


@pytest.mark.slow
@pytest.mark.skipif(DEVICE is not None, reason="the other tests run in this process")
def test_in_the_interpreter():
    in_the_interpreter("test_gates", 16, __file__)


@dataclass(frozen=True)
class Operator:
    """An operator on gated or pooled features, forward and backward."""

    name: str
    made: Callable[[Case, Callable[..., Tensor]], dict[str, Tensor]]  # further arguments

    def arguments(self, case: Case) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(2)
        inputs = case.make()

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=random).to(DEVICE)

        taken = {n: inputs[n] for n in ("x", "feature", "shift")}
        more = self.made(case, uniform)
        if self.name == "gated_conv":
            more["weight"], more["bias"] = inputs["weight"], inputs["bias"]
        return taken | more

    def run(self, case: Case, backend: Any, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x, feature, shift, *others = tensors.values()
        more: tuple[Any, ...] = (*others,)
        if self.name == "gated_conv":
            more = (*others, *case.window, 1)
        elif self.name == "pool_channels":
            more = (True, *case.window)
        else:
            more = case.window
        found = getattr(backend, self.name)(x, feature, shift, case.relu, *more)
        return found if isinstance(found, tuple) else (found,)

    def back(self, case: Case, backend: Any, tensors: dict, grads: tuple, made: tuple) -> tuple:
        x, feature, shift, *others = tensors.values()
        run = getattr(backend, f"{self.name}_backward")
        taken = (x, feature, shift, case.relu)
        if self.name == "gated_conv":
            *gates, weight, _ = others
            return run(grads[0], *taken, *gates, weight, (True,) * 4, *case.window, 1)
        if self.name == "pool_channels":
            return run(grads[0], *taken, made[1], (True, True), *case.window)
        return run(*grads, *taken, (True, True), *case.window)


def by_channel(case: Case, make: Callable[..., Tensor]) -> dict[str, Tensor]:
    k = case.kernel[0] * case.kernel[1]
    return dict(first=make(case.batch, case.channels), second=make(case.batch, k, *out_size(case)))


def by_row(case: Case, make: Callable[..., Tensor]) -> dict[str, Tensor]:
    (high, wide), (height, width) = case.kernel, out_size(case)
    shape = (case.batch, case.channels)
    return dict(first=make(*shape, high, height), second=make(*shape, wide, width))


OPERATORS = [
    Operator("gated_conv", by_channel),
    Operator("gated_conv", by_row),
    Operator("pool_channels", lambda case, make: {}),
    Operator("pool_coordinates", lambda case, make: {}),
]


@runs
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        # In the interpreter, programs walk over three or more rows.
        (Case(kernel=(3, 2), padding=(1, 0)), 1000),
        (Case(channels=35, kernel=(2, 2), size=(3, 3), batch=1, channels_last=True), 2),
        (Case(stride=(2, 1), kernel=(3, 2), relu=False, channels_last=True), 2),
        (Case(kernel=(2, 2), size=(3, 3), dtype=torch.bfloat16, channels_last=True), 2),
    ],
    ids=names,
)
@pytest.mark.parametrize("of", OPERATORS, ids=lambda of: f"{of.name}-{of.made.__name__}")
def test_gates_and_pools_match_plain_torch(of, case, rows, monkeypatch):
    """test_plain.py compares plain torch with the formulas."""
    from rfa_mmdet.ops.receptive_field import plain
    from rfa_mmdet.ops.receptive_field.triton import operators as backend

    launched = in_chunks(case, rows, monkeypatch)
    inputs = of.arguments(case)
    truth = {n: None if t is None else t.cpu().double() for n, t in inputs.items()}
    found, expected = of.run(case, backend, inputs), of.run(case, plain, truth)
    tolerance = SHARE[case.dtype] * TOLERANCES[case.dtype].output
    assert error(found[0], expected[0]) < tolerance
    random = torch.Generator().manual_seed(3)
    outputs = 2 if of.name == "pool_coordinates" else 1
    grads = [torch.randn(t.shape, generator=random).to(t.dtype) for t in expected[:outputs]]
    grads = [g.to(f.dtype) for g, f in zip(grads, found, strict=False)]
    exactly = of.back(case, plain, truth, tuple(g.double() for g in grads), expected)
    # Half precision may choose another maximum, so pass the exact choice.
    made = (found[0], expected[1].to(DEVICE).float()) if len(found) == 2 else found
    gradients = of.back(case, backend, inputs, tuple(g.to(DEVICE) for g in grads), made)
    tolerance = SHARE[case.dtype] * TOLERANCES[case.dtype].gradient
    for gradient, exact_one in zip(gradients, exactly, strict=True):
        assert error(gradient, exact_one) < 2 * tolerance  # gates and their product are rounded
    assert launched["products_kernel"] > 1 or rows >= case.batch * out_size(case)[0]
