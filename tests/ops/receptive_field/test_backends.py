"""Choice between kernels, plain torch and formula, and the messages if there are no kernels."""

import inspect
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from rfa_mmdet.ops.receptive_field import backends
from rfa_mmdet.ops.receptive_field.backends import check_backend, load_cpu_kernels, use_operators
from rfa_mmdet.ops.receptive_field.self_check import Case
from rfa_mmdet.ops.receptive_field.sources import digest
from tests.helpers.backends import copy_without_kernels, require
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE
from tests.helpers.torch_features import AUTOCAST_TYPES

RFA_CONV = ("rfa_conv",)


def use(name, dtype=torch.float32, device="cpu", weight_dtype=None):
    x = torch.empty(1, 1, 3, 3, dtype=dtype, device=device)
    return use_operators(name, RFA_CONV, x, x.to(weight_dtype or dtype))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='gpu': must be one of .*'auto'.*'triton'"):
        check_backend("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_forcing_an_unavailable_backend_raises():
    with pytest.raises(RuntimeError, match="backend='triton': there is no CUDA device"):
        check_backend("triton")
    with pytest.raises(RuntimeError, match="backend='triton': there is no CUDA device"):
        use("triton")


def test_forcing_a_backend_without_the_operators_raises(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend: None)
    monkeypatch.setattr(backends, "has_kernel", lambda operator, _: operator != "gated_conv")
    assert check_backend("triton", ("rfa_conv",)) == "triton"
    with pytest.raises(ValueError, match="backend='triton': does not implement gated_conv; use"):
        check_backend("triton", ("pool_channels", "gated_conv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_uses_operators_for_supported_dtypes(dtype):
    assert use("auto", dtype) == (dtype in (torch.float32, torch.bfloat16))
    assert not use("auto", dtype, "meta")
    assert not use("reference", dtype)


def test_modes_that_fake_or_count_operators_get_the_formula():
    with torch._subclasses.FakeTensorMode():
        assert not use("auto")
        assert not use("cpu")


def test_auto_uses_the_formula_for_mixed_dtypes():
    assert not use("auto", torch.bfloat16, weight_dtype=torch.float32)


@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
def test_autocast_determines_the_dtype(dtype):
    with torch.autocast("cpu", dtype=dtype):
        assert use("auto") == (dtype == torch.bfloat16)
        assert use("auto", torch.bfloat16, weight_dtype=torch.float32) == use("auto")
        assert not use("auto", torch.float64)


def test_forced_backend_raises_for_unsupported_inputs(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend: None)
    assert use("cpu", torch.float64)
    with pytest.raises(TypeError, match=r"backend='cpu': .* not torch.float16"):
        use("cpu", torch.float16)
    with pytest.raises(TypeError, match=r"torch.bfloat16 .* the weight is torch.float32"):
        use("cpu", torch.bfloat16, weight_dtype=torch.float32)
    with pytest.raises(ValueError, match="backend='triton': the input must be on cuda, not on cpu"):
        use("triton")
    with pytest.raises(ValueError, match="backend='cpu': the input must be on cpu, not on meta"):
        use("cpu", device="meta")


# --------------------------------------------------------------------------- without kernels

PLAIN = "receptive-field convolutions run in plain torch, which is slower than the kernels: "
UNBUILT = """
import copy, warnings, torch
from rfa_mmdet import layers
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for layer in (layers.RFAConv(4, 6, 3), layers.RFCBAMConv(4, 6, 3), layers.RFCAConv(4, 6, 3)):
        formula = copy.deepcopy(layer)
        formula.backend = "reference"
        for training in (True, False):
            x = torch.randn(2, 4, 7, 6, requires_grad=True)
            upstream = torch.randn(2, 6, 7, 6)
            found, expected = (
                [y, *torch.autograd.grad(y, [x, *one.parameters()], upstream)]
                for one in (layer, formula)
                for y in [one.train(training)(x)]
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert layer.window_features(x) is not None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
print([str(w.message) for w in caught if "plain torch" in str(w.message)])
try:
    layers.RFAConv(2, 3, 3, backend="cpu")
except RuntimeError as error:
    print(error)
"""


STALE = """
import warnings, torch
from rfa_mmdet.layers import RFAConv
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for layer in (RFAConv(2, 3, 3), RFAConv(2, 3, 3)):
        layer(torch.ones(1, 2, 4, 4))
print([str(w.message) for w in caught])
try:
    RFAConv(2, 3, 3, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def said(script, folder):
    """Return the two lines that a script prints when run with a copy of the package."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={"PYTHONPATH": str(folder), "PATH": "", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("\n")


def test_without_a_build_plain_torch_runs_and_warns_once(tmp_path):
    copy_without_kernels(tmp_path)
    notices, error = said(UNBUILT, tmp_path)
    assert notices.count("slower than the kernels: the C++ extension is not built") == 1
    assert notices.count("make env") == 1
    assert "make env" in error
    assert "backend='cpu'" in error


def test_libraries_older_than_their_sources_are_not_loaded(tmp_path):
    require("cpu")
    folder = shutil.copytree(ROOT / "rfa_mmdet", tmp_path / "rfa_mmdet", symlinks=True)
    folder = folder / "ops" / "receptive_field"
    # Like an update that changes an operator; loading the libraries would abort the process.
    for file in (folder / "schema.py", folder / "csrc" / "bindings.cpp"):
        file.write_text(file.read_text().replace("bool relu", "int relu"))
    notices, error = said(STALE, tmp_path)
    reason = f"{backends.OTHER_SOURCES}: {backends.REBUILD_ADVICE}"
    assert notices == f"['{PLAIN}{reason}']"
    assert error == f"backend='cpu': {reason}"
    assert "`make env` or `pip install -e .`" in reason


def test_libraries_of_an_interrupted_build_are_not_loaded(tmp_path):
    built = Path(backends.__file__).parent
    shutil.copytree(built / "csrc", tmp_path / "csrc")
    library = tmp_path / f"_cpu_default.torch-{torch.__version__}.so"
    library.write_bytes(b"no library")
    stamp = library.with_suffix(".stamp")
    stamp.touch()
    assert load_cpu_kernels(tmp_path) == backends.OTHER_SOURCES
    stamp.write_text(f"{digest(tmp_path / 'csrc')} ...")
    assert "does not load" in load_cpu_kernels(tmp_path)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Make torch report a GPU."""
    backends._missing.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ours = "rfa_mmdet.ops.receptive_field.triton"
    for name in [*sys.modules]:
        if name.startswith(ours):
            monkeypatch.delitem(sys.modules, name)
    yield monkeypatch
    backends._missing.cache_clear()


def test_amd_gpus_are_not_supported(on_a_gpu):
    on_a_gpu.setattr(torch.version, "hip", "6.4.0")
    assert backends.missing("triton") == (
        "the Triton kernels support NVIDIA GPUs only, and this torch is built for AMD"
    )


def test_missing_triton_is_reported(on_a_gpu):
    on_a_gpu.setitem(sys.modules, "triton", None)
    assert "triton is not installed: pip install triton" in backends.missing("triton")


def test_unsuitable_triton_is_reported(on_a_gpu):
    on_a_gpu.setitem(sys.modules, "triton", types.ModuleType("triton"))
    sys.modules["triton"].__version__ = "1.0"
    assert "the Triton kernels cannot be imported (" in backends.missing("triton")
    with pytest.raises(RuntimeError, match="backend='triton': the Triton kernels cannot be"):
        check_backend("triton")


def test_missing_c_compiler_is_reported_with_a_fix(monkeypatch, tmp_path):
    build = pytest.importorskip("triton.runtime.build")._build
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    lists = [[]] * (len(inspect.signature(build).parameters) - 3)
    with pytest.raises(RuntimeError) as raised:
        build("launcher", "launcher.c", str(tmp_path), *lists)
    case = Case(torch.device("cuda", 0), torch.float16, False, True, RFA_CONV)
    said = backends._describe(case, raised.value)
    assert said.startswith(
        "the Triton kernels failed their self-check on cuda:0 in torch.float16: "
    )
    assert "RuntimeError: Failed to find C compiler" in said
    assert said.endswith("e.g. gcc and python3-dev")


# --------------------------------------------------------------------------- C++


def test_library_without_an_operator_is_not_used(monkeypatch):
    require("cpu")
    folder = Path(backends.__file__).parent
    assert load_cpu_kernels(folder) is None
    monkeypatch.setattr(backends, "has_kernel", lambda operator, _: operator != "gated_conv")
    assert load_cpu_kernels(folder) == backends.OTHER_SOURCES


def test_library_for_another_torch_is_reported(tmp_path):
    (tmp_path / "_cpu_default.torch-1.0.so").touch()
    assert load_cpu_kernels(tmp_path) == (
        f"the C++ extension was built for torch 1.0, but this is torch {torch.__version__}"
    )


def test_library_that_fails_to_load_is_reported(tmp_path):
    name = f"_cpu_default.torch-{torch.__version__}.so"
    (tmp_path / name).write_bytes(b"no library")
    assert f"{name} does not load" in load_cpu_kernels(tmp_path)
