"""Check this Python environment, and print the command that fixes each problem.

Shows versions, compiled operators, the backend in use, the GPU, and every problem found. The exit
status is 0 if training can start, else 1. The doctor imports only the standard library and tries
every package in a separate process, so even a package that crashes is only reported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # the checkout, if there is one
PYTHONS = ((3, 10), (3, 12))
# Distribution -> versions that work together: first (inclusive), last (exclusive).
WANTED = {
    "torch": ((2, 1), (3,)),
    "mmengine": ((0, 10), (0, 11)),
    "mmcv": ((2, 0, 1), (2, 2)),
    "mmdet": ((3, 2), (3, 4)),
}
OPENMMLAB = ("mmcv", "mmdet", "mmengine")
FORKS = {"mmcv": "onedl-mmcv", "mmdet": "onedl-mmdetection", "mmengine": "onedl-mmengine"}
# Needed for training, then by some tools only.
LIBRARIES = ("numpy", "cv2", "pycocotools", "matplotlib", "scipy", "shapely", "rich")
FOR_TOOLS = ("pandas", "jinja2")
DISTRIBUTIONS = {"cv2": "opencv-python"}  # modules with another name on PyPI
# torch's cache of downloaded weights.
HOME = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch")
CACHE = Path(os.environ.get("TORCH_HOME", HOME), "hub", "checkpoints").expanduser()
SECONDS = 300  # time limit of one import: a cold disk may take a minute

# Code to try with each package after importing it; `facts` is returned.
PROBES = {
    "torch": """
facts.update(cuda=torch.version.cuda, gpus=[])
if torch.cuda.is_available():
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
import numpy
torch.from_numpy(numpy.zeros(1))
""",
    # Every run logs the result of collect_env.
    "mmengine": """
import mmengine.runner
from mmengine.utils.dl_utils import collect_env
facts.update(env={name: str(value) for name, value in collect_env().items()})
""",
    "mmcv": """
import torch, mmcv.ops
facts.update(cuda=mmcv.ops.get_compiling_cuda_version())
mmcv.ops.nms(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.ones(1), 0.5)
""",
    # MMEngine finds base configs through pkg_resources.
    "mmdet": """
import mmdet.models
from mmengine.hub import get_config
get_config("mmdet::_base_/default_runtime.py")
""",
    "rfa_mmdet": """
facts.update(folder=rfa_mmdet.__path__[0])
from mmdet.registry import MODELS
MODELS.get("RFAResNet")
from rfa_mmdet.ops.receptive_field.backends import missing
cpu, triton = missing("cpu"), missing("triton")
gpu, cpu_name = "plain torch" if triton else "triton", "plain torch" if cpu else "cpu"
names = f"{gpu} on a GPU, {cpu_name} otherwise"
facts.update(backend=names, slow=cpu)
""",
    **dict.fromkeys((*LIBRARIES, *FOR_TOOLS), ""),
    "pycocotools": "import pycocotools.mask",
}
# The current folder is not on the path, as for `python tools/train.py`.
FRAME = """
import json, sys, warnings
sys.path[:] = [entry for entry in sys.path if entry]
warnings.simplefilter("ignore")
facts = {{}}
try:
    import {name}
    facts["version"] = getattr({name}, "__version__", None)
    exec({code!r})
except BaseException as error:
    facts["error"] = f"{{type(error).__name__}}: {{error}}"
print("\\n" + json.dumps(facts))
"""
NUMPY_CLASH = re.compile(
    r"compiled using NumPy 1|multiarray failed|_ARRAY_API|dtype size changed|Numpy is not available"
    r"|module 'numpy\S*' has no attribute|cannot import name '\w+' from 'numpy"
)
PIP_CHECK = re.compile(r"(?m)^((\S+) \S+ requires (\S+), which is not installed)\.$")


class Problem(NamedTuple):
    """A problem, the command that fixes it, and whether it keeps training from starting."""

    text: str
    fix: str
    fatal: bool = True


def output(*command: str) -> str:
    """Return the output of a command, or an empty string if it does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def probe(name: str) -> dict[str, Any]:
    """Try a package in a separate process; return its facts, with an 'error' if it failed."""
    command = [sys.executable, "-c", FRAME.format(name=name, code=PROBES[name])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"timed out after {SECONDS} s"}
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # killed, or exited by itself
        status = done.returncode
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return {"error": f"the process died ({how})"}
    if "error" in facts:
        # torch only warns about it and continues without NumPy.
        facts["clash"] = bool(NUMPY_CLASH.search(facts["error"] + done.stderr))
        facts["error"] = " ".join(facts["error"].split())[:150]
    return facts


def examine() -> dict[str, dict[str, Any]]:
    """Run all probes; return their facts by name."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        try:
            asked = {name: pool.submit(probe, name) for name in PROBES}
            return {name: future.result() for name, future in asked.items()}
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # those not yet started
            raise


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, e.g. (2, 13, 0) for '2.13.0+cpu'."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def read_pins(folder: Path, name: str) -> str:
    """Return the pins of a stack, including those of the files it refers to with -r."""
    text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    return re.sub(r"(?m)^-r (\w+)\.txt$", lambda line: read_pins(folder, line[1]), text)


def canonical(name: str | None) -> str:
    """Return the normalised form of a distribution's name, as pip compares it."""
    return re.sub(r"[-_.]+", "-", name or "").lower()


class Doctor:
    """Examines the environment of this Python."""

    def __init__(self) -> None:
        self.facts = examine()
        found = [(canonical(d.metadata["Name"]), d.version) for d in metadata.distributions()]
        self.installed = dict(reversed(found))  # if a name occurs twice, the first on the path wins
        owners = metadata.packages_distributions()
        self.owners = {m: sorted({*map(canonical, owners.get(m, ()))}) for m in OPENMMLAB}
        self.gpus = re.findall(r"(?m)^GPU \d+: (.*?)(?: \(UUID.*)?$", output("nvidia-smi", "-L"))
        self.python = shlex.quote(sys.executable)
        self.pip = f"{self.python} -m pip"
        setup = ROOT / "tools" / "setup_env.py"
        self.setup = f"python3 {shlex.quote(str(setup))}" if setup.exists() else ""
        here = os.path.relpath(os.path.abspath(sys.executable), ROOT)
        venv = re.match(r"\.venv(?:-(prebuilt|onedl))?/", here)
        self.stack = venv[1] or "current" if venv else self.find_stack()
        # The command that repairs an environment made by setup_env.py.
        self.repair = f"{self.setup} --stack {self.stack} --force" if self.setup and venv else ""
        folders = (PACKAGE / ".mim" / "requirements", ROOT / "requirements")
        text = read_pins(next(filter(Path.exists, folders)), self.stack)
        pins = re.findall(r'(?m)^([\w-]+)==([^\s;]+)(?:; python_version (..?) "3.11")?$', text)
        other = "<" if sys.version_info >= (3, 11) else ">="
        self.pins = {name: version for name, version, marker in pins if marker != other}
        self.names = DISTRIBUTIONS | (FORKS if self.stack == "onedl" else {})

    def is_fork(self, module: str) -> bool:
        """Return whether the module is installed from its onedl-* fork."""
        return FORKS[module] in self.owners[module]

    def find_stack(self) -> str:
        """Return the project's stack that is closest to the installed packages."""
        sure = [name for name in OPENMMLAB if len(self.owners[name]) == 1]
        if sure and self.is_fork(sure[0]):
            return "onedl"
        torch = numbers(self.version("torch")) or (3,)
        # torch 2.3 is the first release for numpy 2, and 2.2 the first for Python 3.12.
        return "prebuilt" if torch < (2, 3) and sys.version_info < (3, 12) else "current"

    def tested_stack(self) -> str:
        """Return the name of the tested stack that is installed, or ''."""
        for name in WANTED:
            pin = self.pins[self.names.get(name, name)]
            if numbers(self.version(name))[:2] != numbers(pin)[:2]:
                return ""
        return self.stack

    def error(self, name: str) -> str:
        """Return the error of a probe, or ''."""
        return self.facts[name].get("error", "")

    def version(self, module: str) -> str:
        """Return a module's version: the imported one, or else the installed one."""
        found = self.facts[module].get("version")
        return found or self.installed.get(DISTRIBUTIONS.get(module, module), "")

    # --- commands

    def install(self, *modules: str, options: str = "") -> str:
        """Return the command that installs the tested versions."""
        names = [self.names.get(module, module) for module in modules]
        pins = [f"{name}=={self.pins[name]}" if name in self.pins else name for name in names]
        return " ".join([f"{self.pip} install", *filter(None, [options]), *pins])

    def uninstall_others(self, module: str) -> str:
        """Return a command prefix that uninstalls other distributions of the module."""
        owners = self.owners.get(module, [])
        others = {*owners} - {self.names.get(module, module)}
        return f"{self.pip} uninstall -y {' '.join(owners)} && " if others else ""

    def reinstall(self, module: str) -> str:
        """Return the command that replaces a module with its tested version."""
        install = self.install(module, options="--force-reinstall --no-deps")
        return self.uninstall_others(module) + install

    def build_mmcv(self, cuda: bool = False) -> str:
        """Return the command that installs mmcv with compiled operators."""
        name, first = self.names.get("mmcv", "mmcv"), self.uninstall_others("mmcv")
        force = "FORCE_CUDA=1 " if cuda else ""
        if self.repair:
            return f"{first}{force}{self.repair}"
        tools = self.install("setuptools", "wheel", "ninja", "psutil")
        options = "--force-reinstall --no-deps"
        # Without --no-cache-dir, pip would reuse the mmcv that it built before.
        build = f"--no-build-isolation --no-cache-dir {options} --no-binary {name}"
        build = f"{force}MMCV_WITH_OPS=1 {self.install('mmcv', options=build)}"
        if self.stack == "prebuilt":  # OpenMMLab's own wheel, if its index is reachable
            mim = f"{self.python} -m mim install {options} --only-binary mmcv"
            tools = self.install("openmim", "setuptools", "wheel", "ninja", "psutil")
            return f"{first}{tools} && {{ {mim} mmcv=={self.pins['mmcv']} || {build}; }}"
        return f"{first}{tools} && {build}"

    def build_kernels(self) -> str:
        """Return the command that compiles this package's operators."""
        if self.setup:
            return self.repair or f"{self.pip} install --no-deps -e {shlex.quote(str(ROOT))}"
        return f"{self.pip} install --no-deps --force-reinstall .   # in a clone of rfa_mmdet"

    def new_environment(self) -> str:
        """Return the command that creates an environment with matching packages."""
        if not self.setup:
            return f"{self.install('torch', 'mmengine', 'mmdet')} && {self.build_mmcv()}"
        return self.repair or f"make -C {shlex.quote(str(ROOT))} env STACK={self.stack}"

    # --- checks

    def problems(self) -> list[Problem]:
        """Return all problems, the fatal ones first."""
        checks = (
            *(self.check_python, self.check_owners, self.check_copies, self.check_missing),
            *(self.check_versions, self.check_failures, self.check_speed, self.check_requirements),
        )
        found = [problem for check in checks for problem in check()]
        if not any(problem.fatal for problem in found):
            found += self.check_rest()
        return sorted(found, key=lambda problem: not problem.fatal)

    def check_python(self) -> Iterator[Problem]:
        """Check Python itself, and setuptools for pkg_resources."""
        here = sys.version_info[:2]
        broken = any(self.error(name) for name in PROBES if name not in FOR_TOOLS)
        if here < PYTHONS[0] or (here > PYTHONS[1] and broken):
            word = "old" if here < PYTHONS[0] else "new"
            text = f"Python {here[0]}.{here[1]} is too {word}: 3.10 to 3.12 are supported"
            make = f"{self.setup} --venv .venv-3.12 --python python3.12"
            yield Problem(text, make if self.setup else "python3.12 -m venv .venv-3.12")
        for error in filter(re.compile("pkg_resources").search, map(self.error, OPENMMLAB)):
            version = self.installed.get("setuptools", "(not installed)")
            text = f"setuptools {version} has no pkg_resources, which MMEngine imports: {error}"
            yield Problem(text, self.install("setuptools"))
            return

    def check_owners(self) -> Iterator[Problem]:
        """Find modules with two distributions, such as an onedl-* fork and the original."""
        for module, names in self.owners.items():
            if len(names) > 1:
                listed = " and ".join(f"{name} {self.installed[name]}" for name in names)
                yield Problem(
                    f"{listed} are both installed: they share the folder {module}, whose files "
                    "are now a mixture of both",
                    self.build_mmcv() if module == "mmcv" else self.reinstall(module),
                    "mmcv-lite" not in names or bool(self.error("mmcv")),
                )

    def check_copies(self) -> Iterator[Problem]:
        """Find more than one mmdet, mmcv or mmengine on the path."""
        variable = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        for name in OPENMMLAB:
            specs = (find_spec(name), *(PathFinder.find_spec(name, [e]) for e in sys.path[1:]))
            found = (os.path.realpath(os.path.dirname(s.origin)) for s in specs if s and s.origin)
            used, *hidden = dict.fromkeys(found) or [""]
            if hidden:
                text = f"{1 + len(hidden)} copies of {name} on the path; {used} is used and hides "
                fix = f"{self.pip} uninstall -y {self.names.get(name, name)}   # until all are gone"
                if os.path.dirname(used) in map(os.path.realpath, filter(None, variable)):
                    fix = "unset PYTHONPATH"
                yield Problem(text + ", ".join(hidden), fix, False)

    def check_missing(self) -> Iterator[Problem]:
        """Find packages that are not installed."""
        needed = [name for name in ("torch", *OPENMMLAB, *LIBRARIES) if not find_spec(name)]
        if "torch" in needed or len(needed) > 3:
            yield Problem(f"not installed: {', '.join(needed)}", self.new_environment())
            return
        if names := [name for name in needed if name != "mmcv"]:
            yield Problem(f"not installed: {', '.join(names)}", self.install(*names))
        if "mmcv" in needed:
            yield Problem("not installed: mmcv", self.build_mmcv())
        if names := [name for name in FOR_TOOLS if not find_spec(name)]:
            text = f"not installed: {', '.join(names)}, needed by some tools"
            yield Problem(text, self.install(*names), False)
        if not find_spec("rfa_mmdet"):
            yield Problem("not installed: rfa_mmdet, this checkout", self.build_kernels())

    def check_versions(self) -> Iterator[Problem]:
        """Find versions that do not work together; the forks have their own version numbers."""
        mixed = any(len(names) > 1 for names in self.owners.values())  # already reported
        if not mixed and re.search("MMCV==.*incompatible", self.error("mmdet")):
            same = self.is_fork("mmcv") == self.is_fork("mmdet")
            text = f"mmdet {self.version('mmdet')} does not support mmcv {self.version('mmcv')}"
            text += f": {self.error('mmdet')}"
            yield Problem(text, self.build_mmcv() if same else self.reinstall("mmdet"))
            return
        for name, (low, high) in WANTED.items():
            version = self.version(name)
            broken = self.error(name) or self.error("mmdet") or self.error("rfa_mmdet")
            fork = name in FORKS and self.is_fork(name)
            if not (version and broken) or fork or low <= numbers(version) < high:
                continue
            text = f"{name} {version} is not supported: needs >={'.'.join(map(str, low))}"
            text += f",<{'.'.join(map(str, high))}"
            fix = self.build_mmcv() if name == "mmcv" else self.reinstall(name)
            if name == "torch":
                fix = f"{self.install('torch')} && {self.build_mmcv()}"
            yield Problem(text, fix)

    def check_failures(self) -> Iterator[Problem]:
        """Find failures whose cause is known."""
        numpy = self.version("numpy")
        for name in ("torch", *LIBRARIES, *FOR_TOOLS):
            if not self.facts[name].get("clash"):
                continue
            package = f"{self.names.get(name, name)} {self.version(name)}"
            text = f"{package} was not compiled for numpy {numpy}: {self.error(name)}"
            right = numbers(numpy)[:1] == numbers(self.pins["numpy"])[:1]
            fix = self.reinstall(name) if right else self.install("numpy")
            yield Problem(text, fix, name not in FOR_TOOLS)
        if self.error("torch") or not self.facts["mmcv"].get("version"):
            return  # mmcv's operators cannot work without them
        broken = self.error("mmcv")
        if "'mmcv._ext'" in broken:
            have = f"{next(iter(self.owners['mmcv']), 'mmcv')} {self.version('mmcv')}"
            text = f"{have} has no compiled operators, which every detector needs"
            yield Problem(text, self.build_mmcv())
        elif re.search(r"undefined symbol|\.so", broken):
            text = f"mmcv's operators were not compiled for torch {self.version('torch')}"
            yield Problem(f"{text}: {broken}", self.build_mmcv())

    def check_speed(self) -> Iterator[Problem]:
        """Find what makes training slow: missing kernels, an unused GPU."""
        torch, slow = self.facts["torch"], self.facts["rfa_mmdet"].get("slow")
        if slow:
            text = "no C++ kernels: receptive-field convolutions on the CPU use plain torch, which "
            yield Problem(f"{text}is slower: {slow}", self.build_kernels(), False)
        if "version" not in torch:
            return
        have = f"torch {torch['version']}"
        if torch["gpus"]:
            if self.facts["mmcv"].get("cuda") == "not available":
                text = "mmcv's operators were compiled for the CPU only, but torch uses "
                yield Problem(text + torch["gpus"][0], self.build_mmcv(cuda=True))
        elif not self.gpus:
            return
        elif torch["cuda"] is None:
            text = f"{have} is a CPU build, so {self.gpus[0]} is not used"
            first = f"{self.pip} uninstall -y torch && {self.install('torch')}"
            yield Problem(text, f"{first} && {self.build_mmcv()}", False)
        elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            text = f"CUDA_VISIBLE_DEVICES hides {self.gpus[0]}"
            yield Problem(text, "unset CUDA_VISIBLE_DEVICES", False)
        else:
            text = f"{have} (CUDA {torch['cuda']}) cannot use {self.gpus[0]}; most likely the "
            text += "driver is too old for that CUDA version"
            fix = "nvidia-smi   # shows the latest CUDA version of the driver; update the driver"
            yield Problem(text, fix, False)

    def check_requirements(self) -> Iterator[Problem]:
        """Find requirements of the relevant packages that pip reports as missing."""
        ours = {"rfa-mmdet", "torch", *(n for names in self.owners.values() for n in names)}
        known = {DISTRIBUTIONS.get(name, name) for name in (*LIBRARIES, *FOR_TOOLS)}
        report = PIP_CHECK.findall(output(sys.executable, "-m", "pip", "check"))
        found = {text: need for text, name, need in report if canonical(name) in ours | known}
        found = {text: need for text, need in found.items() if canonical(need) not in known}
        if found:
            broken = any("No module named" in self.error(name) for name in OPENMMLAB)
            fix = self.install(*sorted(set(found.values())))
            yield Problem("; ".join(found), fix, broken)

    def check_rest(self) -> Iterator[Problem]:
        """Report the first package that fails for an unknown reason."""
        for name in PROBES:
            error = self.error(name)
            if not error or not find_spec(name):
                continue
            fix = self.new_environment()
            if re.search(r"libGL|libgthread|libglib", error):
                fix = "apt install libgl1 libglib2.0-0"
            if name == "rfa_mmdet":
                fix = f"{self.python} -c 'import rfa_mmdet'   # shows the traceback"
            yield Problem(f"{name} does not work: {error}", fix, name not in FOR_TOOLS)
            return

    # --- the screen

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield the rows of the table: (name, version, remark)."""
        tested = self.tested_stack()
        remark = ", ".join(f"{name} {self.pins[self.names.get(name, name)]}" for name in WANTED)
        yield "stack", tested or "-", remark if tested else "not a tested combination"
        yield "python", ".".join(map(str, sys.version_info[:3])), self.python
        torch, ours = self.facts["torch"], self.facts["rfa_mmdet"]
        cuda = self.facts["mmcv"].get("cuda")
        compiled = {None: "no operators", "not available": "operators compiled for the CPU"}
        remarks = {
            "torch": f"CUDA {torch['cuda']}" if torch.get("cuda") else "CPU build",
            "mmcv": compiled.get(cuda, f"operators compiled for CUDA {cuda}"),
            "rfa_mmdet": f"backend: {ours.get('backend')}; {ours.get('folder')}",
        }
        for name in PROBES:
            forks = [owner for owner in self.owners.get(name, ()) if owner.startswith("onedl")]
            remark = "; ".join(filter(None, [remarks.get(name), *forks]))
            error = self.error(name)
            if not find_spec(name):
                remark = "not installed"
            elif error:
                remark = f"FAILS: {error[:110]}"
            yield name, self.version(name) or "-", remark
        env = self.facts["mmengine"].get("env", {})
        yield "compiler", os.environ.get("CXX") or env.get("GCC", "unknown"), ""
        if "NVCC" in env:
            yield "nvcc", env["NVCC"], ""
        yield "GPU", ", ".join(torch.get("gpus") or self.gpus) or "none", ""
        found = ", ".join(sorted(file.name[:-13] for file in CACHE.glob(f"resnet*-{8 * '?'}.pth")))
        more = "" if found else " (downloaded on first use of torchvision:// weights)"
        yield "weights", found or "none", f"{CACHE}{more}"


def report(doctor: Doctor) -> int:
    """Print the table and the problems; return the exit status."""
    rows = list(doctor.rows())
    widths = [max(len(row[i]) for row in rows if len(row[i]) < 30) for i in (0, 1)]
    for name, version, remark in rows:
        print(f"{name:<{widths[0]}}  {version:<{widths[1]}}  {remark}".rstrip())
    problems = doctor.problems()
    for problem in problems:
        print(f"\n{'error' if problem.fatal else 'warning'}: {problem.text}")
        print(f"  fix: {problem.fix}")
    if any(problem.fatal for problem in problems):
        print("\ntraining cannot start here")
        return 1
    print(f"\nOK: training can start on the {'GPU' if doctor.facts['torch']['gpus'] else 'CPU'}")
    return 0


def main() -> int:
    """Run the command line; return the exit status."""
    argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python tools/doctor.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    try:
        return report(Doctor())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
