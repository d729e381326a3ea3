"""The Triton kernels, compared with formulas in float64.

Runs on a GPU if there is one; otherwise in Triton's interpreter, in a separate process.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.windows import Window
from tests.helpers.tolerances import TOLERANCES, without_tf32
from tests.helpers.torch_features import LACKS_TRITON
from tests.helpers.triton_cases import (
    DEVICE,
    INTERPRETED,
    SHARE,
    Case,
    error,
    exact,
    in_chunks,
    in_the_interpreter,
    names,
    register_instead_of_cpu_kernels,
    runs,
    windows,
)

if LACKS_TRITON:
    pytest.skip(LACKS_TRITON, allow_module_level=True)

on_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def full_precision():
    with without_tf32():
        yield


in_another_process = pytest.mark.skipif(
    DEVICE is not None, reason="the other tests run in this process"
)


@in_another_process
def test_few_in_the_interpreter():
    """In one process for three files, because starting it takes as long as several tests."""
    memory = Path(__file__).with_name("test_triton_memory.py")
    strides = Path(__file__).with_name("test_triton_strides.py")
    chosen = "(plain and not 1000) or faults or quick or channels_last_results"
    in_the_interpreter(chosen, 7, __file__, memory, strides)


@in_another_process
@pytest.mark.slow
def test_all_in_the_interpreter():
    in_the_interpreter("test_", 65, __file__)


# In the interpreter, programs walk over three or more rows if maps in NCHW have five rows and at
# least two channels.
CASES = [
    Case(batch=1, channels=1, outputs=1, size=(1, 1)),
    Case(),
    Case(channels=3, channels_last=True),
    Case(channels=1, size=(2, 40), kernel=(2, 1)),  # several tiles of columns
    # Several tiles of channels.
    Case(channels=35, outputs=19, size=(2, 13), kernel=(2, 1), batch=1, channels_last=True),
    Case(stride=(2, 2), batch=1, size=(9, 4), bias=False),
    Case(dilation=(2, 1), kernel=(3, 1), padding=(2, 0), batch=1),
    Case(stride=(2, 3), dilation=(2, 1), padding=(2, 0), size=(9, 11), channels_last=True),
    Case(outputs=8, relu=False, channels_last=True),
    Case(kernel=(1, 1), padding=(0, 0)),
    Case(kernel=(2, 4), padding=(0, 3)),
    Case(kernel=(1, 5), padding=(3, 2), stride=(3, 1), channels_last=True),
    # Fallback to plain torch: more than 9 positions, and groups.
    Case(kernel=(2, 5), padding=(1, 2), channels=2, dilation=(1, 2), size=(4, 7), batch=1),
    Case(kernel=(4, 3), channels=2, stride=(2, 1), size=(6, 5), batch=1, channels_last=True),
    Case(channels=4, outputs=8, groups=2, size=(4, 3)),
    Case(magnitude=1e4, kernel=(2, 2)),
    Case(magnitude=1e-4, kernel=(2, 2)),
    Case(dtype=torch.float16, kernel=(2, 2)),
    Case(dtype=torch.bfloat16, channels_last=True),
]
LARGE = [  # more than one tile in each direction; too slow for the interpreter
    Case(channels=40, outputs=200, size=(37, 53)),
    Case(channels=48, outputs=72, size=(64, 31), stride=(2, 1)),
    Case(channels=24, outputs=40, size=(33, 35), padding=(2, 2), dilation=(2, 2)),
]


def compare_forward(case: Case, precision: torch.dtype | None = None) -> None:
    from rfa_mmdet.ops.receptive_field.triton import operators as backend

    inputs = case.make()
    order = ("x", "attention", "feature", "shift")
    y = backend.rfa_conv(
        *(inputs[name] for name in order),
        case.relu,
        inputs["weight"],
        inputs["bias"],
        *case.window,
        case.groups,
    )
    assert y.dtype == case.dtype
    kernels = case.groups == 1 and case.kernel[0] * case.kernel[1] <= 9
    if case.channels_last and case.channels > 1 and (kernels or DEVICE == "cuda"):
        assert y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert y.is_contiguous()
    precision = precision or case.dtype
    tolerance = SHARE[precision] * TOLERANCES[precision].output
    assert error(y, case.forward(**exact(inputs))) < tolerance


def compare_backward(
    case: Case, needs=(True,) * 4, precision: torch.dtype | None = None
) -> list[Tensor | None]:
    from rfa_mmdet.ops.receptive_field.triton import operators as backend

    inputs = case.make()
    truth = exact(inputs)
    expected = case.forward(**truth)
    grad_y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    grad_y = grad_y.to(case.dtype).to(DEVICE)
    expected.backward(grad_y.cpu().double())
    found = backend.rfa_conv_backward(
        grad_y,
        *(inputs[name] for name in ("x", "attention", "feature", "shift")),
        case.relu,
        inputs["weight"],
        needs,
        *case.window,
        case.groups,
    )
    names = ("x", "attention", "feature", "shift", "weight", "bias")
    needed = (needs[0], *(needs[1],) * 3, *needs[2:])
    precision = precision or case.dtype
    tolerance = SHARE[precision] * TOLERANCES[precision].gradient
    for name, gradient, need in zip(names, found, needed, strict=True):
        if not need:
            assert gradient.numel() == 0
        elif inputs[name] is not None:
            assert gradient.dtype == inputs[name].dtype
            assert error(gradient, truth[name].grad) < tolerance
    return found


@runs
@pytest.mark.parametrize("case", CASES, ids=names)
def test_output_matches_the_formula(case):
    compare_forward(case)


@runs
@pytest.mark.parametrize("case", CASES, ids=names)
def test_gradients_match_the_formula(case):
    compare_backward(case)


@runs
@pytest.mark.parametrize("case", [Case(kernel=(2, 2), channels_last=True)], ids=names)
@pytest.mark.parametrize("needed", range(4))
def test_only_needed_gradients_are_computed(case, needed):
    compare_backward(case, tuple(i == needed for i in range(4)))


@runs
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        (Case(size=(5, 4), kernel=(2, 1), channels=1), (1, 2)),
        # 8 rows are two images; the last chunk has one.
        (Case(batch=3, size=(3, 2), kernel=(2, 1), channels_last=True), (2, 8)),
        (
            Case(size=(7, 3), stride=(2, 2), kernel=(3, 1), dilation=(2, 2), channels_last=True),
            (1,),
        ),
        (Case(size=(9, 4), stride=(3, 1), kernel=(2, 1), padding=(3, 0), channels_last=True), (2,)),
        (Case(size=(6, 2), kernel=(3, 1), dilation=(2, 1), padding=(2, 0), channels=1), (2,)),
    ],
    ids=names,
)
def test_chunks_add_up(case, rows, monkeypatch):
    from rfa_mmdet.ops.receptive_field.triton import launch

    whole = compare_backward(case)
    for number in rows:
        with monkeypatch.context() as patch:
            launched = in_chunks(case, number, patch)
            patch.setitem(launch.SCHEDULERS, "cpu", 528)  # a program for each row
            compare_forward(case)
            for found, expected in zip(compare_backward(case), whole, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert launched["gradient_kernel"] > 1


@runs
def test_upstream_gradient_with_any_strides():
    from rfa_mmdet.ops.receptive_field.triton import operators as backend

    case = Case(kernel=(2, 1), padding=(0, 0))
    inputs = case.make()
    inputs = [inputs[n] for n in ("x", "attention", "feature", "shift", "weight")]
    *parameters, weight = inputs
    # Like the gradient of a sum: one value, with strides of zero.
    one = torch.ones(1, dtype=case.dtype, device=DEVICE).expand(2, 3, 4, 4)
    arguments = (True, weight, (True,) * 4, *case.window, 1)
    for a, b in zip(
        backend.rfa_conv_backward(one, *parameters, *arguments),
        backend.rfa_conv_backward(one.contiguous(), *parameters, *arguments),
        strict=True,
    ):
        assert torch.equal(a, b)


@runs
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(channels=17, batch=1, size=(5, 8), channels_last=True),
        Case(stride=(2, 1), dilation=(2, 1), padding=(1, 3), size=(6, 5)),
        Case(kernel=(2, 5), padding=(1, 2), size=(3, 7)),
        Case(kernel=(1, 1), padding=(0, 0)),
        Case(dtype=torch.bfloat16, channels=1),
    ],
    ids=names,
)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_match_those_of_the_windows(case, offset):
    from rfa_mmdet.ops.receptive_field.triton import operators as backend

    case = replace(case, padding=(0, 0)) if offset else case  # padding would dominate the deviation
    x = case.make()["x"]
    x += offset
    first, second = backend.window_moments(x, *case.window)
    u = windows(x.cpu().double(), case).transpose(0, 1).transpose(1, 2).flatten(2)  # (C, K, N)
    mean = u.mean(2)
    centred = u - mean[..., None]
    covariance = centred @ centred.mT / u.shape[2]
    assert first.dtype == second.dtype == torch.float32
    tolerance = TOLERANCES[case.dtype].statistics
    assert error(first, mean) < tolerance
    # Values near 1000 have 14 bits for the deviation.
    assert error(second, covariance) < 10 * tolerance


@runs
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(channels=17, batch=1, channels_last=True),
        Case(stride=(2, 3), padding=(1, 2), size=(5, 9), channels=1),
        Case(stride=(1, 2), dilation=(2, 1), padding=(0, 1), size=(6, 7), channels=1),
        Case(kernel=(2, 5), padding=(1, 2), size=(3, 4)),
        Case(dtype=torch.bfloat16, channels=1),
    ],
    ids=names,
)
def test_gradient_through_the_moments_is_a_fold_of_windows(case):
    from rfa_mmdet.ops.receptive_field.triton import operators as backend

    x = case.make()["x"]
    c, k = case.channels, case.kernel[0] * case.kernel[1]
    slope, constant = torch.randn(c, k, k, device=DEVICE), torch.randn(c, k, device=DEVICE)
    slope = slope + slope.mT
    u = windows(x.cpu().double(), case)
    v = torch.einsum("cij,bcjp->bcip", slope.cpu().double(), u) + constant.cpu().double()[..., None]
    size = (case.size, case.kernel, case.dilation, case.padding, case.stride)
    given = torch.randn_like(x) if case.stride == (1, 1) else None
    if given is None or case.channels_last:
        grad_x = backend.window_moments_backward(x, slope, constant, given, *case.window)
    else:
        grad_x = given.clone()
        backend.add_window_moments_backward(grad_x, x, slope, constant, *case.window)
    tolerance = TOLERANCES[case.dtype].statistics
    if case.dtype != torch.float32:  # computed in float32, then rounded to x's dtype
        tolerance = TOLERANCES[case.dtype].output
    expected = F.fold(v.flatten(1, 2), *size)
    assert error(grad_x, expected if given is None else expected + given.cpu()) < tolerance


@runs
def test_nan_and_infinity_propagate():
    from rfa_mmdet.ops.receptive_field.triton import operators as backend

    case = Case(batch=1, channels=1, outputs=1, size=(7, 7), bias=False)
    for value in (torch.nan, torch.inf):
        inputs = case.make()
        inputs["x"][0, 0, 3, 3] = value
        order = ("x", "attention", "feature", "shift")
        y = backend.rfa_conv(
            *(inputs[n] for n in order), True, inputs["weight"], None, *case.window, 1
        )
        expected = torch.ones(7, 7, dtype=torch.bool)
        expected[2:5, 2:5] = False  # the windows that contain it
        assert torch.equal(y[0, 0].isfinite().cpu(), expected)


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("case", "rows", "chunks"), [*((case, 1000, 1) for case in LARGE), (LARGE[0], 15, 6)], ids=names
)
def test_many_tiles_on_a_gpu(case, rows, chunks, channels_last, dtype, monkeypatch):
    from rfa_mmdet.ops.receptive_field.triton.chunks import takes

    case = replace(case, channels_last=channels_last, dtype=dtype)
    inputs = case.make()
    assert takes(inputs["x"], inputs["weight"], Window(*case.window), case.groups)
    launched = in_chunks(case, rows, monkeypatch)
    compare_forward(case)
    assert launched["features_kernel"] == chunks
    first, second = compare_backward(case), compare_backward(case)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b), "two runs must give the same bits"


@on_cuda
@pytest.mark.parametrize("channels_last", [False, True])
def test_tf32_is_as_precise_as_float16(channels_last, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    case = replace(LARGE[0], channels_last=channels_last)
    compare_forward(case, torch.float16)
    compare_backward(case, precision=torch.float16)


@runs
@pytest.mark.parametrize(
    ("channels_last", "training"), [(False, True), (True, True), (False, False)]
)
def test_layer_matches_the_reference(channels_last, training):
    """Tests the whole layer, through PyTorch's dispatcher."""
    layers = pytest.importorskip("rfa_mmdet.layers", reason="needs OpenMMLab's packages")
    torch.manual_seed(0)
    backend = "triton"
    if INTERPRETED:
        backend = "cpu"
        register_instead_of_cpu_kernels()
    fast = layers.RFAConv(2, 3, 2, padding=1, backend=backend).to(DEVICE).train(training)
    slow = layers.RFAConv(2, 3, 2, padding=1, backend="reference").double().train(training)
    slow.load_state_dict(fast.state_dict())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 2, 3, 4).contiguous(memory_format=layout)
    b = x.double().requires_grad_()
    a = x.to(DEVICE).requires_grad_()
    y, expected = fast(a), slow(b)
    grad_y = torch.randn(expected.shape)
    y.backward(grad_y.to(DEVICE))
    expected.backward(grad_y.double())
    assert y.is_contiguous(memory_format=layout)
    tolerance = SHARE[torch.float32] * TOLERANCES[torch.float32].layer_gradient
    assert error(y.detach(), expected) < tolerance
    assert error(a.grad, b.grad) < tolerance
    for (name, p), q in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert error(p.grad, q.grad) < tolerance, name
    for (name, p), q in zip(fast.named_buffers(), slow.buffers(), strict=True):
        assert error(p.float(), q.double()) < tolerance, name
