"""AddressSanitizer finds no out-of-bounds access in the C++ kernels."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

# CPU capability (lower case) -> the processor flag that it requires.
NEEDS = {"default": None, "avx2": "avx2", "avx512": "avx512bw"}


def compilers_file(name):
    """Return the path of a library that comes with the compiler."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Return a copy of the package built with AddressSanitizer."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("AddressSanitizer needs g++ on Linux")
    if not os.path.isabs(compilers_file("libasan.so")):
        pytest.skip("g++ has no libasan (apt-get install libasan8)")
    folder = tmp_path_factory.mktemp("sanitized")
    built = shutil.ignore_patterns("*.so", "*.stamp", "__pycache__")
    shutil.copytree(ROOT / "rfa_mmdet", folder / "rfa_mmdet", ignore=built)
    done = subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *("--build-lib", folder, "--build-temp", folder / "build"),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "RFA_MMDET_BUILD": "1",
            "RFA_MMDET_CXXFLAGS": "-fsanitize=address -fno-omit-frame-pointer -O0 -g1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    yield folder
    shutil.rmtree(folder)  # pytest keeps temporary folders, and this one is large


@pytest.mark.slow
@pytest.mark.parametrize("capability", NEEDS)
def test_no_access_is_out_of_bounds(sanitized, capability):
    needed = NEEDS[capability]
    if needed:
        with open("/proc/cpuinfo") as file:
            if needed not in file.read().split():
                pytest.skip(f"this processor has no {needed}")
    preloaded = [compilers_file(name) for name in ("libasan.so", "libstdc++.so")]
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", ROOT / "tests" / "helpers" / "run_odd_shapes.py"),
            f"{sanitized}/rfa_mmdet/ops/receptive_field/_cpu_{capability}.",
        ],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(preloaded),
            # Python's allocator would hide out-of-bounds accesses, and it leaks by design.
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "ATEN_CPU_CAPABILITY": capability,
            # Two threads that do not spin while waiting, because other tests share the cores.
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": str(sanitized),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    assert "nothing out of bounds" in done.stdout
