"""Build steps of rfa_mmdet; see pyproject.toml for everything else.

The C++ kernels (csrc) are optional: if torch is not installed or the compiler fails, the package is
installed without them, with a notice. ``RFA_MMDET_BUILD=1`` turns that into an error,
``RFA_MMDET_BUILD=0`` skips the build.
"""

import hashlib
import os
import platform
import runpy
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

FOLDER = Path("rfa_mmdet/ops/receptive_field")
digest = runpy.run_path(str(FOLDER / "sources.py"))["digest"]
KERNELS = ("kernels.cpp", "gated.cpp")
# Named after torch.backends.cpu.get_cpu_capability(): torch's headers select the vector types by
# capability.
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mf16c"),
    ],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
CAPABILITIES = {"default": [], **(X86_FLAGS if X86 else {})}


class BuildKernels(build_ext):
    """Compile the kernels for each CPU capability, and link each with the bindings."""

    def run(self):
        """Build the kernels; in place, only if they are out of date."""
        choice = os.environ.get("RFA_MMDET_BUILD")
        if choice == "0":
            return
        libraries: list[Path] = []
        try:
            if not self.inplace:
                super().run()
                return
            libraries = [FOLDER / self.get_ext_filename(f"_cpu_{name}") for name in CAPABILITIES]
            stamp, state = libraries[0].with_suffix(".stamp"), self.state()
            built = all(library.exists() for library in libraries)
            if built and stamp.exists() and stamp.read_text() == state:
                return
            # Invalidate the stamp, so that libraries of an interrupted build are never loaded.
            stamp.write_text("")
            super().run()
            stamp.write_text(state)
        except Exception as error:
            if choice == "1":
                raise
            reason = f"{type(error).__name__}: {error}"
            print(f"rfa_mmdet: installing without C++ kernels, because the build failed ({reason})")
            # Libraries of an earlier build would not match the sources.
            for library in libraries:
                library.unlink(missing_ok=True)

    def get_ext_filename(self, fullname):
        """Name a library after its torch, so one checkout works in several environments."""
        try:
            version = self.find_torch().__version__
        except ImportError:
            return super().get_ext_filename(fullname)
        return os.path.join(*fullname.split(".")) + f".torch-{version}.so"

    @classmethod
    def state(cls):
        """Return hashes of everything the libraries depend on: the sources, then the rest."""
        parts = [cls.find_torch().__version__, str(cls.flags()), str(CAPABILITIES)]
        rest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return f"{digest(FOLDER / 'csrc')} {rest}"

    @staticmethod
    def find_torch():
        """Return the torch to build for; imported lazily, because it is optional and slow."""
        if find_spec("torch") is None:
            # pip hides installed packages from builds (PEP 517), but we need the installed torch.
            sys.path.append(sysconfig.get_path("purelib"))
        import torch

        return torch

    @classmethod
    def flags(cls):
        """Return the compiler flags for all files."""
        # Do not link OpenMP: torch has already loaded a library, maybe under another name, and a
        # second one would have its own threads.
        return [*("-std=c++17", "-O3", "-g0", "-fopenmp", "-fno-math-errno"),
                *("-fno-trapping-math", "-fvisibility=hidden", "-w"),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(cls.find_torch().compiled_with_cxx11_abi())}",
                *cls.extra_flags()]  # fmt: skip

    def build_extensions(self):
        """Compile the bindings once, then one library per capability."""
        if not sys.platform.startswith("linux"):
            raise RuntimeError(f"only Linux is supported, not {sys.platform}")
        # torch.utils.cpp_extension cannot be used: it fails to import if setuptools is much older
        # or newer than torch.
        torch = Path(self.find_torch().__file__).parent
        headers = [torch / "include", torch / "include/torch/csrc/api/include"]
        csrc, flags = FOLDER / "csrc", self.flags()
        targets = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        jobs = [(csrc / "bindings.cpp", "bindings", [])]
        objects = {"bindings": []}
        for name, options in CAPABILITIES.items():
            upper = name.upper()
            options = [*options, f"-DCPU_CAPABILITY={upper}", f"-DCPU_CAPABILITY_{upper}"]
            jobs += [(csrc / file, name, options) for file in KERNELS]
            objects[name] = []

        def compile_one(job):
            source, name, options = job
            objects[name] += self.compiler.compile(
                [str(source)],
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=[str(folder) for folder in headers],
                extra_postargs=[*flags, *options],
            )

        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(len(jobs), len(os.sched_getaffinity(0)))) as pool:
            list(pool.map(compile_one, jobs))
        for ext, target in zip(self.extensions, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(
                [*objects["bindings"], *objects[ext.name.rpartition("_")[2]]],
                str(target),
                libraries=["c10", "torch", "torch_cpu"],
                library_dirs=[str(torch / "lib")],
                extra_postargs=self.extra_flags(),
            )

    @staticmethod
    def extra_flags():
        """Return the user's own flags, for compiling and linking."""
        return os.environ.get("RFA_MMDET_CXXFLAGS", "").split()


class BuildPackage(build_py):
    """Put the files that mim needs into rfa_mmdet/.mim: copies in a wheel, links in a checkout."""

    SHIPPED = ("configs", "tools", "model-index.yml", "requirements")
    CHECKOUT_ONLY = ("setup_env.py", "doctor.py", "demo.py", "__pycache__", "*.pyc")

    def run(self):
        """Build the package, then add these files."""
        super().run()
        target = Path("." if self.editable_mode else self.build_lib) / "rfa_mmdet" / ".mim"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in self.SHIPPED:
            if self.editable_mode:
                (target / name).symlink_to(Path("..", "..", name))
            elif Path(name).is_dir():
                ignored = shutil.ignore_patterns(*self.CHECKOUT_ONLY)
                shutil.copytree(name, target / name, ignore=ignored)
            else:
                shutil.copyfile(name, target / name)


setup(
    license="Apache-2.0",
    ext_modules=[
        Extension(
            f"rfa_mmdet.ops.receptive_field._cpu_{name}",
            [str(FOLDER / "csrc" / file) for file in KERNELS],
        )
        for name in CAPABILITIES
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
)
