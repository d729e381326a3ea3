"""Where the kernels run, and what is said where they cannot."""

import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from rfa_mmdet.ops.receptive_field import backends
from rfa_mmdet.ops.receptive_field.backends import check_backend, load_cpu_kernels, use_kernels
from tests.helpers.backends import require
from tests.helpers.paths import ROOT
from tests.helpers.torch_features import AUTOCAST_TYPES

RFA_CONV = ("rfa_conv", "window_moments")


@pytest.fixture
def available(monkeypatch):
    """Let a set of backends be available."""

    def only(*names):
        monkeypatch.setattr(backends, "missing", lambda n: None if n in names else "none here")
        monkeypatch.setattr(backends, "has_kernel", lambda operator, backend: backend in names)
        backends._has_loaded_kernels.cache_clear()
        backends._warn_once.cache_clear()

    yield only
    backends._has_loaded_kernels.cache_clear()
    backends._warn_once.cache_clear()


def use(name, dtype=torch.float32, device="cpu", weight_dtype=None):
    x = torch.empty(1, 1, 3, 3, dtype=dtype, device=device)
    return use_kernels(name, RFA_CONV, x, x.to(weight_dtype or dtype))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='gpu': must be one of .*'auto'.*'triton'"):
        check_backend("gpu")


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_missing_backend_raises_when_asked_for_by_name(available, name):
    available()
    with pytest.raises(RuntimeError, match=f"backend='{name}': none here"):
        check_backend(name)
    with pytest.raises(RuntimeError, match=f"backend='{name}': none here"):
        use(name)


def test_a_backend_without_a_kernel_of_the_layers_operators_is_refused(available, monkeypatch):
    available("triton")
    monkeypatch.setattr(backends, "has_kernel", lambda operator, _: operator != "gated_conv")
    assert check_backend("triton", ("rfa_conv",)) == "triton"
    with pytest.raises(ValueError, match="backend='triton': has no kernel of gated_conv; choose"):
        check_backend("triton", ("pool_channels", "gated_conv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_takes_the_kernels_where_they_know_the_type(available, dtype):
    available("cpu")
    assert use("auto", dtype) == (dtype in (torch.float32, torch.bfloat16))
    assert not use("auto", dtype, "meta")
    assert not use("reference", dtype)


def test_modes_that_fake_or_count_operators_see_the_formula(available):
    available("cpu")
    with torch._subclasses.FakeTensorMode():
        assert not use("auto")
        assert not use("cpu")


def test_auto_never_raises_and_warns_once(available):
    available()
    with pytest.warns(UserWarning, match="several times slower: none here"):
        assert not use("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use("auto")


def test_auto_leaves_mixed_types_to_torch_and_its_words(available):
    available("cpu")
    assert not use("auto", torch.bfloat16, weight_dtype=torch.float32)


@pytest.mark.parametrize("dtype", AUTOCAST_TYPES)
def test_autocast_decides_on_the_type(available, dtype):
    available("cpu")
    with torch.autocast("cpu", dtype=dtype):
        assert use("auto") == (dtype == torch.bfloat16)
        assert use("auto", torch.bfloat16, weight_dtype=torch.float32) == use("auto")
        assert not use("auto", torch.float64)


def test_a_backend_asked_for_by_name_insists(available):
    available("cpu", "triton")
    assert use("cpu", torch.float64)
    with pytest.raises(TypeError, match=r"backend='cpu': .* not torch.float16"):
        use("cpu", torch.float16)
    with pytest.raises(TypeError, match=r"torch.bfloat16 .* the weight torch.float32"):
        use("cpu", torch.bfloat16, weight_dtype=torch.float32)
    with pytest.raises(ValueError, match="backend='triton': the input must be on cuda, not on cpu"):
        use("triton")
    with pytest.raises(ValueError, match="backend='cpu': the input must be on cpu, not on meta"):
        use("cpu", device="meta")


def test_where_nothing_is_built_plain_torch_runs_with_one_notice(tmp_path):
    """In a copy of the package without the libraries."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "_cpu_*.stamp")
    shutil.copytree(ROOT / "rfa_mmdet", tmp_path / "rfa_mmdet", ignore=built)
    code = """
import warnings, torch
from rfa_mmdet.layers import RFAConv
layer = RFAConv(2, 3, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        layer(torch.rand(2, 2, 5, 5)).sum().backward()
print([str(w.message) for w in caught if "plain torch" in str(w.message)])
try:
    RFAConv(2, 3, 3, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    notices, error = result.stdout.strip().split("\n")
    assert notices.count("several times slower: the C++ extension is not built") == 1
    assert "make env" in error
    assert "backend='cpu'" in error


@pytest.fixture
def asked_anew():
    backends._missing.cache_clear()
    yield
    backends._missing.cache_clear()


def test_a_triton_older_than_the_kernels_is_the_reason(asked_anew, monkeypatch):
    old = types.ModuleType("triton")
    old.__version__ = "2.1.0"
    monkeypatch.setitem(sys.modules, "triton", old)
    name = "rfa_mmdet.ops.receptive_field.triton.launch"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = "the kernels need triton 3.4 or later, and here is 2.1.0"
    assert reason in backends.missing("triton")
    with pytest.raises(RuntimeError, match=f"backend='triton': .*{reason}"):
        check_backend("triton")


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    require("cpu")
    folder = Path(backends.__file__).parent
    assert load_cpu_kernels(folder) is None
    monkeypatch.setattr(backends, "has_kernel", lambda operator, _: operator != "gated_conv")
    assert load_cpu_kernels(folder) == "the C++ extension was built from other sources than these"


def test_a_library_of_another_torch_is_named(tmp_path):
    (tmp_path / "_cpu_default.torch-1.0.so").touch()
    assert load_cpu_kernels(tmp_path) == (
        f"the C++ extension was built for torch 1.0, and here is {torch.__version__}"
    )


def test_a_library_that_does_not_load_is_named(tmp_path):
    name = f"_cpu_default.torch-{torch.__version__}.so"
    (tmp_path / name).write_bytes(b"no library")
    assert f"{name} does not load" in load_cpu_kernels(tmp_path)
