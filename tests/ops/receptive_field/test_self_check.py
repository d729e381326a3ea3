"""Run-time comparison of kernels with the formulas."""

import os
import signal
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rfa_mmdet.ops.receptive_field import backends, plain, schema, self_check
from rfa_mmdet.ops.receptive_field.self_check import Case, compare, failure, or_plain
from tests.helpers.backends import require
from tests.helpers.memory import deterministic

LAYERS = [
    ("rfa_conv",),
    ("pool_channels", "gated_conv"),
    ("pool_coordinates", "gated_conv"),
]
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # an unused lock
    monkeypatch.setattr(self_check, "PASSED", set())
    monkeypatch.setattr(self_check, "FAILED", {})
    backends._warn_once.cache_clear()
    yield
    backends._warn_once.cache_clear()


@pytest.fixture
def register():
    """Replace the CPU kernels during a test."""
    libraries = [torch.library.Library(schema.NAMESPACE, "IMPL")]
    yield lambda kernel: libraries[0].impl(kernel.__name__, or_plain(kernel), "CPU")
    getattr(libraries[0], "_destroy", lambda: None)()
    libraries.clear()


@pytest.mark.parametrize("operators", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_correct_kernels_pass(operators, dtype):
    require("cpu")
    for channels_last, gradients in product((False, True), repeat=2):
        case = Case(CPU, dtype, channels_last, gradients, operators)
        assert failure(case) is None
        assert self_check.is_known(case)
    assert len(self_check.PASSED) == 4


def test_every_operator_is_called():
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(str(function))
            return function(*args, **(kwargs or {}))

    with Record():
        for operators in LAYERS:
            compare(Case(CPU, torch.float32, False, True, operators))
    assert called >= {f"rfa_mmdet.{operator}.default" for operator in schema.OPERATORS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_avoid_kinks_and_ties(dtype):
    given = self_check._inputs(Case(CPU, dtype, False, False, LAYERS[0]))
    x, feature, scale, offset = (given[k].double() for k in ("x", "feature", "scale", "offset"))
    responses = torch.nn.functional.conv2d(x, feature, padding=1, groups=self_check.CHANNELS)
    normed = torch.nn.functional.batch_norm(
        responses, None, None, scale, offset, True, 0.0, self_check.EPS
    )
    assert normed.abs().min() > 1e-5  # ReLU's kink
    first, second = normed.unflatten(1, (self_check.CHANNELS, -1)).topk(2, dim=1)[0].unbind(1)
    assert first.min() > 0
    assert (first - second).min() > 1e-5  # no ties


def scaled(operator: str, position: int, factor: float):
    """Return a kernel with one wrong result."""
    kernel = getattr(plain, operator)

    # __wrapped__ provides the signature, by which or_plain() finds x.
    def wrong(*args):
        found = kernel(*args)
        if isinstance(found, torch.Tensor):
            return found * factor
        return tuple(t * factor if i == position else t for i, t in enumerate(found))

    wrong.__wrapped__ = kernel
    wrong.__name__ = operator
    return wrong


@pytest.mark.parametrize(
    ("operator", "position", "factor", "words"),
    [
        ("rfa_conv", 0, 1.001, "rfa_conv differs from the formula by 1.0e-03 of its largest"),
        ("rfa_conv", 0, float("nan"), "rfa_conv differs from the formula by nan"),
        ("window_moments", 0, 1.001, "the mean differs"),
        ("window_moments", 1, 1.001, "the variance differs"),
        ("window_moments_backward", 0, 0.9, "the gradient of x differs"),
        ("rfa_conv_backward", 1, 1.1, "the gradient of attention differs"),
        ("rfa_conv_backward", 5, 1.1, "the gradient of bias differs"),
    ],
)
def test_wrong_kernels_fail_and_plain_torch_replaces_them(
    register, operator, position, factor, words
):
    register(scaled(operator, position, factor))
    case = Case(CPU, torch.float32, False, True, LAYERS[0])
    with pytest.warns(UserWarning, match=f"in plain torch.*failed their self-check.*{words}"):
        assert backends._gpu_obstacle(True, *case) is None
    assert (CPU, torch.float32) in self_check.FAILED
    compare(case)  # now in plain torch
    with pytest.raises(ArithmeticError, match="differs"):
        # Other dtypes are not affected.
        compare(case._replace(dtype=torch.float64))
    message = f"backend='triton': the Triton kernels.* on cpu in.*{words}"
    with pytest.raises(RuntimeError, match=message) as raised:
        backends._require_passed(*case._replace(operators=LAYERS[1]))
    assert type(raised.value.__cause__) is ArithmeticError


def test_warning_appears_once(register, recwarn):
    register(scaled("rfa_conv", 0, 2.0))
    for channels_last, gradients in product((False, True), repeat=2):
        case = Case(CPU, torch.float32, channels_last, gradients, LAYERS[0])
        assert backends._gpu_obstacle(True, *case) is None
    assert len([w for w in recwarn if "self-check" in str(w.message)]) == 1


def test_exceptions_of_kernels_are_reported(register):
    def rfa_conv(x, *args):
        raise MemoryError("out of\n resource: shared memory")

    register(rfa_conv)
    case = Case(CPU, torch.float32, False, False, LAYERS[0])
    with pytest.warns(UserWarning, match="self-check .*MemoryError: out of resource: shared mem"):
        assert backends._gpu_obstacle(True, *case) is None
    with pytest.raises(RuntimeError, match="MemoryError"):
        backends._require_passed(*case)


# --------------------------------------------------------------------------- the caller's state


def refuse(x):
    raise AssertionError("a tensor was passed to the caller's hooks")


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    "new tensors elsewhere": lambda: torch.device("meta"),
    "anomaly detection": torch.autograd.detect_anomaly,
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("operators", LAYERS, ids=str)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_check_is_independent_of_the_callers_state(state, operators):
    before = torch.get_rng_state()
    with STATES[state]():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        compare(Case(CPU, torch.float32, False, True, operators))
        assert torch.is_grad_enabled() == grad
        assert torch.is_inference_mode_enabled() == inference
    assert torch.equal(torch.get_rng_state(), before)


def test_check_runs_inside_a_backward_pass():
    class Checks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            compare(Case(CPU, torch.float32, False, True, LAYERS[0]))
            return grad

    x = torch.ones(2, requires_grad=True)
    Checks.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


def test_torch_compile_treats_the_result_as_constant():
    def decide(x):
        case = backends._case(LAYERS[0], x, torch.float32)
        return x + 1 if backends._gpu_obstacle(True, *case) is None else x

    compiled = torch.compile(decide, fullgraph=True, backend="eager")
    x = torch.zeros(2, 3, 4, 5)
    assert compiled(x).sum() == x.numel()
    with torch.no_grad():
        assert compiled(x).sum() == x.numel()
    assert {case.gradients for case in self_check.PASSED} == {True, False}
    torch._dynamo.reset()


def test_formula_runs_if_deterministic_products_would_raise(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    case = Case(CPU, torch.float32, False, True, LAYERS[0])
    with deterministic():
        said = backends._gpu_obstacle(False, *case)
        assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in said
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert backends._gpu_obstacle(False, *case) is None


# --------------------------------------------------------------------------- processes


def fork(function, *args) -> int:
    child = os.fork()
    if not child:
        try:
            function(*args)
        finally:
            os._exit(0)
    return child


def hold(folder, pipe) -> None:
    with self_check.one_process_at_a_time(folder / "lock"):
        os.write(pipe, b"x")
        signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Return a process that keeps holding the lock."""
    ours, theirs = os.pipe()
    child = fork(hold, tmp_path, theirs)
    os.read(ours, 1)
    yield child
    for end in (ours, theirs):
        os.close(end)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_lock_is_released_when_its_holder_dies(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)
    with self_check.one_process_at_a_time(tmp_path / "lock"):  # does not wait for PATIENCE
        pass


def test_waiting_for_a_hanging_process_ends(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(self_check, "PATIENCE", 0.2)
    with self_check.one_process_at_a_time(tmp_path / "lock"):
        os.kill(holder, 0)


def come_and_go(folder) -> None:
    for _ in range(20):
        with (
            self_check.one_process_at_a_time(folder / "lock"),
            (folder / "log").open("a", 1) as log,
        ):
            log.write("in\n")
            log.write("out\n")


def test_one_process_at_a_time(tmp_path):
    for child in [fork(come_and_go, tmp_path) for _ in range(3)]:
        os.waitpid(child, 0)
    assert (tmp_path / "log").read_text() == 60 * "in\nout\n"


def test_processes_that_compile_the_same_kernels_share_a_lock():
    case = Case(CPU, torch.bfloat16, True, True, LAYERS[1])
    name = "rfa_mmdet-bfloat16-channels_last-pool_channels-gated_conv.lock"
    for same in (case, case._replace(device=torch.device("cuda", 1), gradients=False)):
        assert self_check._lock_name(same) == name
    cases = [Case(CPU, *kind, True, of) for *kind, of in product(DTYPES, (False, True), LAYERS)]
    assert len({self_check._lock_name(case) for case in cases}) == len(cases) == 18


def test_missing_lock_is_ignored(tmp_path):
    (tmp_path / "file").touch()
    with self_check.one_process_at_a_time(tmp_path / "file" / "lock"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("rank", ["0", "1", None])
def test_first_rank_of_a_machine_announces_the_check_once(rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    self_check._announce.cache_clear()
    for dtype in (torch.float16, torch.float32):
        case = Case(torch.device("cuda", 0), dtype, False, True, LAYERS[0])
        assert "CUDA" in str(failure(case)) or "NVIDIA" in str(failure(case))
    said = capsys.readouterr().err
    assert said.count("compiling and checking the GPU kernels") == (0 if rank == "1" else 1)
    assert (str(tmp_path) in said) == (rank != "1")
    self_check._announce.cache_clear()


# --------------------------------------------------------------------------- on a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("operators", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_kernels_pass_on_this_gpu(operators, dtype, channels_last):
    require("triton")
    device = torch.device("cuda", torch.cuda.current_device())
    compare(Case(device, dtype, channels_last, True, operators))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    compare(Case(device, dtype, channels_last, True, operators))
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 2**24


@gpu
def test_graph_captured_before_the_check_uses_the_formula():
    require("triton")
    layers = pytest.importorskip("rfa_mmdet.layers", reason="needs OpenMMLab's packages")
    layer = layers.RFAConv(32, 32, 3).cuda().eval()
    x, graph = torch.randn(2, 32, 9, 9, device="cuda"), torch.cuda.CUDAGraph()

    def capture():
        with torch.cuda.graph(graph):
            return layer(x)

    with torch.no_grad():
        layer.backend = "reference"
        expected = layer(x)  # and cuDNN chooses its algorithm
        layer.backend = "auto"
        torch.cuda.synchronize()
        with pytest.warns(UserWarning, match="during CUDA graph capture"):
            y = capture()
    graph.replay()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    assert not self_check.PASSED
