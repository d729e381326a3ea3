"""tools/doctor.py finds each known problem in an environment of stand-ins."""

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from tests.helpers.environment import HEALTHY, NAMES, Environment
from tests.helpers.paths import ROOT

MMDET = packages_distributions().get("mmdet", [])  # the distributions of the real one


@pytest.fixture
def sick(tmp_path):
    """Return an environment without problems."""
    return Environment(tmp_path / "venv")


@pytest.fixture
def prebuilt(sick):
    for module, version in (("torch", "2.1.2"), ("numpy", "1.26.4")):
        sick.add(module, version)
    return sick


@pytest.fixture
def onedl(sick):
    for module, name, version in (
        ("mmcv", "onedl-mmcv", "2.3.6"),
        ("mmdet", "onedl-mmdetection", "3.5.1"),
        ("mmengine", "onedl-mmengine", "0.10.12"),
    ):
        sick.remove(module)
        files = {"mmdet": {"__init__": ""}, "mmengine": {"hub": "get_config = print"}}
        sick.add(module, version, files.get(module), name)
    sick.remove("pkg_resources")
    return sick


def fixes(out):
    """Return the suggested commands; each must be valid shell syntax."""
    found = [line.split("fix: ")[1] for line in out.splitlines() if "  fix: " in line]
    for command in found:
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command
    return found


def test_healthy_environment(sick):
    code, out = sick.examine()
    assert code == 0
    assert out.endswith("\nOK: training can start on the CPU\n")
    assert "error" not in out
    assert "warning" not in out
    assert "operators compiled for the CPU" in out
    assert "backend: plain torch on a GPU, cpu otherwise" in out
    assert re.search(r"stack +current +torch 2\.13\.0, mmengine 0\.10\.7, mmcv 2\.1\.0, ", out)
    assert re.search(r"compiler +gcc 12\.2\.0\n", out)
    assert re.search(r"nvcc +13\.0\.88\n", out)


def test_this_environment(run_tool):
    """Check the environment of the tests, which can train."""
    done = run_tool(sys.executable, "tools/doctor.py")
    assert done.returncode == 0, done.stdout
    assert "OK: training can start on the " in done.stdout


@pytest.mark.skipif("onedl-mmdetection" in MMDET, reason="the fork takes any mmcv")
def test_mmcv_2_2_with_the_real_mmdet(run_tool, sick, tmp_path):
    """Importing the real mmdet fails, and so does importing this package."""
    fake = tmp_path / "fake"
    sick.add("mmcv", "2.2.0", site=fake)
    path = os.pathsep.join([str(fake), str(ROOT)])
    done = run_tool(sys.executable, "tools/doctor.py", PYTHONPATH=path)
    assert done.returncode == 1
    assert re.search(r"mmdet +3\.3\.0 +FAILS: AssertionError: MMCV==2\.2\.0", done.stdout)
    assert "error: mmdet 3.3.0 does not support mmcv 2.2.0: Assert" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("name", ["mmcv", "mmcv-lite"])
def test_mmcv_without_operators(sick, name):
    sick.remove("mmcv")
    sick.add("mmcv", name=name)
    (sick.site / "mmcv" / "_ext.py").unlink()
    code, out = sick.examine()
    assert code == 1
    assert f"error: {name} 2.1.0 has no compiled operators" in out
    (fix,) = fixes(out)
    assert "MMCV_WITH_OPS=1" in fix
    assert "--no-build-isolation" in fix
    assert "mmcv==2.1.0" in fix
    assert ("uninstall -y mmcv-lite &&" in fix) == (name == "mmcv-lite")


def test_mmcv_built_for_another_torch(sick):
    sick.add("mmcv", files={"_ext": "raise ImportError('_ext.so: undefined symbol: _ZN2at')"})
    code, out = sick.examine()
    assert code == 1
    assert "not compiled for torch 2.13.0: ImportError: _ext.so: undefined symbol" in out


def test_mmcv_2_2_with_mmdet_3_3(sick):
    sick.add("mmcv", "2.2.0")
    code, out = sick.examine()
    assert code == 1
    assert "error: mmdet 3.3.0 does not support mmcv 2.2.0: AssertionError" in out
    (fix,) = fixes(out)
    assert "mmcv==2.1.0" in fix
    sick.add("mmdet", files={"__init__": ""})  # one that supports it
    code, out = sick.examine()
    assert (code, fixes(out)) == (0, [])


def test_setuptools_without_pkg_resources(sick):
    sick.remove("pkg_resources")
    sick.add_metadata("setuptools", "setuptools", "82.0.1")
    code, out = sick.examine()
    assert code == 1
    assert "error: setuptools 82.0.1 has no pkg_resources, which MMEngine imports: Module" in out
    assert fixes(out) == [f"{sick.python} -m pip install setuptools==80.10.2"]
    sick.add("mmengine", files={"hub": "get_config = print"})  # the forks do not need it
    assert sick.examine()[0] == 0


NO_NUMPY = "def from_numpy(x): raise RuntimeError('Numpy is not available')"


def test_numpy_2_with_a_torch_for_numpy_1(prebuilt):
    prebuilt.add("numpy")
    prebuilt.add("torch", "2.1.2", {"__init__": HEALTHY["torch"][1]["__init__"] + NO_NUMPY})
    code, out = prebuilt.examine()
    assert code == 1
    assert "error: torch 2.1.2 was not compiled for numpy 2.4.6: RuntimeError" in out
    assert fixes(out) == [f"{prebuilt.python} -m pip install numpy==1.26.4"]


@pytest.mark.parametrize(
    ("module", "files"),
    [
        ("pycocotools", {"mask": "raise ValueError('numpy.dtype size changed, may indicate')"}),
        ("cv2", {"__init__": "raise ImportError('numpy.core.multiarray failed to import')"}),
    ],
)
@pytest.mark.parametrize("stack", ["sick", "prebuilt"])
def test_package_built_for_another_numpy(request, stack, module, files):
    sick = request.getfixturevalue(stack)
    sick.add(module, files=files)
    code, out = sick.examine()
    assert code == 1
    name = NAMES.get(module, module)
    assert re.search(rf"error: {name} \S+ was not compiled for numpy [21]\.", out)
    # The version for the stack's numpy, which is kept.
    version = {"cv2": {"sick": "5.0.0.93", "prebuilt": "4.11.0.86"}[stack]}.get(module, "2.0.11")
    pip = f"{sick.python} -m pip install --force-reinstall --no-deps"
    assert fixes(out) == [f"{pip} {name}=={version}"]
    # The others were checked one by one, and work.
    assert out.count("FAILS") == 1


@pytest.mark.parametrize(("version", "word"), [((3, 14), "new"), ((3, 9), "old")])
def test_unsupported_python(sick, version, word):
    # This Python is not installed, so the interpreter pretends to be it.
    (sick.site / "sitecustomize.py").write_text(
        f"import sys\nsys.version_info = type('Version', (tuple,), {{}})({(*version, 0)})"
    )
    code, out = sick.examine()
    assert code == (1 if word == "old" else 0)
    if word == "new":  # which is reported as soon as something fails
        assert fixes(out) == []
        sick.add("torch", files={"__init__": "raise ImportError('no ABI of that name')"})
        out = sick.examine()[1]
    assert f"error: Python 3.{version[1]} is too {word}" in out
    assert f"python3 {ROOT}/tools/setup_env.py --venv .venv-3.12 --python python3.12" in fixes(out)


def with_gpu(sick):
    script = sick.python.parent / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    script.chmod(0o755)


def with_cuda(sick):
    code = HEALTHY["torch"][1]["__init__"].replace("cuda = None", "cuda = '13.0'")
    sick.add("torch", files={"__init__": code})


def test_cpu_build_of_torch_with_a_gpu(sick):
    with_gpu(sick)
    code, out = sick.examine()
    assert code == 0  # training can start, but is slow
    assert "warning: torch 2.13.0 is a CPU build, so NVIDIA H200 is not used" in out
    (fix,) = fixes(out)
    assert "pip uninstall -y torch && " in fix


def test_cpu_operators_with_a_torch_that_uses_the_gpu(sick):
    with_gpu(sick)
    with_cuda(sick)
    code, out = sick.examine()
    assert code == 1
    assert "mmcv's operators were compiled for the CPU only" in out
    assert "FORCE_CUDA=1" in fixes(out)[0]
    sick.add("mmcv", files={"_ext": "cuda = '13.0'"})
    code, out = sick.examine()
    assert code == 0
    assert "OK: training can start on the GPU" in out


def test_gpu_hidden_by_cuda_visible_devices(sick):
    with_gpu(sick)
    with_cuda(sick)
    code = (sick.site / "torch" / "__init__.py").read_text()
    (sick.site / "torch" / "__init__.py").write_text(code.replace("bool(version.cuda)", "False"))
    code, out = sick.examine(CUDA_VISIBLE_DEVICES="")
    assert code == 0
    assert fixes(out) == ["unset CUDA_VISIBLE_DEVICES"]
    assert "driver" in sick.examine()[1]


def test_two_mmdets_on_the_path(sick, tmp_path):
    sick.add("mmdet", "3.2.0", site=tmp_path / "checkout")
    code, out = sick.examine(PYTHONPATH=str(tmp_path / "checkout"))
    assert code == 0
    assert "warning: 2 copies of mmdet on the path" in out
    assert f"{tmp_path}/checkout/mmdet is used and hides {sick.site.resolve()}/mmdet" in out
    assert fixes(out) == ["unset PYTHONPATH"]
    (sick.site / "more.pth").write_text(str(tmp_path / "checkout"))
    assert "pip uninstall -y mmdet" in fixes(sick.examine()[1])[0]


def test_forks_next_to_the_originals(sick):
    sick.add_metadata("mmcv", "onedl-mmcv", "2.3.0")
    sick.add_metadata("mmdet", "onedl-mmdetection", "3.4.0")
    code, out = sick.examine()
    assert code == 1
    assert (
        "error: mmcv 2.1.0 and onedl-mmcv 2.3.0 are both installed: they share the folder mmcv"
        in out
    )
    assert "error: mmdet 3.3.0 and onedl-mmdetection 3.4.0 are both" in out
    mmcv, mmdet = fixes(out)
    assert "uninstall -y mmcv onedl-mmcv && " in mmcv
    assert "MMCV_WITH_OPS=1" in mmcv
    assert "uninstall -y mmdet onedl-mmdetection && " in mmdet
    assert mmdet.endswith("mmdet==3.3.0")


def test_original_mmdet_next_to_the_forks(onedl):
    onedl.add("mmdet")  # its files were written last
    code, out = onedl.examine()
    assert code == 1
    assert "error: mmdet 3.3.0 and onedl-mmdetection 3.5.1 are both installed" in out
    (fix,) = fixes(out)
    assert "uninstall -y mmdet onedl-mmdetection && " in fix
    assert fix.endswith("onedl-mmdetection==3.5.1")


def test_mmcv_lite_next_to_a_working_mmcv(sick):
    sick.add_metadata("mmcv", "mmcv-lite", "2.1.0")
    code, out = sick.examine()
    assert code == 0
    assert "warning: mmcv 2.1.0 and mmcv-lite 2.1.0 are both installed" in out
    (fix,) = fixes(out)
    assert "uninstall -y mmcv mmcv-lite && " in fix


def test_forks_without_originals_are_fine(onedl):
    code, out = onedl.examine()
    assert code == 0
    assert re.search(r"stack +onedl +torch 2\.13\.0, mmengine 0\.10\.12, mmcv 2\.3\.6, ", out)
    assert re.search(r"mmcv +2\.3\.6 .*; onedl-mmcv\n", out)
    assert re.search(r"mmdet +3\.5\.1 +onedl-mmdetection\n", out)
    assert fixes(out) == []


def test_mmcv_fork_for_another_torch_is_rebuilt(onedl):
    broken = {"_ext": "raise ImportError('_ext.so: undefined symbol')"}
    onedl.add("mmcv", "2.3.6", broken, "onedl-mmcv")
    code, out = onedl.examine()
    assert code == 1
    (fix,) = fixes(out)
    assert fix.endswith("--no-binary onedl-mmcv onedl-mmcv==2.3.6")
    assert "uninstall" not in fix


def test_mmcv_fork_with_the_original_mmdet(onedl):
    onedl.remove("mmdet")
    onedl.add("mmdet")
    code, out = onedl.examine()
    assert code == 1
    assert "error: mmdet 3.3.0 does not support mmcv 2.3.6" in out
    (fix,) = fixes(out)
    assert "uninstall -y mmdet && " in fix
    assert fix.endswith("onedl-mmdetection==3.5.1")


def test_prebuilt_stack_is_fine(prebuilt):
    code, out = prebuilt.examine()
    assert code == 0
    assert re.search(r"stack +prebuilt +torch 2\.1\.2, ", out)
    assert fixes(out) == []


def test_prebuilt_mmcv_is_downloaded_or_built(prebuilt):
    prebuilt.remove("mmcv")
    code, out = prebuilt.examine()
    assert code == 1
    (fix,) = fixes(out)
    tools, _, rest = fix.partition(" && ")
    assert "setuptools==69.5.1" in tools
    mim, _, build = rest.partition(" || ")
    assert mim.endswith("-m mim install --force-reinstall --no-deps --only-binary mmcv mmcv==2.1.0")
    assert "MMCV_WITH_OPS=1" in build


def test_versions_between_the_tested_ones_are_fine(sick):
    for module, version in (("torch", "2.4.1"), ("mmdet", "3.2.0"), ("numpy", "1.26.4")):
        sick.add(module, version)
    code, out = sick.examine()
    assert (code, fixes(out)) == (0, [])
    assert re.search(r"stack +- +not a tested combination\n", out)


def test_requirements_reported_by_pip_check(sick):
    sick.add("mmdet", requires=["scipy<1", "terminaltables", "tqdm"])
    code, out = sick.examine()
    assert code == 0
    assert (
        "warning: mmdet 3.3.0 requires terminaltables, which is not installed; "
        "mmdet 3.3.0 requires tqdm, which is not installed\n"
    ) in out
    # A different scipy version than required works anyway.
    assert fixes(out) == [f"{sick.python} -m pip install terminaltables tqdm"]
    sick.add("mmdet", files={"models": "import tqdm"}, requires=["tqdm"])
    code, out = sick.examine()
    assert code == 1
    assert "error: mmdet 3.3.0 requires tqdm, which is not installed\n" in out
    assert fixes(out) == [f"{sick.python} -m pip install tqdm"]


def test_missing_packages_of_some_tools(sick):
    sick.remove("pandas")
    code, out = sick.examine()
    assert code == 0
    assert "warning: not installed: pandas, needed by some tools\n" in out
    (fix,) = fixes(out)
    assert "pip install pandas==" in fix


def test_missing_packages(sick):
    sick.remove("mmdet")
    sick.remove("rfa_mmdet")
    code, out = sick.examine()
    assert code == 1
    assert re.search(r"mmdet +- +not installed", out)
    install, ours = fixes(out)
    assert install.endswith("mmdet==3.3.0")
    assert str(ROOT) in ours
    for module in ("torch", "mmcv", "mmengine", "numpy"):
        sick.remove(module)
    assert fixes(sick.examine()[1])[0] == f"make -C {ROOT} env STACK=current"


def test_package_that_crashes(sick):
    sick.add("mmcv", files={"ops": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"})
    code, out = sick.examine()
    assert code == 1
    assert "error: mmcv does not work: the process died (SIGSEGV)" in out


def test_missing_system_library(sick):
    text = "raise ImportError('libGL.so.1: cannot open shared object file')"
    sick.add("cv2", files={"__init__": text})
    code, out = sick.examine()
    assert code == 1
    assert fixes(out) == ["apt install libgl1 libglib2.0-0"]


def test_kernels_not_built(sick):
    missing = "missing = {'cpu': 'no compiler', 'triton': None}.get"
    sick.add("rfa_mmdet", files={"ops/receptive_field/backends": missing})
    code, out = sick.examine()
    assert code == 0
    assert "backend: triton on a GPU, plain torch otherwise" in out
    assert "on the CPU use plain torch, which is slower: no compiler" in out
    assert fixes(out)[0].endswith(f"-e {ROOT}")


def test_error_of_this_package(sick):
    sick.add("rfa_mmdet", files={"__init__": "raise SyntaxError('a slip')"})
    code, out = sick.examine()
    assert code == 1
    assert "error: rfa_mmdet does not work: SyntaxError: a slip" in out
