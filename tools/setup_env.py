#!/usr/bin/env python3
"""Create the project's virtual environment, with mmcv's operators compiled for it.

Runs on any Python 3.8 or later with nothing installed. Every step first looks whether its result
is already there, so running it again continues where it broke off, and costs nothing once a
stamp says that all is done. ``requirements.txt`` holds the versions.
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
PYTHONS = ((3, 10), (3, 11), (3, 12))
BUILD_TOOLS = ("pip", "setuptools", "wheel", "ninja", "psutil")
LOCK, STAMP = ".setup_env.lock", ".setup_env.stamp"
GB_PER_JOB = 2  # what compiling one file against torch's headers takes at its peak
# Setting CFLAGS replaces Python's own flags, optimisation included, so that is given again; -g0,
# added to them, halves the time: 8.5 s instead of 15.9 s for roi_align.cpp.
CFLAGS = "-O3 -DNDEBUG -fwrapv"
STACK = ("torch", "cv2", "mmengine", "mmcv.ops", "mmdet", "rfa_mmdet")
APT_GL = "OpenCV lacks a system library: apt install libgl1 libglib2.0-0"

# Code for the environment's own Python; what it prints is read back.
ASK_PYTHON = """
import importlib.util, json, os, sys, sysconfig
print(json.dumps({
    "version": sys.version_info[:3],
    "ensurepip": bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")),
    "headers": os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")),
}))"""
ASK_PACKAGES = """
import importlib.metadata, json
print(json.dumps({(d.metadata["Name"] or "").lower().replace("_", "-"): d.version
                  for d in importlib.metadata.distributions()}))"""
ASK_TORCH = """
import json, torch
from torch.utils.cpp_extension import CUDA_HOME
cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "cuda_home": CUDA_HOME,
    "archs": sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in cards}),
}))"""
ASK_MMCV = """
import json, mmcv, mmcv.ops
print(json.dumps([mmcv.__version__, mmcv.ops.get_compiling_cuda_version()]))"""
# The name is printed before the import, so that a failure shows which one it was. rfa_mmdet is
# only looked up: a slip in it, in the middle of work on it, is no fault of the environment.
ASK_IMPORTS = """
import importlib, importlib.util, sys
for name in sys.argv[1:]:
    print(name, end=" ", flush=True)
    if not importlib.util.find_spec(name):
        raise ImportError("not found")
    if name != "rfa_mmdet":
        importlib.import_module(name)
        print(sys.modules[name.split(".")[0]].__version__, end=", ")
print()"""


class SetupError(Exception):
    """What went wrong and how to mend it, for the user."""


def read_pins(text: str, python: tuple[int, int]) -> dict[str, str]:
    """Read the ``name==version`` lines that hold for one Python.

    Args:
        text: Content of a requirements file.
        python: Major and minor version of the Python.

    Returns:
        Version by name, in the order of the file.
    """
    form = r'([\w.-]+)==([^\s;]+)(?:\s*;\s*python_version\s*(<|>=)\s*"3\.(\d+)")?'
    pins = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(form, line)
        if not found:
            raise SetupError(f"requirements.txt, line {number}: cannot read {line!r}")
        name, version, sign, minor = found.groups()
        if sign is None or (python[1] < int(minor)) == (sign == "<"):
            pins[name] = version
    return pins


def ask(python: str | Path, code: str, *args: str, isolated: bool = True) -> str:
    """Run code in another Python and return what it printed."""
    command = [str(python), *(["-I"] if isolated else []), "-W", "ignore", "-c", code, *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SetupError(f"{python} does not run: {error.strerror}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SetupError(f"{done.stdout}{last}")
    return done.stdout


def run(command: list, what: str) -> None:
    """Run a command with its output on the terminal."""
    code = subprocess.run([str(part) for part in command]).returncode
    if code:
        raise SetupError(f"{what} failed (exit status {code}); what it said stands above")


def compiler() -> str:
    """Return the C++ compiler's command."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    tried = os.environ.get("CXX") or "c++, g++, clang++"
    raise SetupError(
        f"no C++ compiler ({tried}), and mmcv's operators must be compiled: apt install g++"
    )


def has_compiler() -> bool:
    """Tell whether there is one; not needed for mmcv where a built wheel of it is kept."""
    try:
        compiler()
    except SetupError as error:
        print(f"      without the C++ kernels: {str(error).partition(',')[0]}")
        return False
    return True


def python_candidates() -> list[str]:
    """Return this Python and those on PATH; more than one may bear the same name there."""
    names = ("python3.12", "python3.11", "python3.10", "python3")
    folders = os.environ.get("PATH", "").split(os.pathsep)
    paths = [os.path.join(folder, name) for name in names for folder in folders if folder]
    return [sys.executable, *filter(os.path.exists, paths)]


def find_python(candidates: list[str], will_compile: bool) -> tuple[str, tuple[int, int]]:
    """Choose the first Python that serves.

    Args:
        candidates: Paths or names.
        will_compile: Whether Python's C headers are needed.

    Returns:
        The choice, and its major and minor version.
    """
    found, lacking = [], []
    for python in candidates:
        try:
            facts = json.loads(ask(python, ASK_PYTHON))
        except (SetupError, ValueError):  # a shim of pyenv, for one, may stand for nothing
            found.append(f"{python} (does not run)")
            continue
        version = tuple(facts["version"][:2])
        if version not in PYTHONS:
            found.append(f"{python} ({version[0]}.{version[1]})")
        elif not facts["ensurepip"]:
            lacking.append(f"{python} lacks venv and ensurepip: apt install python3-venv")
        elif will_compile and not facts["headers"]:
            lacking.append(f"{python} lacks the header Python.h: apt install python3-dev")
        else:
            return python, version
    if lacking:
        raise SetupError(lacking[0])
    found = ", ".join(dict.fromkeys(found))
    raise SetupError(f"Python 3.10, 3.11 or 3.12 is needed; found {found}")


def cache_root() -> Path:
    """Return the folder that keeps built wheels beyond the life of one environment."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rfa_mmdet" / "wheels"


def job_count() -> int:
    """Return how many files to compile at once, by processors and free memory."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdigit() or int(wanted) < 1:
            raise SetupError(f"MAX_JOBS must be a number above 0, not {wanted!r}")
        return int(wanted)
    free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    by_memory = int(free.group(1)) // (GB_PER_JOB << 20) if free else 1
    return max(1, min(len(os.sched_getaffinity(0)), by_memory))


def parse_progress(line: str) -> tuple[int, int] | None:
    """Read ninja's count of finished and total files off a line of its output."""
    found = re.match(r"\s*\[(\d+)/(\d+)\] ", line)
    return (int(found.group(1)), int(found.group(2))) if found else None


def show_progress(lines, out, clock=time.monotonic) -> None:
    """Turn a build's output into a bar, or into a few lines where there is no terminal.

    Args:
        lines: The build's lines of output.
        out: Where to write.
        clock: Gives the time in seconds.
    """
    start = last_time = clock()
    last_done = 0
    for line in lines:
        count = parse_progress(line)
        if not count:
            continue
        (done, total), now = count, clock()
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
    """Return the last lines of a log that tell of errors, or else just its last lines."""
    lines = text.splitlines()
    bad = [x for x in lines if re.search(r"\berror:|Error\b|FAILED|[Kk]illed", x)]
    return "\n".join(x.strip()[:200] for x in (bad or lines)[-count:])


def run_build(command: list, env: dict[str, str], log: Path) -> None:
    """Run mmcv's build with its output in a log and its progress on the terminal."""

    def copied(lines, file):
        for line in lines:
            file.write(line)
            yield line

    # A session of its own, so that an interruption ends the compilers too, and not pip alone.
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
        raise SetupError(f"mmcv did not build (whole log: {log}). Its errors:\n{errors}")


class Setup:
    """The steps that fill one environment.

    Args:
        venv: Folder of the environment.
        wanted: The user's choice of Python, or None.
        force: Whether to go through the steps though the stamp holds.
    """

    def __init__(self, venv: Path, wanted: str | None, force: bool):
        self.venv, self.wanted, self.force = venv, wanted, force
        self.python = venv / "bin" / "python"
        self.requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")

    def choose_python(self) -> None:
        """Settle the Python, and find what a build would lack before anything slow."""
        pins = read_pins(self.requirements, PYTHONS[-1])
        built = any(cache_root().glob(f"{pins['mmcv']}-{pins['torch']}*"))
        built = built or any(self.venv.glob("lib/python*/site-packages/mmcv-*.dist-info"))
        if not built:
            compiler()
        wanted = [self.wanted] if self.wanted else python_candidates()
        if os.path.lexists(self.python):
            try:
                self.base, self.version = find_python([str(self.python)], not built)
            except SetupError as error:
                raise SetupError(f"{error}; remove {self.venv} or choose another --venv") from None
            if self.wanted and find_python(wanted, False)[1] != self.version:
                have = "{}.{}".format(*self.version)
                raise SetupError(f"{self.venv} has Python {have}, {self.wanted} is another version")
        else:
            self.base, self.version = find_python(wanted, not built)
        self.pins = read_pins(self.requirements, self.version)

    def packages(self) -> dict[str, str]:
        """Return the versions of the packages in the environment."""
        return json.loads(ask(self.python, ASK_PACKAGES))

    def pip_install(self, names: list[str], *options: str) -> bool:
        """Install pinned packages unless all are there; a local version (+cpu) is as good."""
        have = self.packages()
        if all(have.get(name, "").split("+")[0] == self.pins[name] for name in names):
            return False
        pins = [f"{name}=={self.pins[name]}" for name in names]
        run([self.python, "-I", "-m", "pip", "install", *options, *pins], "pip install")
        return True

    def make_venv(self) -> bool:
        """Step 1: an environment with pip."""
        if self.python.exists() and "pip" in self.packages():
            return False
        run([self.base, "-m", "venv", self.venv], "making the virtual environment")
        return True

    def install_torch(self) -> bool:
        """Step 2: torch, and the tools that build mmcv against it."""
        tools = self.pip_install(list(BUILD_TOOLS), "-q")
        return self.pip_install(["torch"]) or tools

    def install_libraries(self) -> bool:
        """Step 3: the rest; before mmcv, which does not import without some of them."""
        names = [n for n in self.pins if n not in (*BUILD_TOOLS, "torch", "mmcv")]
        worked = self.pip_install(names, "-q")
        check(self.python, ("torch", "cv2"))
        return worked

    def install_mmcv(self) -> bool:
        """Step 4: mmcv with compiled operators, from the cache or built now."""
        torch = json.loads(ask(self.python, ASK_TORCH))
        cuda = bool(torch["archs"]) or os.environ.get("FORCE_CUDA") == "1"
        if self.mmcv_problem(cuda) is None:
            return False
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "+".join(torch["archs"]) or "all"
        kind = "cuda" + re.sub(r"[^\w.+]+", "_", archs) if cuda else "cpu"
        tag = "cp{}{}".format(*self.version)
        key = f"{self.pins['mmcv']}-{torch['version']}-{tag}-{kind}"
        # Keyed by torch too: mmcv built against another torch does not load. pip's own cache
        # knows mmcv's version only.
        cache = cache_root() / key
        for wheel in cache.glob("mmcv-*.whl"):
            print(f"      from {cache}", flush=True)
            problem = self.install_wheel(wheel, cuda)
            if problem is None:
                return True
            print(f"      that one does not work ({problem}); building it again", flush=True)
            shutil.rmtree(cache)
        self.check_cuda(cuda, torch)
        work = self.venv / "build" / key
        wheel = keep(self.build_wheel(work, cuda), cache)
        problem = self.install_wheel(wheel, cuda)
        shutil.rmtree(work)
        if problem is not None:
            shutil.rmtree(cache, ignore_errors=True)
            raise SetupError(f"mmcv was built, but does not work: {problem}")
        return True

    def mmcv_problem(self, cuda: bool) -> str | None:
        """Return what is wrong with the environment's mmcv, or None."""
        try:
            version, built_for = json.loads(ask(self.python, ASK_MMCV))
        except SetupError as error:
            return str(error)
        if version != self.pins["mmcv"]:
            return f"it is version {version}"
        return "it has no CUDA operators" if cuda and built_for == "not available" else None

    def install_wheel(self, wheel: Path, cuda: bool) -> str | None:
        """Install a built mmcv; return what is wrong with it, or None."""
        options = ["-q", "--no-deps", "--force-reinstall", "--no-index"]
        try:
            run([self.python, "-I", "-m", "pip", "install", *options, wheel], "pip install")
        except SetupError as error:
            return str(error)
        return self.mmcv_problem(cuda)

    def check_cuda(self, cuda: bool, torch: dict) -> None:
        """Refuse a CUDA build that could not succeed, before it starts."""
        if not cuda:
            return
        instead = "\n`CUDA_VISIBLE_DEVICES= make env` (FORCE_CUDA unset) builds CPU operators only."
        if torch["cuda"] is None:
            raise SetupError(
                f"torch {torch['version']} has no CUDA, so mmcv can have none either." + instead
            )
        if not torch["cuda_home"] or not Path(torch["cuda_home"], "bin", "nvcc").exists():
            raise SetupError(
                f"mmcv's CUDA operators need nvcc: install the CUDA toolkit {torch['cuda']} and "
                "set CUDA_HOME to its folder." + instead
            )

    def build_wheel(self, work: Path, cuda: bool) -> Path:
        """Build mmcv's wheel in a tree that stays, so that ninja can continue a broken-off build.

        Args:
            work: Folder for the tree; one for each kind of build, as setuptools would take an
                operator library linked against another torch for up to date.
            cuda: Whether CUDA operators are compiled, for the estimate.

        Returns:
            The wheel.
        """
        name = f"mmcv-{self.pins['mmcv']}"
        env = dict(os.environ, MMCV_WITH_OPS="1", MAX_JOBS=str(job_count()), CXX=compiler())
        # ninja is found through PATH
        env["PATH"] = f"{self.python.parent}{os.pathsep}{env.get('PATH', '')}"
        env["CFLAGS"] = f"{env.get('CFLAGS', CFLAGS)} -g0"
        pip = [self.python, "-I", "-m", "pip"]
        options = ["--no-deps", "--no-build-isolation"]
        if not (work / name).is_dir():
            shutil.rmtree(work, ignore_errors=True)
            source = ["-q", "--no-binary", "mmcv", "-d", work, name.replace("-", "==")]
            run([*pip, "download", *options, *source], "downloading mmcv's source")
            shutil.unpack_archive(str(work / f"{name}.tar.gz"), str(work / "unpacked"))
            (work / "unpacked" / name).rename(work / name)
        jobs = int(env["MAX_JOBS"])
        cost = "tens of minutes" if cuda else f"about {max(1, round(10 / jobs))} minutes"
        print(f"      compiling its operators, {jobs} files at once: {cost}; happens once")
        log = self.venv / "build" / "mmcv.log"
        print(f"      log: {log}", flush=True)
        dist = work / "dist"
        run_build([*pip, "wheel", "-v", *options, "-w", dist, work / name], env, log)
        return next(dist.glob("mmcv-*.whl"))

    def install_project(self) -> bool:
        """Step 5: this checkout, editable, done whenever the stamp is off.

        Its C++ kernels take a minute where they are not up to date, which its setup.py finds out.
        """
        options = ["-qq", "--no-deps", "--no-build-isolation", "-e", ROOT]
        if "RFA_MMDET_BUILD" not in os.environ:
            os.environ["RFA_MMDET_BUILD"] = "1" if has_compiler() else "0"
        run([self.python, "-I", "-m", "pip", "install", *options], "installing the project")
        return True

    def stamp(self) -> str:
        """Return what the environment was made from, as a hash; pyvenv.cfg names the Python."""
        parts = [self.requirements.encode(), (ROOT / "setup.py").read_bytes(), str(ROOT).encode()]
        parts += [file.read_bytes() for file in sorted(ROOT.glob("rfa_mmdet/ops/**/csrc/*"))]
        config = self.venv / "pyvenv.cfg"
        parts.append(config.read_bytes() if config.exists() else b"")
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    def is_done(self) -> bool:
        """Tell by the stamp alone whether there is nothing to do."""
        if self.force or self.wanted or not self.python.exists():
            return False
        file = self.venv / STAMP
        return file.exists() and file.read_text() == self.stamp()

    def run(self) -> None:
        """Go through the steps."""
        steps = [
            (f"virtual environment {self.venv}", self.make_venv),
            (f"build tools and torch {self.pins['torch']}", self.install_torch),
            ("libraries and test tools", self.install_libraries),
            (f"mmcv {self.pins['mmcv']} with its operators", self.install_mmcv),
            ("rfa_mmdet itself, editable", self.install_project),
        ]
        for number, (title, step) in enumerate(steps, 1):
            print(f"[{number}/{len(steps)}] {title} ...", flush=True)
            start = time.monotonic()
            word = "done" if step() else "already there"
            print(f"      {word}, {time.monotonic() - start:.1f} s", flush=True)
        print(check(self.python, STACK), end="")
        (self.venv / STAMP).write_text(self.stamp())


def keep(wheel: Path, cache: Path) -> Path:
    """Put a built wheel into the cache, at once or not at all; return where it is now."""
    temporary = cache / f".{os.getpid()}.part"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(wheel, temporary)
        temporary.rename(cache / wheel.name)
    except OSError as error:
        print(f"      not kept for the next environment: {error}")
        return wheel
    return cache / wheel.name


def check(python: str | Path, names: tuple[str, ...], isolated: bool = True) -> str:
    """Import packages in an environment; return a line with the version of each."""
    try:
        return ask(python, ASK_IMPORTS, *names, isolated=isolated)
    except SetupError as error:
        hint = f"\n{APT_GL}" if re.search("libGL|libgthread|libglib", str(error)) else ""
        raise SetupError(f"{python} cannot import {error}{hint}") from None


def check_foreign(python: str) -> None:
    """Check an environment that was made by other means than this script."""
    try:
        print(check(python, STACK, isolated=False), end="")
    except SetupError as error:
        raise SetupError(
            f"{error}\nIt needs torch, mmcv 2.1 with compiled operators, mmengine and mmdet 3.3; "
            "`make env` without PYTHON= makes an environment that has them."
        ) from None


@contextlib.contextmanager
def locked(venv: Path):
    """Hold the environment's lock, so that two set-ups do not work on it at once."""
    import fcntl  # not on Windows, where this is never reached

    strangers = set(os.listdir(venv)) - {LOCK} if venv.is_dir() else set()
    if strangers and not (venv / "pyvenv.cfg").exists():
        raise SetupError(f"{venv} is no virtual environment; remove it or choose another --venv")
    venv.mkdir(parents=True, exist_ok=True)
    with (venv / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another set-up is running in this environment, waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_up(setup: Setup) -> None:
    """Bring the environment up to date."""
    if not setup.is_done():
        setup.choose_python()
        with locked(setup.venv):
            if not setup.is_done():  # whoever held the lock may have done it all
                setup.run()
    print(f"{setup.venv} is up to date")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Create the virtual environment with everything in it: torch, mmcv with "
        "compiled operators, mmdet, the test tools and this checkout.",
        epilog="example: python3 tools/setup_env.py --venv ~/envs/rfa --python python3.12",
    )
    add = parser.add_argument
    add("--venv", metavar="PATH", help="folder of the environment (default: .venv in the checkout)")
    add("--python", metavar="PATH", help="Python 3.10, 3.11 or 3.12 to make it with")
    add("--force", action="store_true", help="check every step, also when all seems up to date")
    add("--check", metavar="PATH", help="install nothing; check that this Python has the stack")
    args = parser.parse_args(argv)
    if args.check and (args.venv or args.python or args.force):
        parser.error("--check goes with no other option")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse_args(argv)
    try:
        if args.check:
            check_foreign(args.check)
            return 0
        if not sys.platform.startswith("linux"):
            raise SetupError(f"this sets up Linux only, and here is {sys.platform}")
        for name in ("PYTHONPATH", "PYTHONHOME"):  # would mix other packages into the environment
            os.environ.pop(name, None)
        # a plain kill, too, must end the compilers
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        venv = Path(args.venv).expanduser().absolute() if args.venv else ROOT / ".venv"
        set_up(Setup(venv, args.python, args.force))
    except (SetupError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; running it again continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
