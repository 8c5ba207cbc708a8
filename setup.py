"""Builds pytrain's binaries: the kernel library (LibTorch stable ABI, no Python in it), a small pybind11 module, and
where there is an nvcc the library of CUDA kernels (tools/cuda_build.py).

PYTRAIN_NO_NATIVE=1 builds pure Python, and so does a machine without a C++ compiler; CXX picks the compiler.
PYTRAIN_CUDA=0 leaves out CUDA, 1 demands it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from subprocess import CalledProcessError

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_build  # noqa: E402

KERNEL_LIBRARY = "pytrain._kernels"
KERNEL_SOURCES = [
    "csrc/core/layout.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/kernels_baseline.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/ops/tensor.cpp",
    "csrc/ops/device.cpp",
    "csrc/ops/fit.cpp",
    "csrc/ops/table.cpp",
    "csrc/ops/gather.cpp",
    "csrc/ops/optim.cpp",
    "csrc/ops/adafactor.cpp",
    "csrc/ops/settle.cpp",
    "csrc/ops/step.cpp",
    "csrc/ops/copy.cpp",
]
BIND_MODULE = "pytrain._C"
BIND_SOURCES = ["csrc/bind.cpp", "csrc/core/layout.cpp", "csrc/cpu/isa.cpp"]
CUDA_LIBRARY = "pytrain._kernels_cuda"
WITHOUT_ABI_TAG = {name.split(".")[-1] for name in (KERNEL_LIBRARY, CUDA_LIBRARY)}  # one file for every Python
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))

TORCH_HEADERS = (2, 13)  # the oldest torch to build on
TORCH_TARGET_VERSION = (
    "0x020A000000000000"  # the oldest torch to run under, 2.10: major and minor in the two high bytes
)

COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fno-math-errno",  # without it half of the loops stay scalar
    "-fno-trapping-math",  # the same for loops that choose between two results; no result changes
    "-ffp-contract=off",  # the same bits on every instruction set
    "-fno-lto",  # a distribution's Python may ask for it; functions of one instruction set must not move to another
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    f"-ffile-prefix-map={ROOT}/=",  # messages name csrc/..., not a folder of the machine that built it
    "-Wall",
    "-Wextra",
]
KERNEL_LINK_FLAGS = ["-Wl,--as-needed", "-Wl,--no-undefined"] if sys.platform == "linux" else []

REASON_FILE = "_build_reason.txt"
CUDA_REASON_FILE = "_cuda_reason.txt"
BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}


def find_compiler() -> str | None:
    """Return the C++ compiler command: $CXX if set, else the first of c++, g++, clang++ on PATH, else None."""
    wanted = os.environ.get("CXX")
    if wanted:
        if shutil.which(shlex.split(wanted)[0]) is None:
            raise SystemExit(f"pytrain: CXX is {wanted!r}, which is not an executable on PATH; unset it or correct it")
        return wanted
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def pure_python_reason() -> str | None:
    """Return why no native code is to be built, or None if it is."""
    if os.environ.get("PYTRAIN_NO_NATIVE", "0") not in ("", "0"):
        return "PYTRAIN_NO_NATIVE=1 was set when pytrain was built"
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found when pytrain was built (CXX is not set; no c++, g++ or clang++ on PATH)"
    os.environ["CXX"] = compiler  # read by torch's BuildExtension (to compile) and by setuptools (to link)
    return None


def settle(package: Path) -> None:
    """Leave in the package why something was not built, and no binaries of an earlier build of it; or no reason."""
    for name, reason, binaries in (
        (REASON_FILE, PURE_REASON, "*.so"),
        (CUDA_REASON_FILE, CUDA_REASON, "_kernels_cuda.so"),
    ):
        (package / name).unlink(missing_ok=True)
        if reason:
            for binary in package.glob(binaries):
                binary.unlink()
            (package / name).write_text(reason + "\n", encoding="utf-8")


class BuildPy(build_py):
    """Copies the Python files and settles the package."""

    def run(self) -> None:
        super().run()
        settle(Path("pytrain") if self.editable_mode else Path(self.build_lib, "pytrain"))


class BuildPure(build_ext):
    """`setup.py build_ext --inplace` where nothing is to be compiled."""

    def run(self) -> None:
        settle(Path("pytrain"))


def native_build() -> tuple[list[Extension], type[Command]]:
    """Return the extensions, and the build_ext command (torch's, through ninja where it is installed) for them."""
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"pytrain: building the native kernels needs the Python package {error.name!r}, which is not installed.\n"
            "Build with isolation (`pip install .`, which brings it along), or install the build requirements first"
            " (`pip install 'setuptools>=77.0.3' pybind11 ninja 'torch>=2.13'`), or set PYTRAIN_NO_NATIVE=1:"
            " that builds pure Python."
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_HEADERS:
        floor = ".".join(map(str, TORCH_HEADERS))
        raise SystemExit(
            f"pytrain: building the native kernels needs torch >= {floor}, this is {torch.__version__}.\n"
            "Build with isolation (`pip install .`): it brings a torch to build on, and the result runs under this one."
        )

    class BuildNative(cpp_extension.BuildExtension):
        def get_ext_filename(self, ext_name: str) -> str:
            if ext_name.split(".")[-1] in WITHOUT_ABI_TAG:
                return ext_name.replace(".", os.sep) + ".so"
            return str(super().get_ext_filename(ext_name))

        def run(self) -> None:
            super().run()
            if self.inplace:
                settle(Path("pytrain"))

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (CompileError, LinkError, CalledProcessError, RuntimeError) as error:
                raise SystemExit(
                    f"pytrain: compiling with {os.environ['CXX']} failed (its messages stand above): {error}\n"
                    "Hint: PYTRAIN_NO_NATIVE=1 builds pytrain without native kernels."
                ) from error

        def build_extension(self, ext: Extension) -> None:
            if ext.name != CUDA_LIBRARY:
                return super().build_extension(ext)
            target, objects = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp, "cuda")
            cuda_build.compile_library(TOOLKIT, target, objects, torch_folders, cpp_extension.library_paths())

    torch_folders = cpp_extension.include_paths()
    torch_includes = [f"-isystem{path}" for path in torch_folders]
    torch_includes += [f"-ffile-prefix-map={path}/=" for path in torch_folders]
    kernels = Extension(
        KERNEL_LIBRARY,
        sources=KERNEL_SOURCES,
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args=COMPILE_FLAGS + torch_includes,
        extra_link_args=KERNEL_LINK_FLAGS,
        language="c++",
    )
    bind = Extension(
        BIND_MODULE,
        sources=BIND_SOURCES,
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        # Of torch's headers this takes only C structs (DLPack): nothing to link.
        extra_compile_args=[*COMPILE_FLAGS, f"-isystem{pybind11.get_include()}", *torch_includes],
        language="c++",
    )
    extensions = [kernels, bind]
    if TOOLKIT:  # no sources: torch would look for an nvcc of its own choice
        extensions.append(Extension(CUDA_LIBRARY, sources=[]))
    return extensions, BuildNative


PURE_REASON = pure_python_reason()
TOOLKIT: cuda_build.Toolkit | None = None
CUDA_REASON = ""
cmdclass: dict[str, type[Command]] = {"build_py": BuildPy, "build_ext": BuildPure}
ext_modules: list[Extension] = []
# The metadata and the sdist need neither torch nor a compiler.
if BUILD_COMMANDS.intersection(sys.argv):
    if PURE_REASON is None:
        TOOLKIT, CUDA_REASON = cuda_build.decide()
        ext_modules, cmdclass["build_ext"] = native_build()
    elif os.environ.get("PYTRAIN_CUDA") == "1":
        raise SystemExit(f"pytrain: PYTRAIN_CUDA=1, but the CUDA kernels go with the others, and {PURE_REASON}")
    else:
        print(f"pytrain: building WITHOUT native kernels: {PURE_REASON}", file=sys.stderr, flush=True)
setup(ext_modules=ext_modules, cmdclass=cmdclass)
