"""A virtual environment with small stand-ins for the packages that detection needs."""

import importlib.util
import os
import shutil
import subprocess
import venv
from importlib.metadata import distribution

from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

# Module -> (version, content of its files), as far as the doctor needs it.
HEALTHY = {
    "torch": (
        "2.13.0",
        {
            "__init__": """
class version: cuda = None
class cuda:
    is_available = staticmethod(lambda: bool(version.cuda))
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda i: "NVIDIA H200")
from_numpy = tensor = ones = lambda *args: args
version = version()
"""
        },
    ),
    "mmengine": (
        "0.10.7",
        {
            "runner": "",
            "hub": "def get_config(name): import pkg_resources",
            "utils/dl_utils": "def collect_env(): return {'GCC': 'gcc 12.2.0', 'NVCC': '13.0.88'}",
        },
    ),
    "mmcv": (
        "2.1.0",
        {
            "ops": "import mmcv._ext\nnms = lambda *args: args\n"
            "get_compiling_cuda_version = lambda: mmcv._ext.cuda",
            "_ext": "cuda = 'not available'",
        },
    ),
    "mmdet": (
        "3.3.0",
        {
            "__init__": "import mmcv\n"
            "assert mmcv.__version__ < '2.2', f'MMCV=={mmcv.__version__} is incompatible'",
            "models": "",
            "registry": "class MODELS: get = print",
        },
    ),
    "rfa_mmdet": (
        "0.1.0",
        {"ops/receptive_field/backends": "missing = {'triton': 'not installed'}.get"},
    ),
    "numpy": ("2.4.6", {"__init__": "zeros = print"}),
    "cv2": ("5.0.0", {}),
    "pycocotools": ("2.0.11", {"mask": ""}),
    **dict.fromkeys(("matplotlib", "scipy", "shapely", "rich"), ("1.0", {})),
    **dict.fromkeys(("pandas", "jinja2"), ("1.0", {})),
    "pkg_resources": ("80.10.2", {}),
}
NAMES = {"cv2": "opencv-python", "pkg_resources": "setuptools"}


class Environment:
    """A virtual environment with stand-ins and pip.

    Args:
        root: Folder to create.
        *modules: Names in HEALTHY; default: all.
    """

    def __init__(self, root, *modules):
        venv.create(root, with_pip=False, symlinks=True)
        self.python = root / "bin" / "python"
        (self.site,) = root.glob("lib/python3*/site-packages")
        # After importing pip, setuptools, and so Inductor, could not be imported in this process.
        (self.site / "pip").symlink_to(distribution("pip").locate_file("pip"))
        for module in modules or HEALTHY:
            self.add(module)

    def add(self, module, version=None, files=None, name=None, site=None, requires=()):
        site = site or self.site
        healthy_version, healthy_files = HEALTHY[module]
        version = version or healthy_version
        for file, code in {"__init__": "", **healthy_files, **(files or {})}.items():
            path = site / module / f"{file}.py"
            path.parent.mkdir(exist_ok=True, parents=True)
            head = f"__version__ = {version!r}\n" if file == "__init__" else ""
            path.write_text(head + code)
        self.add_metadata(module, name or NAMES.get(module, module), version, requires, site)

    def add_metadata(self, module, name, version, requires=(), site=None):
        site = site or self.site
        for old in site.glob(f"{name.replace('-', '_')}-[0-9]*.dist-info"):
            shutil.rmtree(old)
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
        (folder / "top_level.txt").write_text(module + "\n")

    def remove(self, module):
        shutil.rmtree(self.site / module)
        for file in self.site.glob("*.dist-info/top_level.txt"):
            if file.read_text().strip() == module:
                shutil.rmtree(file.parent)

    def run(self, *command, cwd=None, **variables):
        """Run this Python in a separate process."""
        variables = {"PATH": f"{self.python.parent}:/usr/bin:/bin", **variables}
        command = [self.python, "-B", *command]
        return subprocess.run(
            command, cwd=cwd, env=variables, text=True, capture_output=True, timeout=PATIENCE
        )

    def examine(self, **variables):
        """Run the doctor in it; return its exit status and output."""
        done = self.run(ROOT / "tools" / "doctor.py", **variables)
        assert done.stderr == ""
        print(done.stdout)  # shown if a test fails
        return done.returncode, done.stdout

    def freeze(self):
        """Return the installed packages as listed by pip."""
        done = self.run("-m", "pip", "list", "--format=freeze", PIP_CONFIG_FILE=os.devnull)
        assert done.returncode == 0, done.stderr
        return set(done.stdout.split())


def load_script(path):
    """Return a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_python(folder, changes="", modules=()):
    """Create a Python that runs ``changes`` at its start, and lacks some modules."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    hidden = (
        f"hidden = {list(modules)}\n"
        + """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
"""
    )
    (site / "sitecustomize.py").write_text(hidden + changes)
    return folder / "bin" / "python"


def version(*numbers):
    """Return code that makes a Python pretend to be another version."""
    return f"""
import sys, sysconfig
headers = sysconfig.get_path("include")
sysconfig.get_path = lambda name: headers
sys.version_info = {numbers}
"""
