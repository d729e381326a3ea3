#!/usr/bin/env python3
"""Say what is wrong with a Python's packages for detection, and the command that mends it.

One screen: versions, what is compiled, which backend would be used, the GPU, and each trouble.
The exit code is 0 if training can start, 1 if not. Only the standard library is imported here, and
every package in a process of its own, so that one that is broken, or even crashes, is a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ((3, 10), (3, 12))
# Versions that work together: from (inclusive), to (exclusive).
WANTED = {
    "torch": ("2.4", "3"),
    "mmengine": ("0.10", "0.11"),
    "mmcv": ("2.0", "2.2"),
    "mmdet": ("3.3", "3.4"),
}
LIBRARIES = ("numpy", "cv2", "pycocotools", "matplotlib", "scipy", "shapely", "pandas", "rich")
# Module -> what pip calls it, where that is not the same.
DISTRIBUTIONS = {"cv2": "opencv-python"}
SECONDS = 300  # for one import: a cold disk may need a minute

# What is asked of each package. `facts` is handed back; later ones need earlier ones.
PROBES = {
    "torch": """
import torch
facts.update(version=torch.__version__, cuda=torch.version.cuda, gpus=[])
if torch.cuda.is_available():
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
import numpy
torch.from_numpy(numpy.zeros(1))
""",
    "mmengine": """
import mmengine
facts.update(version=mmengine.__version__)
import mmengine.runner
""",
    "mmcv": """
import mmcv
facts.update(version=mmcv.__version__)
import torch, mmcv.ops
facts.update(cuda=mmcv.ops.get_compiling_cuda_version())
mmcv.ops.nms(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.ones(1), 0.5)
""",
    # MMEngine finds the bases of configs by pkg_resources.
    "mmdet": """
import mmdet
facts.update(version=mmdet.__version__)
import mmdet.models
from mmengine.hub import get_config
get_config("mmdet::_base_/default_runtime.py")
""",
    "rfa_mmdet": """
import rfa_mmdet
facts.update(version=rfa_mmdet.__version__, folder=rfa_mmdet.__path__[0], backend="reference")
from mmdet.registry import MODELS
MODELS.get("RFAResNet")
try:
    from rfa_mmdet.ops.receptive_field.backends import missing
except ImportError:
    pass  # there is but one
else:
    cpu, triton = missing("cpu"), missing("triton")
    names = f"{'reference' if triton else 'triton'} on a GPU, {'reference' if cpu else 'cpu'} else"
    facts.update(backend=names, slow=cpu)
""",
    **{name: f"import {name}" for name in LIBRARIES},
    "pycocotools": "import pycocotools.mask",
}
# The current folder is left out of the path, as it is for `python tools/train.py`.
FRAME = """
import json, sys, warnings
sys.path[:] = [entry for entry in sys.path if entry]
warnings.simplefilter("ignore")
facts = {{}}
try:
    exec({code!r})
except BaseException as error:
    text = (str(error).strip().splitlines() or [""])[0]
    if "NumPy 1.x" in str(error):
        text = "A module that was compiled using NumPy 1.x cannot be run in NumPy 2"
    facts["error"] = f"{{type(error).__name__}}: {{text}}"
print("\\n" + json.dumps(facts))
"""
NUMPY_CLASH = re.compile(
    r"compiled using NumPy 1|multiarray failed|_ARRAY_API|dtype size changed|Numpy is not available"
    r"|module 'numpy\S*' has no attribute|cannot import name '\w+' from 'numpy"
)


class Trouble(NamedTuple):
    """What is wrong.

    Attributes:
        text: What, and why it matters.
        mend: The command that mends it.
        fatal: Whether training cannot start before it is mended.
    """

    text: str
    mend: str
    fatal: bool = True


def probe(code: str) -> dict:
    """Run code in a Python of its own; return its facts, with an 'error' if it failed."""
    command = [sys.executable, "-c", FRAME.format(code=code)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS} s"}
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # it was killed, or ended itself
        code = done.returncode
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return {"error": f"the process died ({name})"}
    # torch only warns of it, and goes on without NumPy.
    if "error" in facts and NUMPY_CLASH.search(done.stderr):
        facts["error"] += "; A module that was compiled using NumPy 1.x cannot be run in NumPy 2"
    return facts


def examine() -> dict[str, dict]:
    """Run all probes: those of the stack each in its process, the libraries together if they work.

    Returns:
        The facts of each, by its name.
    """
    together = "\n".join(PROBES[name] for name in LIBRARIES)
    single = [name for name in PROBES if name not in LIBRARIES]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        try:
            libraries = pool.submit(probe, together)
            asked = {name: pool.submit(probe, PROBES[name]) for name in single}
            if "error" in libraries.result():
                asked.update((name, pool.submit(probe, PROBES[name])) for name in LIBRARIES)
            return {name: asked[name].result() if name in asked else {} for name in PROBES}
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # those that have not begun
            raise


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, such as (2, 13, 0) of '2.13.0+cpu'."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)


class Doctor:
    """Looks at the environment of this Python.

    Attributes:
        facts: What the probes found, by their name.
        installed: (version, folder) of every installed distribution, by name.
        gpus: Names of the GPUs that the driver shows, whatever torch can do with them.
    """

    def __init__(self) -> None:
        self.facts = examine()
        self.installed: dict[str, list[tuple[str, str]]] = {}
        for found in metadata.distributions():
            name = (found.metadata["Name"] or "").lower().replace("_", "-")
            place = (found.version, os.path.realpath(str(found.locate_file(""))))
            if place not in self.installed.setdefault(name, []):
                self.installed[name].append(place)
        self.gpus = driver_gpus()
        text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
        self.pins = dict(reversed(re.findall(r"(?m)^([\w-]+)==([^\s;]+)", text)))
        python = Path(os.path.abspath(sys.executable))
        self.own = python.is_relative_to(ROOT / ".venv")
        shown = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
        self.python = shlex.quote(shown)
        self.pip = f"{self.python} -m pip"

    def version(self, module: str) -> str | None:
        """Return the version of what is imported under a name, or else of what is installed."""
        found = self.installed.get(DISTRIBUTIONS.get(module, module))
        return self.facts[module].get("version") or (found[0][0] if found else None)

    def error(self, name: str) -> str | None:
        """Return what a probe failed with."""
        return self.facts[name].get("error")

    # --- commands

    def pinned(self, *names: str) -> str:
        """Return the command that installs tested versions."""
        pins = " ".join(f"{name}=={self.pins[name]}" for name in names)
        return f"{self.pip} install --force-reinstall --no-deps {pins}"

    def build_mmcv(self, cuda: bool = False) -> str:
        """Return the command that gives this Python an mmcv with operators."""
        forks = [
            name for name in ("mmcv-lite", "mmcv-full", "onedl-mmcv") if name in self.installed
        ]
        first = f"{self.pip} uninstall -y mmcv {' '.join(forks)} && " if forks else ""
        force = "FORCE_CUDA=1 " if cuda else ""
        if self.own:
            return f"{first}{force}python3 tools/setup_env.py --force"
        tools = f"{self.pip} install 'setuptools>=77,<81' wheel ninja psutil"
        # Without --no-cache-dir pip would take the mmcv that it built before.
        options = "--no-build-isolation --no-cache-dir --force-reinstall --no-deps --no-binary mmcv"
        build = f"{force}MMCV_WITH_OPS=1 {self.pip} install {options} mmcv=={self.pins['mmcv']}"
        return f"{first}{tools} && {build}"

    def new_environment(self) -> str:
        """Return the command that makes an environment in which everything fits."""
        return "python3 tools/setup_env.py --force" if self.own else "make env"

    # --- checks

    def troubles(self) -> list[Trouble]:
        """Return everything that is wrong, what keeps training from starting first."""
        found = [
            *self.check_python(),
            *self.check_setuptools(),
            *self.check_forks(),
            *self.check_copies(),
            *self.check_missing(),
            *self.check_versions(),
            *self.check_numpy(),
            *self.check_operators(),
            *self.check_gpu(),
            *self.check_backends(),
            *self.check_requirements(),
        ]
        if not any(trouble.fatal for trouble in found):
            found += self.check_rest()
        return sorted(found, key=lambda trouble: not trouble.fatal)

    def check_python(self):
        """Python itself."""
        here = sys.version_info[:2]
        if PYTHONS[0] <= here <= PYTHONS[1]:
            return
        word = "old" if here < PYTHONS[0] else "new"
        broken = here < PYTHONS[0] or any("error" in facts for facts in self.facts.values())
        yield Trouble(
            f"Python {here[0]}.{here[1]} is too {word}: the packages are made for 3.10 to 3.12",
            "python3 tools/setup_env.py --venv .venv-3.12 --python python3.12",
            broken,
        )

    def check_setuptools(self):
        """pkg_resources, which mmengine and mmcv's setup.py import."""
        if find_spec("pkg_resources") is None:
            have = self.version_of("setuptools")
            yield Trouble(
                f"{have} has no pkg_resources, by which MMEngine finds the bases of configs "
                "(mmdet::...); setuptools 82 dropped it",
                f"{self.pip} install 'setuptools>=77,<81'",
                "mmengine" in self.installed,
            )

    def version_of(self, name: str) -> str:
        """Return 'setuptools 82.0.1', or 'setuptools (not installed)'."""
        found = self.installed.get(name)
        return f"{name} {found[0][0]}" if found else f"{name} (not installed)"

    def check_forks(self):
        """The onedl-* forks, which bring modules of the same names."""
        forks = sorted(name for name in self.installed if name.startswith("onedl-mm"))
        if not forks:
            return
        originals = [name.replace("onedl-", "") for name in forks]
        originals = [name.replace("mmdetection", "mmdet") for name in originals]
        both = [name for name in originals if name in self.installed]
        wanted = [name for name in ("mmengine", "mmdet") if name in originals]
        install = f"{self.pip} uninstall -y {' '.join([*forks, *both])}"
        if wanted:
            install += f" && {self.pinned(*wanted)}"
        if "mmcv" in originals:
            install += f" && {self.build_mmcv()}".replace(
                f"{self.pip} uninstall -y mmcv onedl-mmcv && ", ""
            )
        listed = ", ".join(map(self.version_of, forks))
        if both:
            text = (
                f"{listed} beside {', '.join(map(self.version_of, both))}: both write files into "
                "the same folders, so that what is imported is a mixture"
            )
        else:
            text = f"{listed}: forks that bring modules of the same names; nothing here is tested "
            text += "with them"
        yield Trouble(text, install, bool(both) or self.any_error())

    def any_error(self) -> bool:
        """Return whether one of OpenMMLab's packages, or ours, failed."""
        return any(self.error(name) for name in ("mmcv", "mmengine", "mmdet", "rfa_mmdet"))

    def check_copies(self):
        """More than one mmdet, mmcv or mmengine."""
        for name in ("mmdet", "mmcv", "mmengine"):
            folders = copies(name)
            if len(folders) > 1:
                variable = os.environ.get("PYTHONPATH", "").split(os.pathsep)
                inside = [os.path.realpath(entry) for entry in variable if entry]
                mend = f"{self.pip} uninstall -y {name}   # until it says that none is installed"
                if os.path.dirname(folders[0]) in inside:
                    mend = "unset PYTHONPATH"
                yield Trouble(
                    f"{len(folders)} {name}s are on the path; {folders[0]} is used and hides "
                    f"{', '.join(folders[1:])}",
                    mend,
                    False,
                )

    def check_missing(self):
        """What cannot be found at all."""
        missing = [name for name in ("torch", *WANTED, *LIBRARIES) if find_spec(name) is None]
        missing = list(dict.fromkeys(missing))
        if "torch" in missing or len(missing) > 3:
            yield Trouble(f"not installed: {', '.join(missing)}", self.new_environment())
            return
        names = [DISTRIBUTIONS.get(name, name) for name in missing if name != "mmcv"]
        if names:
            pins = " ".join(f"{name}=={self.pins[name]}" for name in names)
            yield Trouble(f"not installed: {', '.join(names)}", f"{self.pip} install {pins}")
        if "mmcv" in missing:
            yield Trouble("not installed: mmcv", self.build_mmcv())
        if find_spec("rfa_mmdet") is None:
            options = "--no-deps --no-build-isolation"
            yield Trouble(
                "not installed: rfa_mmdet, this checkout",
                f"{self.pip} install {options} -e {shlex.quote(str(ROOT))}",
            )

    def check_versions(self):
        """Versions that do not go together."""
        for name, (low, high) in WANTED.items():
            version = self.version(name)
            if version is None or numbers(low) <= numbers(version) < numbers(high):
                continue
            mmdet = self.version("mmdet") or "3.3"
            refused = name == "mmcv" and numbers(version) >= numbers(high)
            if refused:
                text = f"mmcv {version} with mmdet {mmdet}, which refuses mmcv from 2.2 on"
            else:
                text = f"{name} {version}: right is {low} or later, below {high}"
            mend = self.build_mmcv() if name == "mmcv" else self.pinned(name)
            if name == "torch":
                mend = f"{self.pip} install torch=={self.pins['torch']} && {self.build_mmcv()}"
            broken = self.error(name) or self.error("mmdet") or self.error("rfa_mmdet")
            yield Trouble(text, mend, bool(broken))

    def check_numpy(self):
        """Packages that were compiled for another NumPy."""
        for name in ("torch", *LIBRARIES):
            error = self.error(name) or ""
            if not NUMPY_CLASH.search(error):
                continue
            package = DISTRIBUTIONS.get(name, name)
            have = self.version("numpy") or ""
            if numbers(have) >= (2,):
                yield Trouble(
                    f"numpy {have} is too new for {package} {self.version(name) or ''}: {error}",
                    f"{self.pip} install 'numpy<2'   # or a later {package}",
                )
            else:
                yield Trouble(
                    f"{package} was compiled for another numpy than {have}: {error}",
                    f"{self.pip} install --force-reinstall --no-deps --upgrade {package}",
                )

    def check_operators(self):
        """Mmcv's compiled operators."""
        error = self.error("mmcv")
        if self.error("torch") or not self.facts["mmcv"].get("version"):
            return  # without them there is nothing to say
        if "mmcv-lite" in self.installed or (error and re.search(r"'mmcv\._ext'", error)):
            name = "mmcv-lite" if "mmcv-lite" in self.installed else "mmcv"
            text = f"{self.version_of(name)} has no compiled operators, which every detector needs"
            if error is None:
                text = "mmcv-lite is beside mmcv: whichever is updated last wins"
            yield Trouble(text, self.build_mmcv(), error is not None)
        elif error and re.search(r"undefined symbol|\.so", error):
            yield Trouble(
                f"mmcv's operators were compiled for another torch than "
                f"{self.version('torch')}: {error}",
                self.build_mmcv(),
            )

    def check_gpu(self):
        """A GPU that would not be used."""
        torch = self.facts["torch"]
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if "version" not in torch:
            return
        if torch["gpus"] and self.facts["mmcv"].get("cuda") == "not available":
            yield Trouble(
                f"mmcv's operators were compiled for the CPU only, but torch would train on "
                f"{torch['gpus'][0]}",
                self.build_mmcv(cuda=True),
            )
        elif self.gpus and torch["cuda"] is None:
            pin = f"torch=={self.pins['torch']}"
            yield Trouble(
                f"torch {torch['version']} is a CPU build, so {self.gpus[0]} stays unused",
                f"{self.pip} uninstall -y torch mmcv && {self.pip} install {pin} && "
                f"{self.build_mmcv()}",
                False,
            )
        elif self.gpus and not torch["gpus"] and hidden:
            yield Trouble(
                f"CUDA_VISIBLE_DEVICES hides {self.gpus[0]}", "unset CUDA_VISIBLE_DEVICES", False
            )
        elif self.gpus and not torch["gpus"]:
            yield Trouble(
                f"torch {torch['version']} (CUDA {torch['cuda']}) cannot use {self.gpus[0]}; most "
                "often the driver is older than that CUDA",
                "nvidia-smi   # shows the latest CUDA that the driver serves; update the driver",
                False,
            )

    def check_backends(self):
        """Whether this package's own operators are compiled."""
        reason = self.facts["rfa_mmdet"].get("slow")
        if reason:
            mend = "python3 tools/setup_env.py --force"
            if not self.own:
                checkout = shlex.quote(str(ROOT))
                mend = f"{self.pip} install --no-deps --no-build-isolation -e {checkout}"
            slow = "the receptive-field convolutions run in slow, plain torch on the CPU"
            yield Trouble(f"{slow}: {reason}", mend, False)

    def check_requirements(self):
        """What installed packages say they need of others, and of Python."""
        try:
            from packaging.requirements import Requirement
            from packaging.specifiers import SpecifierSet
        except ImportError:
            return  # pip's own look, `pip check`, is then missing too
        for name in ("rfa-mmdet", *WANTED, *(DISTRIBUTIONS.get(n, n) for n in LIBRARIES)):
            if name not in self.installed:
                continue
            found = metadata.distribution(name)
            python = ".".join(map(str, sys.version_info[:3]))
            if not SpecifierSet(found.metadata["Requires-Python"] or "").contains(python):
                yield Trouble(
                    f"Python {python} is not what {name} {found.version} is made for "
                    f"({found.metadata['Requires-Python']})",
                    f"{self.pip} install --upgrade {name}",
                    False,
                )
            for line in found.requires or ():
                need = Requirement(line)
                have = self.installed.get(need.name.lower().replace("_", "-"))
                if not have or (need.marker and not need.marker.evaluate({"extra": ""})):
                    continue
                if not need.specifier.contains(have[0][0], prereleases=True):
                    yield Trouble(
                        f"{need.name} {have[0][0]} is not what {name} {found.version} asks for "
                        f"({need.specifier})",
                        f"{self.pip} install '{need.name}{need.specifier}'",
                        False,
                    )

    def check_rest(self):
        """Name the first package that fails for a reason not known above."""
        for name in PROBES:
            error = self.error(name)
            if not error:
                continue
            mend = self.new_environment()
            if re.search(r"libGL|libgthread|libglib", error):
                mend = "apt install libgl1 libglib2.0-0"
            if name == "rfa_mmdet":
                mend = f"{self.python} -c 'import rfa_mmdet'   # shows where"
            yield Trouble(f"{name} does not work: {error}", mend)
            return

    # --- the screen

    def rows(self):
        """Yield (name, version, remark)."""
        python = ".".join(map(str, sys.version_info[:3]))
        yield "python", python, self.python
        torch, ops = self.facts["torch"], self.facts["mmcv"]
        built = f"CUDA {torch['cuda']}" if torch.get("cuda") else "CPU build"
        yield self.row("torch", built)
        compiled = {None: "no operators", "not available": "operators compiled for the CPU"}
        cuda = ops.get("cuda")
        yield self.row("mmcv", compiled.get(cuda, f"operators compiled for CUDA {cuda}"))
        yield self.row("mmengine")
        yield self.row("mmdet")
        ours = self.facts["rfa_mmdet"]
        yield self.row("rfa_mmdet", f"backend: {ours.get('backend')}; {ours.get('folder')}")
        for name in LIBRARIES:
            yield self.row(name)
        named = ("c++", "g++", "clang++")
        compiler = os.environ.get("CXX") or next(filter(shutil.which, named), "none")
        yield "C++ compiler", compiler, ""
        yield "GPU", ", ".join(torch.get("gpus") or self.gpus) or "none", ""

    def row(self, name: str, remark: str = "") -> tuple[str, str, str]:
        """Return the row of a package: what it is, or why it is not."""
        version = self.version(name) or "-"
        error = self.error(name)
        if error and find_spec(name) is None:
            return name, version, "not installed"
        return name, version, f"FAILS: {error[:110]}" if error else remark


def copies(name: str) -> list[str]:
    """Return the folders from which a package could be imported, the used one first."""
    spec = find_spec(name)
    entries = [os.path.join(entry, name) for entry in sys.path[1:] if entry]
    if spec and spec.origin:
        entries.insert(0, os.path.dirname(spec.origin))
    found = (os.path.realpath(e) for e in entries if os.path.isfile(os.path.join(e, "__init__.py")))
    return list(dict.fromkeys(found))


def driver_gpus() -> list[str]:
    """Return the names of the GPUs that NVIDIA's driver shows."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"(?m)^GPU \d+: (.*?)(?: \(UUID.*)?$", listed)


def main() -> int:
    """Print the screen; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python tools/doctor.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    doctor = Doctor()
    rows = list(doctor.rows())
    widths = [max(len(row[i]) for row in rows if len(row[i]) < 30) for i in (0, 1)]
    for name, version, remark in rows:
        print(f"{name:<{widths[0]}}  {version:<{widths[1]}}  {remark}".rstrip())
    troubles = doctor.troubles()
    for trouble in troubles:
        print(f"\n{'error' if trouble.fatal else 'warning'}: {trouble.text}")
        print(f"  mend:  {trouble.mend}")
    if any(trouble.fatal for trouble in troubles):
        print("\ntraining cannot start here")
        return 1
    device = "GPU" if doctor.facts["torch"]["gpus"] else "CPU"
    print(f"\ntraining can start, on the {device}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
