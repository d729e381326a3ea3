"""Which backend runs, and what is said where the one asked for cannot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rfa_mmdet.ops.receptive_field import dispatch
from rfa_mmdet.ops.receptive_field.dispatch import check_backend, choose_backend
from tests.helpers.backends import require

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def available(monkeypatch):
    """Let a set of backends be available."""

    def only(*names):
        monkeypatch.setattr(dispatch, "missing", lambda n: None if n in names else "none here")
        monkeypatch.setattr(dispatch, "_noticed", set())

    return only


def choose(name, dtype=torch.float32, device="cpu", weight_dtype=None):
    x = torch.empty(1, 1, 3, 3, dtype=dtype, device=device)
    return choose_backend(name, x, x.to(weight_dtype or dtype))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend='gpu': must be one of .*'auto'.*'triton'"):
        check_backend("gpu")


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_missing_backend_raises_when_asked_for_by_name(available, name):
    available("reference", "auto")
    with pytest.raises(RuntimeError, match=f"backend='{name}': none here"):
        check_backend(name)
    with pytest.raises(RuntimeError, match=f"backend='{name}': none here"):
        choose(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_auto_takes_the_kernels_of_the_device_where_they_know_the_type(available, dtype):
    available("auto", "cpu", "triton")
    low = dtype in (torch.float32, torch.bfloat16)
    assert choose("auto", dtype) == ("cpu" if low else "reference")
    expected = "reference" if dtype == torch.float64 else "triton"
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert choose("auto", dtype, "cuda") == expected
        assert choose("auto", dtype, "meta") == "reference"


def test_auto_never_raises_and_tells_once(available):
    available("auto")
    with pytest.warns(UserWarning, match="several times slower: none here") as caught:
        assert choose("auto") == choose("auto") == "reference"
    assert len(caught) == 1


def test_auto_leaves_mixed_types_to_the_reference_and_its_words(available):
    available("auto", "cpu")
    assert choose("auto", torch.bfloat16, weight_dtype=torch.float32) == "reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_on_the_type(available, dtype):
    available("auto", "cpu")
    with torch.autocast("cpu", dtype=dtype):
        assert choose("auto") == ("cpu" if dtype == torch.bfloat16 else "reference")
        assert choose("auto", torch.bfloat16, weight_dtype=torch.float32) == choose("auto")
        assert choose("auto", torch.float64) == "reference"


def test_cpu_takes_float64_when_asked(available):
    available("cpu")
    assert choose("cpu", torch.float64) == "cpu"
    with pytest.raises(TypeError, match=r"backend='cpu': .* not torch.float16"):
        choose("cpu", torch.float16)
    with pytest.raises(TypeError, match=r"torch.bfloat16 .* the weight torch.float32"):
        choose("cpu", torch.bfloat16, weight_dtype=torch.float32)
    with (
        torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match="backend='cpu': the input must be on cpu, not on cuda"),
    ):
        choose("cpu", device="cuda")


def test_triton_takes_cpu_tensors_in_its_interpreter_only(available, monkeypatch):
    available("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton': the input must be on cuda, not on cpu"):
        choose("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton") == "triton"
    assert choose("auto") == "reference"


def test_where_nothing_is_built_the_reference_runs_with_one_notice(tmp_path):
    """In a copy of the package without the libraries."""
    import shutil

    built = shutil.ignore_patterns("*.so", "__pycache__", "_cpu.stamp")
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
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    notices, error = result.stdout.strip().split("\n")
    assert notices.count("several times slower: the C++ extension is not built") == 1
    assert "make env" in error
    assert "backend='cpu'" in error


def test_a_library_of_older_sources_is_not_used(monkeypatch):
    from rfa_mmdet.ops.receptive_field import cpu

    require("cpu")
    assert cpu.load() is None
    monkeypatch.setattr(cpu, "OPERATORS", (*cpu.OPERATORS, "of_tomorrow"))
    assert cpu.load() == "the C++ extension was built from older sources than these"


def test_a_library_of_another_torch_is_named(tmp_path, monkeypatch):
    from rfa_mmdet.ops.receptive_field import cpu

    require("cpu")
    (tmp_path / "_cpu_default.so").write_bytes(b"no library")
    (tmp_path / "cpu.py").touch()
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    monkeypatch.setattr(torch.ops, "rfa_mmdet_cpu", object())
    assert "_cpu_default.so does not load" in cpu.load()
