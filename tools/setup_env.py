#!/usr/bin/env python3
"""Create the project's virtual environment, including mmcv with compiled operators.

Runs on Python 3.8 or later without any packages. Every step is skipped if its result already
exists, so an interrupted set-up can be resumed, and a complete one takes no time. The folder
``requirements`` has the versions of each stack.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
# Stack -> supported Python versions, in order of preference.
STACKS = {
    "current": ("3.12", "3.11", "3.10"),
    "prebuilt": ("3.10", "3.11"),
    "onedl": ("3.12", "3.11", "3.10"),
    "tasks": ("3.10", "3.11"),
    "mmyolo": ("3.12", "3.11", "3.10"),
}
# For these, OpenMMLab has built mmcv.
PREBUILT = ("prebuilt", "tasks")
DOCTOR = ROOT / "rfa_mmdet" / "cli" / "doctor.py"
BUILD_TOOLS = ("pip", "setuptools", "wheel", "ninja", "psutil")
LOCK, STAMP = ".setup_env.lock", ".setup_env.stamp"
GB_PER_JOB = 2  # peak memory of compiling one file against torch's headers
# Setting CFLAGS replaces Python's own flags, including optimisation, so repeat them. -g0, which is
# added to them, halves the time: 8.5 s instead of 15.9 s for roi_align.cpp.
CFLAGS = "-O3 -DNDEBUG -fwrapv"

# Code to run in another Python; its output is read back, its exit message is the problem.
ASK_PYTHON = """
import os, sys, sysconfig
from importlib.util import find_spec
version = "%d.%d" % sys.version_info[:2]
if version not in sys.argv[1].split():
    sys.exit("is Python " + version)
if not (find_spec("venv") and find_spec("ensurepip")):
    sys.exit("lacks venv and ensurepip: apt install python3-venv")
if "compile" in sys.argv and not os.path.isfile(sysconfig.get_path("include") + "/Python.h"):
    sys.exit("lacks the header Python.h: apt install python3-dev")
print(version, end="")"""
ASK_TORCH = """
import json, torch
from torch.utils.cpp_extension import CUDA_HOME
cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "cuda_home": CUDA_HOME,
    "archs": sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in cards}),
}))"""
ASK_TRITON = """
from importlib.metadata import requires
print(any(line.startswith("triton") for line in requires("torch")), end="")"""
ASK_MMCV = """
import json, mmcv, mmcv.ops
print(json.dumps([mmcv.__version__, mmcv.ops.get_compiling_cuda_version()]))"""


class SetupError(Exception):
    """An error for the user: what went wrong, and how to fix it."""


def read_pins(name: str) -> str:
    """Return the pins of a stack, including those of the files it refers to with -r."""
    text = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    return re.sub(r"(?m)^-r (\w+)\.txt$", lambda line: read_pins(line.group(1)), text)


def ask(python: str | Path, code: str, *args: str) -> str:
    """Run code in another Python and return what it printed."""
    command = [str(python), "-I", "-W", "ignore", "-c", code, *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SetupError(f"does not run: {error.strerror}") from error
    if done.returncode:
        raise SetupError((done.stderr.strip() or f"exit status {done.returncode}").split("\n")[-1])
    return done.stdout


def run(command: list, what: str, **options) -> None:
    """Run a command with its output on the terminal."""
    code = subprocess.run([str(part) for part in command], **options).returncode
    if code:
        raise SetupError(f"{what} failed (exit status {code}); see its output above")


def compiler() -> str:
    """Return the command of the C++ compiler."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise SetupError(
        f"no C++ compiler found ({', '.join(names)}), but mmcv's operators must be compiled: "
        "apt install g++"
    )


def python_candidates(stack: str) -> list[str]:
    """Return this Python and those on PATH and in pyenv; names may occur several times."""
    names = [*(f"python{version}" for version in STACKS[stack]), "python3"]
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser()
    folders = os.environ.get("PATH", "").split(os.pathsep)
    folders += sorted(map(str, pyenv.glob("versions/*/bin")))
    paths = [os.path.join(folder, name) for name in names for folder in folders if folder]
    found = list(filter(os.path.exists, paths))
    return [*found, sys.executable] if stack in PREBUILT else [sys.executable, *found]


def find_python(candidates: list[str], stack: str, will_compile: bool) -> tuple[str, str]:
    """Return the first Python that supports a stack, and its version, e.g. '3.11'."""
    problems, versions = {}, sorted(STACKS[stack])
    options = [" ".join(versions), *(["compile"] if will_compile else [])]
    for python in candidates:
        try:
            return python, ask(python, ASK_PYTHON, *options)
        except SetupError as error:  # e.g. a pyenv shim without a version
            problems[python] = str(error)
    found = "".join(f"\n  {python} {problem}" for python, problem in problems.items())
    listed = f"{', '.join(versions[:-1])} or {versions[-1]}"
    raise SetupError(f"needs Python {listed} with venv and headers; found{found}")


def cache_root() -> Path:
    """Return the folder of the cache of built wheels, shared by all environments."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rfa_mmdet" / "wheels"


def job_count() -> int:
    """Return how many files to compile in parallel, limited by CPUs and free memory."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise SetupError(f"MAX_JOBS must be a number above 0, not {wanted!r}")
        return int(wanted)
    free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    by_memory = int(free.group(1)) // (GB_PER_JOB << 20) if free else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def show_progress(lines, out, clock=time.monotonic) -> None:
    """Turn ninja's output into a progress bar, or a few lines without a terminal."""
    start = last_time = clock()
    last_done = 0
    for line in lines:
        count = re.match(r"\s*\[(\d+)/(\d+)\] ", line)
        if not count:
            continue
        (done, total), now = map(int, count.groups()), clock()
        left = (now - start) / done * (total - done)
        text = f"{done}/{total} files, {now - start:.0f} s, about {left:.0f} s left"
        if out.isatty():
            out.write("\r      [{:<30}] {}\x1b[K".format("#" * (30 * done // total), text))
            out.write("\n" if done == total else "")
        elif done == total or (done - last_done) * 10 >= total or now - last_time >= 30:
            out.write(f"      {text}\n")
            last_done, last_time = done, now
        out.flush()


def log_errors(text: str, count: int = 20) -> str:
    """Return the last lines of a log that report errors, or else just its last lines."""
    lines = text.splitlines()
    bad = [x for x in lines if re.search(r"\berror:|Error\b|FAILED|[Kk]illed", x)]
    return "\n".join(x.strip()[:200] for x in (bad or lines)[-count:])


def run_build(command: list, env: dict[str, str], log: Path) -> None:
    """Run mmcv's build, with output to a log and progress on the terminal."""

    def copied(lines, file):
        for line in lines:
            file.write(line)
            yield line

    # In its own session, so an interruption also stops the compilers, not only pip.
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [str(part) for part in command]
    process = subprocess.Popen(command, env=env, errors="replace", start_new_session=True, **pipe)
    try:
        with log.open("w", encoding="utf-8") as file:
            show_progress(copied(process.stdout, file), sys.stdout)
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    if process.returncode:
        errors = log_errors(log.read_text(encoding="utf-8"))
        raise SetupError(f"building mmcv failed (full log: {log}):\n{errors}")


class Setup:
    """The steps that set up one environment; ``force`` runs them despite a valid stamp."""

    def __init__(
        self, venv: Path, wanted: str | None = None, force: bool = False, stack: str = "current"
    ):
        self.venv, self.wanted, self.force, self.stack = venv, wanted, force, stack
        self.python = venv / "bin" / "python"
        self.pins = read_pins(stack)
        pin = re.search(r"(?m)^((?:onedl-)?mmcv)==(\S+)", self.pins)
        self.mmcv, self.mmcv_version = pin.group(1), pin.group(2)
        self.torch = re.search(r"(?m)^torch==(\S+)", self.pins).group(1)
        # Prefix of the folders of its wheels.
        self.key = self.mmcv_version if self.mmcv == "mmcv" else f"{self.mmcv}-{self.mmcv_version}"

    def choose_python(self) -> None:
        """Choose the Python, and check the requirements of a build before any slow step."""
        built = self.stack in PREBUILT  # usually
        built = built or any(cache_root().glob(f"{self.key}-{self.torch}*"))
        name = self.mmcv.replace("-", "_")
        built = built or any(self.venv.glob(f"lib/python*/site-packages/{name}-*.dist-info"))
        if not built:
            compiler()
        wanted = [self.wanted] if self.wanted else python_candidates(self.stack)
        there = [str(self.python)] if os.path.lexists(self.python) else wanted
        try:
            self.base, self.version = find_python(there, self.stack, not built)
            if self.wanted and find_python(wanted, self.stack, False)[1] != self.version:
                raise SetupError(
                    f"{self.venv} has Python {self.version}, not the version of {self.wanted}"
                )
        except SetupError as error:
            if there is wanted:
                raise
            raise SetupError(f"{error}\nRemove {self.venv} or choose another --venv") from None

    def pip(self, *arguments, **options) -> None:
        """Run the environment's pip."""
        command = [self.python, "-I", "-m", "pip", *arguments]
        run(command, f"pip {arguments[0]}", **options)

    def make_venv(self) -> None:
        """Step 1: create an environment with pip."""
        if not any(self.venv.glob("lib/python*/site-packages/pip")):
            run([self.base, "-m", "venv", self.venv], "creating the virtual environment")

    def install_torch(self) -> None:
        """Step 2: install torch and the build tools for mmcv.

        A torch of the pinned version is kept, regardless of its build (+cpu, +cu130).
        """
        pins = {"input": self.pins, "text": True}
        self.pip("install", "-q", "-c", "/dev/stdin", *BUILD_TOOLS, **pins)
        there = any(self.venv.glob("lib/python*/site-packages/torch"))
        quiet = ["-q"] if there else []  # show a download that takes minutes
        self.pip("install", *quiet, "-c", "/dev/stdin", "torch", **pins)

    def install_libraries(self) -> None:
        """Step 3: install all other packages; before mmcv, which needs some of them to import."""
        # torch's CUDA builds install their own triton
        names = f"{self.mmcv}|triton" if ask(self.python, ASK_TRITON) == "True" else self.mmcv
        rest = re.sub(rf"(?m)^({names})==.*$", "", self.pins)
        self.pip("install", "-q", "-r", "/dev/stdin", input=rest, text=True)
        if self.stack == "mmyolo":
            accept_mmcv(self.venv)
        try:
            ask(self.python, "import torch, cv2")
        except SetupError as error:  # fail before compiling for minutes
            hint = "\nOpenCV needs a system library: apt install libgl1 libglib2.0-0"
            lacks = re.search("libGL|libgthread|libglib", str(error))
            raise SetupError(f"{self.python}: {error}{hint if lacks else ''}") from None

    def install_mmcv(self) -> None:
        """Step 4: install mmcv with compiled operators, from the cache or by building it."""
        torch = json.loads(ask(self.python, ASK_TORCH))
        cuda = bool(torch["archs"]) or os.environ.get("FORCE_CUDA") == "1"
        if self.mmcv_problem(cuda) is None:
            return
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "+".join(torch["archs"]) or "all"
        kind = "cuda" + re.sub(r"[^\w.+]+", "_", archs) if cuda else "cpu"
        # The key includes torch, because mmcv built against another torch does not load; pip's own
        # cache only distinguishes versions of mmcv.
        tag = "cp" + self.version.replace(".", "")
        key = f"{self.key}-{torch['version']}-{tag}-{kind}"
        cache = cache_root() / key
        for wheel in cache.glob("*.whl"):
            print(f"      from {cache}", flush=True)
            problem = self.install_wheel(wheel, cuda)
            if problem is None:
                return
            print(f"      it does not work ({problem}); rebuilding it", flush=True)
            shutil.rmtree(cache)
        if self.stack in PREBUILT and self.fetch_mmcv(cuda):
            return
        if cuda:
            check_cuda(torch)
        work = self.venv / "build" / key
        wheel = keep(self.build_wheel(work, cuda), cache)
        problem = self.install_wheel(wheel, cuda)
        shutil.rmtree(work)
        if problem is not None:
            shutil.rmtree(cache, ignore_errors=True)
            raise SetupError(f"mmcv was built but does not work: {problem}")

    def mmcv_problem(self, cuda: bool) -> str | None:
        """Return what is wrong with the environment's mmcv, or None."""
        try:
            version, built_for = json.loads(ask(self.python, ASK_MMCV))
        except SetupError as error:
            return str(error)
        if version != self.mmcv_version:
            return f"its version is {version}"
        return "it has no CUDA operators" if cuda and built_for == "not available" else None

    def fetch_mmcv(self, cuda: bool) -> bool:
        """Install OpenMMLab's own build with mim, if its index is reachable."""
        mim = [str(self.python), "-I", "-m", "mim", "install", f"mmcv=={self.mmcv_version}"]
        options = ["--no-deps", "--force-reinstall", "--only-binary", "mmcv"]
        limits = ["--retries", "0", "--timeout", "15"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*mim, *options, *limits], capture_output=True, timeout=600)
            if self.mmcv_problem(cuda) is None:
                return True
        print("      OpenMMLab's own build is not available; building mmcv", flush=True)
        return False

    def install_wheel(self, wheel: Path, cuda: bool) -> str | None:
        """Install a built mmcv; return what is wrong with it, or None."""
        try:
            self.pip("install", "-q", "--no-deps", "--force-reinstall", "--no-index", wheel)
        except SetupError as error:
            return str(error)
        return self.mmcv_problem(cuda)

    def build_wheel(self, work: Path, cuda: bool) -> Path:
        """Build mmcv's wheel in a persistent tree, so ninja can resume after an interruption.

        ``work``, the folder of the tree, is for one kind of build, because setuptools would
        consider an operator library linked against another torch as up to date.
        """
        name, jobs = f"{self.mmcv.replace('-', '_')}-{self.mmcv_version}", job_count()
        find_python([str(self.python)], self.stack, True)
        env = dict(os.environ, MMCV_WITH_OPS="1", MAX_JOBS=str(jobs), CXX=compiler())
        # ninja is found through PATH
        env["PATH"] = f"{self.python.parent}{os.pathsep}{env.get('PATH', '')}"
        env["CFLAGS"] = f"{env.get('CFLAGS', CFLAGS)} -g0"
        options = ["--no-deps", "--no-build-isolation"]
        if not (work / name).is_dir():
            shutil.rmtree(work, ignore_errors=True)
            source = ["-q", "--no-binary", self.mmcv, "-d", work]
            self.pip("download", *options, *source, f"{self.mmcv}=={self.mmcv_version}")
            shutil.unpack_archive(str(work / f"{name}.tar.gz"), str(work / "unpacked"))
            (work / "unpacked" / name).rename(work / name)
        cost = "tens of minutes" if cuda else f"about {max(1, round(10 / jobs))} minutes"
        print(f"      compiling its operators, {jobs} files in parallel: {cost}, only once")
        log, dist = self.venv / "build" / "mmcv.log", work / "dist"
        print(f"      log: {log}", flush=True)
        build = [self.python, "-I", "-m", "pip", "wheel", "-v", *options, "-w", dist, work / name]
        run_build(build, env, log)
        return next(dist.glob("*.whl"))

    def install_project(self) -> None:
        """Step 5: install this checkout, editable, and build its kernels if out of date."""
        try:
            compiler()
        except SetupError as error:
            print(f"      without the C++ kernels: {str(error).partition(', but')[0]}")
            os.environ.setdefault("RFA_MMDET_BUILD", "0")
        os.environ.setdefault("RFA_MMDET_BUILD", "1")
        self.pip("install", "-qq", "--no-deps", "--no-build-isolation", "-e", ROOT)

    def stamp(self) -> str:
        """Return a hash of everything the environment depends on; pyvenv.cfg names the Python."""
        files = [ROOT / "setup.py", ROOT / "pyproject.toml", self.venv / "pyvenv.cfg"]
        files += sorted(ROOT.glob("rfa_mmdet/ops/**/csrc/*"))
        parts = [file.read_bytes() if file.exists() else b"" for file in files]
        parts += [self.pins.encode(), str(ROOT).encode()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def is_done(self) -> bool:
        """Return whether the stamp is valid, so there is nothing to do."""
        if self.force or self.wanted or not self.python.exists():
            return False
        file = self.venv / STAMP
        return file.exists() and file.read_text() == self.stamp()

    def run(self) -> None:
        """Run all steps."""
        steps = [
            (f"virtual environment {self.venv}", self.make_venv),
            (f"build tools and torch {self.torch}", self.install_torch),
            ("libraries and test tools", self.install_libraries),
            (f"{self.mmcv} {self.mmcv_version} with operators", self.install_mmcv),
            ("rfa_mmdet, editable", self.install_project),
        ]
        for number, (title, step) in enumerate(steps, 1):
            print(f"[{number}/{len(steps)}] {title} ...", flush=True)
            start = time.monotonic()
            step()
            print(f"      done, {time.monotonic() - start:.1f} s", flush=True)
        examine(self.python)
        (self.venv / STAMP).write_text(self.stamp())


def accept_mmcv(venv: Path) -> None:
    """Let MMYOLO 0.6.0 accept mmcv 2.1, which is newer and works with it."""
    (file,) = venv.glob("lib/python*/site-packages/mmyolo/__init__.py")
    pattern = r"(?m)^mmcv_maximum_version = .*$"
    file.write_text(re.sub(pattern, "mmcv_maximum_version = '2.2.0'", file.read_text()))


def check_cuda(torch: dict) -> None:
    """Raise an error for a CUDA build that cannot succeed, before it starts."""
    if torch["cuda"] is None:
        problem = f"torch {torch['version']} has no CUDA, so mmcv cannot be built with it."
    elif not torch["cuda_home"] or not Path(torch["cuda_home"], "bin", "nvcc").exists():
        problem = (
            f"mmcv's CUDA operators need nvcc: install the CUDA toolkit {torch['cuda']} and "
            "set CUDA_HOME to its folder."
        )
    else:
        return
    instead = "To build only CPU operators: `CUDA_VISIBLE_DEVICES= make env` (FORCE_CUDA unset)."
    raise SetupError(f"{problem}\n{instead}")


def keep(wheel: Path, cache: Path) -> Path:
    """Copy a built wheel to the cache atomically; return its path."""
    temporary = cache / f".{os.getpid()}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, temporary)
        temporary.rename(cache / wheel.name)
    except OSError as error:
        print(f"      not cached for other environments: {error}")
        return wheel
    return cache / wheel.name


def examine(python: str | Path) -> None:
    """Run the doctor on an environment, and raise an error with its output if it finds problems."""
    try:
        done = subprocess.run([str(python), str(DOCTOR)], capture_output=True, text=True)
    except OSError as error:
        raise SetupError(f"{python} does not run: {error.strerror}") from error
    # A bug in this package, in the middle of work on it, is not a problem of the environment.
    found = re.search(r"(?m)^error: (?!rfa_mmdet does not work)", done.stdout)
    if done.returncode and (found or done.stderr):
        raise SetupError(f"{python} cannot train:\n{done.stdout}{done.stderr}".rstrip())
    print(done.stdout[done.stdout.rindex("\n\n") :].strip())


@contextlib.contextmanager
def locked(venv: Path):
    """Hold the environment's lock, so only one set-up works on it at a time."""
    import fcntl  # not on Windows, where this is never reached

    strangers = set(os.listdir(venv)) - {LOCK} if venv.is_dir() else set()
    if strangers and not (venv / "pyvenv.cfg").exists():
        raise SetupError(f"{venv} is not a virtual environment; remove it or choose another --venv")
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another set-up of this environment", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_up(setup: Setup) -> None:
    """Create or update the environment."""
    if not setup.is_done():
        setup.choose_python()
        with locked(setup.venv):
            if not setup.is_done():  # the other set-up may have finished it
                setup.run()
    print(f"{setup.venv} is up to date")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Create a virtual environment with torch, mmcv with compiled operators, mmdet, "
        "the test tools and this checkout.",
        epilog="example: python3 tools/setup_env.py --venv ~/envs/rfa --python python3.12",
    )
    add = parser.add_argument
    add("--stack", choices=STACKS, default="current", help="packages to install (default: current)")
    text = "folder of the environment (default: .venv or .venv-STACK in the checkout)"
    add("--venv", metavar="PATH", help=text)
    add("--python", metavar="PATH", help="Python to create it with; must be supported by the stack")
    add("--force", action="store_true", help="check every step, even if all seems up to date")
    add("--check", metavar="PATH", help="install nothing; only check this Python's packages")
    args = parser.parse_args(argv)
    if args.check and (args.venv or args.python or args.force):
        parser.error("--check cannot be combined with other options")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    try:
        if args.check:
            examine(args.check)
            return 0
        if not sys.platform.startswith("linux"):
            raise SetupError(f"only Linux is supported, not {sys.platform}")
        for name in ("PYTHONPATH", "PYTHONHOME"):  # they would add packages to the environment
            os.environ.pop(name, None)
        # a plain kill must also stop the compilers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        name = ".venv" if args.stack == "current" else f".venv-{args.stack}"
        venv = Path(args.venv).expanduser().absolute() if args.venv else ROOT / name
        set_up(Setup(venv, args.python, args.force, args.stack))
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run it again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
