"""Packaging of rfa_mmdet.

torch and mmcv are needed but not listed: which build of them is right (CPU or CUDA, with or
without compiled ops) is the machine's matter. ``make env`` installs tested versions of both.

The C++ kernels (csrc) are optional: they are built where the interpreter that installs has
torch and a C++ compiler works, and else left out with a notice.
``RFA_MMDET_BUILD=1`` makes that an error, ``RFA_MMDET_BUILD=0`` builds none.
"""

import hashlib
import os
import platform
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("rfa_mmdet/ops/receptive_field")
KERNELS = ("kernels.cpp", "gated.cpp")
# The names are those of torch.backends.cpu.get_cpu_capability(): torch's headers give the vectors
# of the capability that they are compiled for.
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
    """Compile the kernels for each capability, and link each with the bindings."""

    def run(self):
        """Build what can be built; in place, what is not there already."""
        wish = os.environ.get("RFA_MMDET_BUILD")
        if wish == "0":
            return
        stamp = FOLDER / "_cpu.stamp"
        try:
            state = self.inplace and self.state()
            built = all(any(FOLDER.glob(f"_cpu_{name}.*so")) for name in CAPABILITIES)
            if state and built and stamp.exists() and stamp.read_text() == state:
                return
            stamp.unlink(missing_ok=True)
            super().run()
            if state:
                stamp.write_text(state)
        except Exception as error:
            if wish == "1":
                raise
            reason = f"{type(error).__name__}: {error}"
            print(f"rfa_mmdet: without its C++ kernels, as they do not build ({reason})")
            # A library of an earlier build would not be what this one's sources say.
            for name in CAPABILITIES:
                for file in FOLDER.glob(f"_cpu_{name}.*so"):
                    file.unlink()

    @classmethod
    def state(cls):
        """Return what the libraries are made from, as a hash."""
        torch = cls.find_torch()
        parts = [torch.__version__, str(cls.flags()), str(CAPABILITIES), sys.executable]
        files = [file.read_bytes() for file in sorted((FOLDER / "csrc").iterdir())]
        return hashlib.sha256(b"\0".join([*files, *(p.encode() for p in parts)])).hexdigest()

    @staticmethod
    def find_torch():
        """Return the torch that the libraries are for; an optional part, and slow to import."""
        if find_spec("torch") is None:
            # pip hides what is installed from a build (PEP 517); the kernels are for that torch.
            sys.path.append(sysconfig.get_path("purelib"))
        import torch

        return torch

    @classmethod
    def flags(cls):
        """Return the compiler's flags for every file."""
        # OpenMP's library is not linked: torch has loaded one, maybe under another name, and a
        # second one would have threads of its own.
        return [*("-std=c++20", "-O3", "-g0", "-fopenmp", "-fno-math-errno"),
                *("-fno-trapping-math", "-fvisibility=hidden", "-w"),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(cls.find_torch().compiled_with_cxx11_abi())}",
                *cls.extra_flags()]  # fmt: skip

    def build_extensions(self):
        """Compile the bindings once for all, then one library for each capability."""
        if not sys.platform.startswith("linux"):
            raise RuntimeError(f"they are for Linux, and here is {sys.platform}")
        self.find_torch()
        from torch.utils.cpp_extension import include_paths, library_paths

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
                include_dirs=include_paths(),
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
                library_dirs=library_paths(),
                extra_postargs=self.extra_flags(),
            )

    @staticmethod
    def extra_flags():
        """Return the user's own, for both compiling and linking."""
        return os.environ.get("RFA_MMDET_CXXFLAGS", "").split()


setup(
    name="rfa_mmdet",
    version="0.1.0",
    description="Receptive-field attention convolutions and attention plug-ins for MMDetection 3.x",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["rfa_mmdet", "rfa_mmdet.*"]),
    package_data={
        "rfa_mmdet.ops.receptive_field": ["csrc/*"],
        "rfa_mmdet.studies": ["report.html"],
    },
    ext_modules=[
        Extension(
            f"rfa_mmdet.ops.receptive_field._cpu_{name}",
            [str(FOLDER / "csrc" / file) for file in KERNELS],
        )
        for name in CAPABILITIES
    ],
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "mmengine>=0.10.5,<0.11",
        "mmdet>=3.3,<3.4",
        "jinja2",
        "matplotlib",
        "numpy",
        "pandas",
        "rich",
        "scipy",
    ],
)
