"""Importing the package, running its tools by name, and what a wheel installs."""

import importlib
import re
import shutil
import subprocess
import sys
import types

import pytest

from rfa_mmdet.__main__ import main
from rfa_mmdet.cli import find_tools, run_tool
from rfa_mmdet.version import __version__
from tests.helpers.environment import Environment
from tests.helpers.paths import ROOT

OPENMMLAB = ("torch", "mmengine", "mmcv", "mmdet", "numpy", "pkg_resources")
DOCTOR = "`python -m rfa_mmdet doctor` prints the command that fixes this environment"


@pytest.fixture
def stand_ins(tmp_path):
    """Return stand-ins for OpenMMLab's packages, with the real rfa_mmdet on the path."""
    return Environment(tmp_path / "venv", *OPENMMLAB)


def import_error(stand_ins):
    """Return the last line printed when importing the package in it."""
    done = stand_ins.run("-c", "import rfa_mmdet", PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_import_without_mmdet(stand_ins):
    stand_ins.remove("mmdet")
    assert import_error(stand_ins) == (
        "ImportError: rfa_mmdet cannot register its layers, because mmdet is not installed: run "
        f'`pip install "rfa_mmdet[openmmlab]"`; {DOCTOR}'
    )


@pytest.mark.parametrize("module", ["mmcv", "mmdet"])
def test_import_with_forks_names_the_missing_fork(stand_ins, module):
    stand_ins.remove("mmengine")
    stand_ins.add("mmengine", name="onedl-mmengine")
    stand_ins.remove(module)
    fork = {"mmcv": "onedl-mmcv", "mmdet": "onedl-mmdetection"}[module]
    assert f"because {module} is not installed: run `pip install {fork}`" in import_error(stand_ins)


def test_import_with_mmcv_without_operators(stand_ins):
    (stand_ins.site / "mmcv" / "_ext.py").unlink()
    assert import_error(stand_ins) == (
        "ImportError: rfa_mmdet cannot register its layers, because mmcv has no compiled operators "
        f"(mmcv-lite, or built without MMCV_WITH_OPS=1): {DOCTOR}"
    )


def test_import_with_mmdet_that_rejects_mmcv(stand_ins):
    stand_ins.add("mmcv", "2.2.0")
    assert import_error(stand_ins) == (
        "ImportError: rfa_mmdet cannot register its layers, because mmdet.models cannot be "
        f"imported (AssertionError: MMCV==2.2.0 is incompatible): {DOCTOR}"
    )


def test_tools_are_listed_in_any_folder_without_openmmlab(stand_ins, tmp_path):
    stand_ins.remove("mmdet")
    done = stand_ins.run("-m", "rfa_mmdet", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    listed = re.findall(r"(?m)^  (\w+) +(\S.*)$", done.stdout)
    assert listed == list(find_tools().items())
    assert ("train", "Train a detector.") in listed
    assert not {"command_line", "distributed"} & dict(listed).keys()


@pytest.mark.parametrize("module", [["-m", "rfa_mmdet"], ["-mrfa_mmdet"]])
def test_doctor_starts_if_the_package_cannot_be_imported(stand_ins, tmp_path, module):
    stand_ins.remove("mmdet")
    done = stand_ins.run(*module, "doctor", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"(?m)^mmdet +- +not installed$", done.stdout)


def test_running_a_module_of_the_package_registers_everything(stand_ins):
    """Only `-m rfa_mmdet` itself leaves registration to its __main__."""
    stand_ins.remove("mmdet")
    done = stand_ins.run("-m", "rfa_mmdet.files", "rfa_mmdet", PYTHONPATH=str(ROOT))
    assert "ImportError: rfa_mmdet cannot register its layers" in done.stderr


def test_other_tools_say_why_they_cannot_start(stand_ins):
    stand_ins.remove("mmdet")
    done = stand_ins.run("-m", "rfa_mmdet", "train", PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert done.stderr.startswith("error: rfa_mmdet cannot register its layers, because mmdet is")
    assert done.stderr.count("\n") == 1


def test_version(stand_ins):
    done = stand_ins.run("-m", "rfa_mmdet", "--version", PYTHONPATH=str(ROOT))
    assert done.stdout == f"rfa_mmdet {__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("trian", "did you mean train"), ("xyzzy", "choose from ablate, check_data, ")],
)
def test_unknown_tool(stand_ins, name, hint):
    done = stand_ins.run("-m", "rfa_mmdet", name, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: unknown tool {name!r}; {hint}")


def test_tool_gets_its_arguments(run_tool):
    done = run_tool(sys.executable, "-m", "rfa_mmdet", "train", "no_such_config.py")
    assert done.returncode == 1
    assert "error: config='no_such_config.py': no such file" in done.stdout


def test_help_of_a_tool(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/rfa_mmdet/__main__.py", "train", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m rfa_mmdet train [-h]")


@pytest.mark.parametrize(("package", "extra"), [("pandas", "tools"), ("onnxruntime", "onnx")])
def test_tool_names_the_missing_extra(package, extra, monkeypatch, capsys):
    tool = types.ModuleType("rfa_mmdet.cli.tables")
    tool.main = lambda: importlib.import_module(package)
    monkeypatch.setitem(sys.modules, tool.__name__, tool)
    monkeypatch.setitem(sys.modules, package, None)  # makes Python fail to import it
    assert run_tool("tables") == 1
    assert capsys.readouterr().err == (
        f'error: tables needs {package}, which is not installed: pip install "rfa_mmdet[{extra}]"\n'
    )


def test_every_tool_has_a_short_script():
    scripts = {path.stem: path for path in ROOT.glob("tools/**/*.py")}
    del scripts["setup_env"]
    assert scripts.keys() == find_tools().keys()
    assert all(len(path.read_text().splitlines()) <= 15 for path in scripts.values())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Return a wheel of the checkout's files, without kernels."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("*.so", "_cpu_*.stamp", "__pycache__", ".mim")
    for name in ("rfa_mmdet", "configs", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for pattern in ("*.py", "*.toml", "*.txt", "*.in", "*.md", "*.yml", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, source)
    shutil.copytree(ROOT / "requirements", source / "requirements")
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", out]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", *options],
        cwd=source,
        env={"PATH": "/usr/bin:/bin", "RFA_MMDET_BUILD": "0"},
        check=True,
    )
    (found,) = out.glob("rfa_mmdet-*.whl")
    return found


def install(environment, wheel):
    done = environment.run("-m", "pip", "install", "--no-index", wheel)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        [],
        ["numpy==1.26.4"],
        ["torch==2.1.2", "numpy==1.26.4", "mmcv==2.1.0", "mmengine==0.10.3", "mmdet==3.2.0"],
        [
            "numpy==2.2.6",
            "onedl-mmcv==2.3.6",
            "onedl-mmengine==0.10.12",
            "onedl-mmdetection==3.5.1",
        ],
    ],
)
def test_installing_the_wheel_changes_nothing_else(tmp_path, wheel, names):
    environment = Environment(tmp_path / "venv", "pkg_resources")
    for name in names:
        environment.add_metadata("some", *name.split("=="))
    before = environment.freeze()
    assert set(names) < before
    install(environment, wheel)
    assert environment.freeze() == {*before, f"rfa_mmdet=={__version__}"}


@pytest.mark.slow
def test_wheel_contains_configs_and_tools(tmp_path, wheel):
    environment = Environment(tmp_path / "venv", "pandas")
    install(environment, wheel)
    mim = environment.site / "rfa_mmdet" / ".mim"
    for folder in ("configs", "tools"):
        shipped = {p.relative_to(mim) for p in (mim / folder).rglob("*.*") if p.is_file()}
        source = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.*") if p.is_file()}
        left_out = {p.name for p in source - shipped if "__pycache__" not in p.parts}
        assert left_out == (
            {"setup_env.py", "doctor.py", "demo.py"} if folder == "tools" else set()
        )
    assert (mim.parent / "py.typed").is_file()
    # The doctor finds its pins in it; the tools and configs run with the real packages.
    done = environment.run("-m", "rfa_mmdet", "doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(
        r"fix: \S+ -m pip install torch==\S+ mmengine==\S+ mmdet==\S+ && ", done.stdout
    )
    code = f"""
import sys
sys.path.append({next(p for p in sys.path if p.endswith("site-packages"))!r})
import rfa_mmdet
from mmengine.config import Config
from mmdet.registry import MODELS
folder = rfa_mmdet.__path__[0] + "/.mim/"
cfg = Config.fromfile(folder + "configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py")
model = MODELS.build(cfg.model)
print(folder, type(model.backbone).__name__)
"""
    done = environment.run("-c", code, cwd=tmp_path)
    assert done.stdout == f"{mim}/ RFAResNet\n", done.stderr


def test_every_metafile_is_in_the_index():
    """mim and MMEngine find configs through the index."""
    listed = re.findall(r"(?m)^  - (\S+)$", (ROOT / "model-index.yml").read_text())
    assert listed == sorted(
        p.relative_to(ROOT).as_posix() for p in ROOT.glob("configs/*/metafile.yml")
    )
