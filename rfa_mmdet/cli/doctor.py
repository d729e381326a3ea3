"""Say what is wrong with a Python's packages for detection, and the command that fixes it.

One screen: versions, what is compiled, which backend would be used, the GPU, and each problem.
The exit code is 0 if training can start, 1 if not. Only the standard library is imported here, and
every package in a process of its own, so that one that is broken, or even crashes, is a finding.
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
ROOT = PACKAGE.parent  # of a checkout
PYTHONS = ((3, 10), (3, 12))
# Distribution -> versions that work together: from (inclusive), to (exclusive).
WANTED = {
    "torch": ((2, 4), (3,)),
    "mmengine": ((0, 10), (0, 11)),
    "mmcv": ((2, 0), (2, 2)),
    "mmdet": ((3, 3), (3, 4)),
}
OPENMMLAB = ("mmengine", "mmcv", "mmdet")
# What training imports, then what only some tools do.
LIBRARIES = ("numpy", "cv2", "pycocotools", "matplotlib", "scipy", "shapely", "rich")
FOR_TOOLS = ("pandas", "jinja2")
DISTRIBUTIONS = {"cv2": "opencv-python"}  # where pip has another name than Python
SECONDS = 300  # for one import: a cold disk may need a minute

# What is tried with each package once it is imported; `facts` is handed back.
PROBES = {
    "torch": """
facts.update(cuda=torch.version.cuda, gpus=[])
if torch.cuda.is_available():
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
import numpy
torch.from_numpy(numpy.zeros(1))
""",
    # Every run logs what collect_env finds.
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
    # MMEngine finds the bases of configs by pkg_resources.
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
names = f"{'reference' if triton else 'triton'} on a GPU, {'reference' if cpu else 'cpu'} else"
facts.update(backend=names, slow=cpu)
""",
    **dict.fromkeys((*LIBRARIES, *FOR_TOOLS), ""),
    "pycocotools": "import pycocotools.mask",
}
# The current folder is left out of the path, as it is for `python tools/train.py`.
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
PIP_CHECK = re.compile(
    r"(?m)^(?P<name>\S+) \S+ (?:has requirement (?P<need>.*), but you have .*"
    r"|requires (?P<missing>\S+), which is not installed)\.$"
)


class Problem(NamedTuple):
    """What is wrong, the command that fixes it, and whether training cannot start before."""

    text: str
    fix: str
    fatal: bool = True


def output(*command: str) -> str:
    """Return what a command prints, or nothing where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def probe(name: str) -> dict[str, Any]:
    """Try a package in a process of its own; return its facts, with an 'error' if it failed."""
    command = [sys.executable, "-c", FRAME.format(name=name, code=PROBES[name])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS} s"}
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # it was killed, or ended itself
        status = done.returncode
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return {"error": f"the process died ({how})"}
    if "error" in facts:
        # torch only warns of it, and continues without NumPy.
        facts["clash"] = bool(NUMPY_CLASH.search(facts["error"] + done.stderr))
        facts["error"] = " ".join(facts["error"].split())[:150]
    return facts


def examine() -> dict[str, dict[str, Any]]:
    """Return the facts of all probes by name."""
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        try:
            asked = {name: pool.submit(probe, name) for name in PROBES}
            return {name: future.result() for name, future in asked.items()}
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # those that have not begun
            raise


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, such as (2, 13, 0) of '2.13.0+cpu'."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def canonical(name: str | None) -> str:
    """Return the form of a distribution's name that pip compares."""
    return re.sub(r"[-_.]+", "-", name or "").lower()


class Doctor:
    """Looks at the environment of this Python."""

    def __init__(self) -> None:
        self.facts = examine()
        found = [(canonical(d.metadata["Name"]), d.version) for d in metadata.distributions()]
        self.installed = dict(reversed(found))  # of two of a name, the first on the path is used
        owners = metadata.packages_distributions()
        self.owners = {m: sorted({*map(canonical, owners.get(m, ()))}) for m in OPENMMLAB}
        self.gpus = re.findall(r"(?m)^GPU \d+: (.*?)(?: \(UUID.*)?$", output("nvidia-smi", "-L"))
        files = (PACKAGE / ".mim" / "requirements.txt", ROOT / "requirements.txt")
        text = next(file for file in files if file.exists()).read_text(encoding="utf-8")
        self.pins = dict(reversed(re.findall(r"(?m)^([\w-]+)==([^\s;]+)", text)))
        self.python = shlex.quote(sys.executable)
        self.pip = f"{self.python} -m pip"
        setup = ROOT / "tools" / "setup_env.py"
        self.setup = f"python3 {shlex.quote(str(setup))}" if setup.exists() else ""
        in_venv = Path(os.path.abspath(sys.executable)).is_relative_to(ROOT / ".venv")
        # The command that repairs an environment of the set-up's making.
        self.repair = f"{self.setup} --force" if self.setup and in_venv else ""

    def error(self, name: str) -> str:
        """Return what a probe failed with."""
        return self.facts[name].get("error", "")

    def version(self, module: str) -> str:
        """Return the version of what is imported under a name, or else of what is installed."""
        found = self.facts[module].get("version")
        return found or self.installed.get(DISTRIBUTIONS.get(module, module), "")

    # --- commands

    def install(self, *modules: str, options: str = "") -> str:
        """Return the command that installs tested versions."""
        names = (DISTRIBUTIONS.get(module, module) for module in modules)
        pins = (f"{name}=={self.pins[name]}" for name in names)
        return " ".join([f"{self.pip} install", *filter(None, [options]), *pins])

    def reinstall(self, module: str) -> str:
        """Return the command that puts the tested version in place of whatever is there."""
        owners = self.owners.get(module, ())
        first = f"{self.pip} uninstall -y {' '.join(owners)} && " if len(owners) > 1 else ""
        return first + self.install(module, options="--force-reinstall --no-deps")

    def build_mmcv(self, cuda: bool = False) -> str:
        """Return the command that gives this Python an mmcv with operators."""
        others = " ".join(name for name in self.owners["mmcv"] if name != "mmcv")
        first = f"{self.pip} uninstall -y mmcv {others} && " if others else ""
        force = "FORCE_CUDA=1 " if cuda else ""
        if self.repair:
            return f"{first}{force}{self.repair}"
        tools = f"{self.pip} install 'setuptools>=77,<81' wheel ninja psutil"
        # Without --no-cache-dir pip would take the mmcv that it built before.
        options = "--no-build-isolation --no-cache-dir --force-reinstall --no-deps --no-binary mmcv"
        build = f"{force}MMCV_WITH_OPS=1 {self.install('mmcv', options=options)}"
        return f"{first}{tools} && {build}"

    def build_kernels(self) -> str:
        """Return the command that compiles this package's operators."""
        options = "--no-deps --no-build-isolation"
        source = f"-e {shlex.quote(str(ROOT))}" if self.setup else "--force-reinstall rfa_mmdet"
        return self.repair or f"{self.pip} install {options} {source}"

    def new_environment(self) -> str:
        """Return the command that makes an environment in which everything fits."""
        if not self.setup:
            return f"{self.install('torch', 'mmengine', 'mmdet')} && {self.build_mmcv()}"
        return self.repair or f"make -C {shlex.quote(str(ROOT))} env"

    # --- checks

    def problems(self) -> list[Problem]:
        """Return everything that is wrong, what keeps training from starting first."""
        checks = (
            *(self.check_python, self.check_owners, self.check_copies, self.check_missing),
            *(self.check_versions, self.check_failures, self.check_speed, self.check_requirements),
        )
        found = [problem for check in checks for problem in check()]
        if not any(problem.fatal for problem in found):
            found += self.check_rest()
        return sorted(found, key=lambda problem: not problem.fatal)

    def check_python(self) -> Iterator[Problem]:
        """Python itself, and pkg_resources of setuptools."""
        here = sys.version_info[:2]
        if not PYTHONS[0] <= here <= PYTHONS[1]:
            word = "old" if here < PYTHONS[0] else "new"
            text = f"Python {here[0]}.{here[1]} is too {word}: the packages need 3.10 to 3.12"
            make = f"{self.setup} --venv .venv-3.12 --python python3.12"
            broken = here < PYTHONS[0] or any(
                self.error(name) for name in PROBES if name not in FOR_TOOLS
            )
            yield Problem(text, make if self.setup else "python3.12 -m venv .venv-3.12", broken)
        if not find_spec("pkg_resources"):
            text = (
                f"setuptools {self.installed.get('setuptools', '(not installed)')} has no "
                "pkg_resources, by which MMEngine finds the bases of configs (mmdet::...); "
                "setuptools 82 dropped it"
            )
            fix = f"{self.pip} install 'setuptools>=77,<81'"
            yield Problem(text, fix, find_spec("mmengine") is not None)

    def check_owners(self) -> Iterator[Problem]:
        """Two distributions of one module, such as an onedl-* fork beside the original."""
        for module, names in self.owners.items():
            if len(names) > 1:
                listed = " beside ".join(f"{name} {self.installed[name]}" for name in names)
                yield Problem(
                    f"{listed}: both write files into the same folder, so that what is imported "
                    f"as {module} is a mixture",
                    self.build_mmcv() if module == "mmcv" else self.reinstall(module),
                    "mmcv-lite" not in names or bool(self.error("mmcv")),
                )

    def check_copies(self) -> Iterator[Problem]:
        """More than one mmdet, mmcv or mmengine."""
        variable = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        for name in OPENMMLAB:
            specs = (find_spec(name), *(PathFinder.find_spec(name, [e]) for e in sys.path[1:]))
            found = (os.path.realpath(os.path.dirname(s.origin)) for s in specs if s and s.origin)
            used, *hidden = dict.fromkeys(found) or [""]
            if hidden:
                text = f"{1 + len(hidden)} {name}s are on the path; {used} is used and hides "
                fix = f"{self.pip} uninstall -y {name}   # until none is installed"
                if os.path.dirname(used) in map(os.path.realpath, filter(None, variable)):
                    fix = "unset PYTHONPATH"
                yield Problem(text + ", ".join(hidden), fix, False)

    def check_missing(self) -> Iterator[Problem]:
        """What cannot be found at all."""
        needed = [name for name in ("torch", *OPENMMLAB, *LIBRARIES) if not find_spec(name)]
        if "torch" in needed or len(needed) > 3:
            yield Problem(f"not installed: {', '.join(needed)}", self.new_environment())
            return
        if names := [name for name in needed if name != "mmcv"]:
            yield Problem(f"not installed: {', '.join(names)}", self.install(*names))
        if "mmcv" in needed:
            yield Problem("not installed: mmcv", self.build_mmcv())
        if names := [name for name in FOR_TOOLS if not find_spec(name)]:
            text = f"not installed: {', '.join(names)}, which some tools need"
            yield Problem(text, self.install(*names), False)
        if not find_spec("rfa_mmdet"):
            yield Problem("not installed: rfa_mmdet, this checkout", self.build_kernels())

    def check_versions(self) -> Iterator[Problem]:
        """Versions that do not go together; the forks have numbers of their own."""
        for name, (low, high) in WANTED.items():
            version = self.version(name)
            fork = any(owner.startswith("onedl") for owner in self.owners.get(name, ()))
            if not version or fork or low <= numbers(version) < high:
                continue
            text = f"{name} {version}: right is {'.'.join(map(str, low))} or later"
            text += f", below {'.'.join(map(str, high))}"
            if name == "mmcv" and numbers(version) >= high:
                mmdet = self.version("mmdet") or "3.3"
                text = f"mmcv {version} with mmdet {mmdet}, which refuses mmcv from 2.2 on"
            fix = self.build_mmcv() if name == "mmcv" else self.reinstall(name)
            if name == "torch":
                fix = f"{self.install('torch')} && {self.build_mmcv()}"
            broken = self.error(name) or self.error("mmdet") or self.error("rfa_mmdet")
            yield Problem(text, fix, bool(broken))

    def check_failures(self) -> Iterator[Problem]:
        """What does not work for a reason that is known."""
        numpy = self.version("numpy")
        for name in ("torch", *LIBRARIES, *FOR_TOOLS):
            if not self.facts[name].get("clash"):
                continue
            package, error = DISTRIBUTIONS.get(name, name), self.error(name)
            text = f"{package} was compiled for another numpy than {numpy}: {error}"
            fix = f"{self.pip} install --force-reinstall --no-deps --upgrade {package}"
            if numbers(numpy) >= (2,):
                text = f"numpy {numpy} is too new for {package} {self.version(name)}: {error}"
                fix = f"{self.pip} install 'numpy<2'   # or a later {package}"
            yield Problem(text, fix, name not in FOR_TOOLS)
        if self.error("torch") or not self.facts["mmcv"].get("version"):
            return  # without them there is nothing to say of mmcv's operators
        broken = self.error("mmcv")
        if "'mmcv._ext'" in broken:
            have = f"{next(iter(self.owners['mmcv']), 'mmcv')} {self.version('mmcv')}"
            text = f"{have} has no compiled operators, which every detector needs"
            yield Problem(text, self.build_mmcv())
        elif re.search(r"undefined symbol|\.so", broken):
            text = f"mmcv's operators were compiled for another torch than {self.version('torch')}"
            yield Problem(f"{text}: {broken}", self.build_mmcv())

    def check_speed(self) -> Iterator[Problem]:
        """What would be slow: kernels that are not built, a GPU that would not be used."""
        torch, slow = self.facts["torch"], self.facts["rfa_mmdet"].get("slow")
        if slow:
            text = "the receptive-field convolutions run in slow, plain torch on the CPU"
            yield Problem(f"{text}: {slow}", self.build_kernels(), False)
        if "version" not in torch:
            return
        have = f"torch {torch['version']}"
        if torch["gpus"]:
            if self.facts["mmcv"].get("cuda") == "not available":
                text = "mmcv's operators were compiled for the CPU only, but torch would train on "
                yield Problem(text + torch["gpus"][0], self.build_mmcv(cuda=True))
        elif not self.gpus:
            return
        elif torch["cuda"] is None:
            text = f"{have} is a CPU build, so {self.gpus[0]} stays unused"
            first = f"{self.pip} uninstall -y torch mmcv && {self.install('torch')}"
            yield Problem(text, f"{first} && {self.build_mmcv()}", False)
        elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            text = f"CUDA_VISIBLE_DEVICES hides {self.gpus[0]}"
            yield Problem(text, "unset CUDA_VISIBLE_DEVICES", False)
        else:
            text = f"{have} (CUDA {torch['cuda']}) cannot use {self.gpus[0]}; most often the "
            text += "driver is older than that CUDA"
            fix = "nvidia-smi   # shows the latest CUDA that the driver serves; update the driver"
            yield Problem(text, fix, False)

    def check_requirements(self) -> Iterator[Problem]:
        """What pip finds missing or of a wrong version, for the packages that count here."""
        ours = {"rfa-mmdet", "torch", *(n for names in self.owners.values() for n in names)}
        ours |= {DISTRIBUTIONS.get(name, name) for name in (*LIBRARIES, *FOR_TOOLS)}
        report = output(sys.executable, "-m", "pip", "check")
        found = [line for line in PIP_CHECK.finditer(report) if canonical(line["name"]) in ours]
        if missing := sorted({line["missing"] for line in found if line["missing"]}):
            text = "; ".join(line[0].rstrip(".") for line in found if line["missing"])
            yield Problem(text, f"{self.pip} install {' '.join(missing)}", False)
        for line in found:
            if line["need"]:
                yield Problem(line[0].rstrip("."), f"{self.pip} install '{line['need']}'", False)

    def check_rest(self) -> Iterator[Problem]:
        """Name the first package that fails for a reason not known above."""
        for name in PROBES:
            error = self.error(name)
            if not error or not find_spec(name):
                continue
            fix = self.new_environment()
            if re.search(r"libGL|libgthread|libglib", error):
                fix = "apt install libgl1 libglib2.0-0"
            if name == "rfa_mmdet":
                fix = f"{self.python} -c 'import rfa_mmdet'   # shows where"
            yield Problem(f"{name} does not work: {error}", fix, name not in FOR_TOOLS)
            return

    # --- the screen

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield (name, version, remark)."""
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


def report(doctor: Doctor) -> int:
    """Print the screen; return the exit code."""
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
    """Run the command line; return the exit code."""
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
