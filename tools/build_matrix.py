"""Builds and installs pytrain in every supported way, each in a fresh virtual environment, and checks what came out.

    python tools/build_matrix.py --sample | --all | --only NAME [--only NAME ...]

Each variant imports pytrain from an empty folder, compares AdamW steps with torch's, and checks the backend.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_BUILT_ON = "2.13.0"
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "expecttest")
LIBRARY_LIMIT = 10 * 2**20  # bytes
INSTALL_TARGET = 120.0  # seconds for a CPU-only `pip install .`; a warning, for the network is in it
COMMAND_LIMIT = 1800.0  # seconds
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", "_*_reason.txt", ".*_cache"
)
COMPILERS = ("c++", "g++", "clang++", "c++-", "g++-", "clang++-")
BUILD_SETTINGS = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "VIRTUAL_ENV")
CUDA_SETTINGS = {"PYTRAIN_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}  # one architecture, to take less time
PYPI_TOOLKIT = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
    "nvidia-cuda-runtime==13.0.96",
)
BUILD_REQUIREMENTS = ("setuptools>=77.0.3", "pybind11", "ninja", "wheel", "numpy")

# Runs in the installed environment, in an empty folder. Arguments: the backend that is expected.
CHECK = """
import json, pathlib, sys
import torch
import pytrain
from pytrain.optim import AdamW

torch.manual_seed(0)
start, gradient = torch.randn(1003), torch.randn(1003)
results = []
for optimizer in (AdamW, torch.optim.AdamW):
    parameter = torch.nn.Parameter(start.clone())
    stepper = optimizer([parameter], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        parameter.grad = gradient.clone()
        stepper.step()
    results.append(parameter.detach())
    backend = getattr(stepper, "backend", backend if results[1:] else None)
torch.testing.assert_close(results[0], results[1])
assert backend == sys.argv[1], f"expected backend {sys.argv[1]}, got {backend}"
folder = pathlib.Path(pytrain.__file__).parent
library = folder / "_kernels.so"
size = library.stat().st_size if library.exists() else 0
print(json.dumps({"folder": str(folder), "size": size, "torch": torch.__version__}))
"""


class MatrixError(Exception):
    """A variant did not do what it should; the text says what, with the end of the output."""


class NotHereError(Exception):
    """A variant needs something that this machine lacks."""


@dataclass
class Row:
    """What one variant gave: seconds of its build and install, bytes of the kernel library, torch's version."""

    seconds: float = 0.0
    size: int = 0
    torch: str = ""
    notes: list[str] = field(default_factory=list)


def run(
    command: list[str | Path], *, cwd: Path, env: dict[str, str] | None = None, must_fail: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a command in a clean environment (plus `env`); raise MatrixError with its last lines if it goes wrong.

    nvcc takes minutes: only what sets PYTRAIN_CUDA has it compile.
    """
    clean = {k: v for k, v in os.environ.items() if k not in BUILD_SETTINGS and not k.startswith("PYTRAIN_")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, "PYTRAIN_CUDA": "0", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_LIMIT,
        check=False,
    )
    if (result.returncode != 0) != must_fail:
        tail = "\n".join(result.stdout.splitlines()[-30:])
        raise MatrixError(f"{' '.join(map(str, command))}\nended with {result.returncode}\n{tail}")
    return result


class Environment:
    """One virtual environment of a variant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def pip(
        self, *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None, must_fail: bool = False
    ) -> tuple[float, str]:
        """Run pip; return its seconds and its output."""
        start = time.perf_counter()
        done = run([self.python, "-m", "pip", *arguments], cwd=cwd, env=env, must_fail=must_fail)
        return time.perf_counter() - start, done.stdout

    def check(self, *, backend: str, seconds: float, inside: Path | None = None) -> Row:
        """Use what is installed from an empty folder: the backend, a step, where it was imported from, its size."""
        with tempfile.TemporaryDirectory() as empty:
            done = run([self.python, "-I", "-c", CHECK, backend], cwd=Path(empty))
        facts = json.loads(done.stdout.splitlines()[-1])
        if not Path(facts["folder"]).resolve().is_relative_to((inside or self.folder).resolve()):
            raise MatrixError(f"pytrain was imported from {facts['folder']}, not from {inside or self.folder}")
        if facts["size"] >= LIBRARY_LIMIT or (backend == "native") != (facts["size"] > 0):
            raise MatrixError(f"backend {backend}: the kernel library has {facts['size']} bytes")
        return Row(seconds, facts["size"], facts["torch"])

    def check_info(self, *phrases: str) -> None:
        """`python -m pytrain info` must say each of these."""
        with tempfile.TemporaryDirectory() as empty:
            done = run([self.python, "-I", "-m", "pytrain", "info"], cwd=Path(empty))
        for phrase in phrases:
            if phrase not in done.stdout:
                raise MatrixError(f"`python -m pytrain info` does not say {phrase!r}:\n{done.stdout}")


class Workshop:
    """A temporary folder with what variants share: a template environment, one wheel built on the pinned torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._template: Environment | None = None
        self._wheel: Path | None = None

    def source(self, name: str) -> Path:
        """A copy of the tree without anything built."""
        return Path(shutil.copytree(ROOT, self.folder / f"source-{name}", ignore=NOT_COPIED))

    def empty_environment(self, name: str) -> Environment:
        run([sys.executable, "-m", "venv", self.folder / name], cwd=self.folder)
        return Environment(self.folder / name)

    def environment(self, name: str) -> Environment:
        """A fresh environment with the pinned torch and the build requirements: hard links to one template."""
        if self._template is None:
            self._template = self.empty_environment("template")
            self._template.pip("install", f"torch=={TORCH_BUILT_ON}", *BUILD_REQUIREMENTS, cwd=self.folder)
        target = self.folder / name
        shutil.copytree(self._template.folder, target, symlinks=True, copy_function=os.link)
        return Environment(target)

    def wheel(self) -> Path:
        """The wheel as built on the pinned torch; with CUDA kernels where there is nvcc."""
        if self._wheel is None:
            builder = self.environment("builder")
            target = self.folder / "wheel"
            flags = ("--no-build-isolation", "--no-deps", "-w", target)
            env = CUDA_SETTINGS if shutil.which("nvcc") else {}
            builder.pip("wheel", *flags, ".", cwd=self.source("wheel"), env=env)
            (self._wheel,) = target.glob("*.whl")
        return self._wheel

    def tidy(self) -> None:
        """Remove what one variant left; the template, the builder and the wheel stay."""
        for folder in self.folder.iterdir():
            if folder.name not in ("template", "builder", "wheel"):
                shutil.rmtree(folder)

    def path_without(self, *names: str) -> str:
        """A PATH like this process's, without programs of these names (a name that ends in "-" is a prefix)."""
        folder = self.folder / ("path-without-" + names[0])
        folder.mkdir()
        prefixes = tuple(name for name in names if name.endswith("-"))
        for place in os.get_exec_path():
            for program in Path(place).glob("*") if Path(place).is_dir() else ():
                link = folder / program.name
                if program.name in names or program.name.startswith(prefixes) or link.is_symlink():
                    continue
                link.symlink_to(program)
        return str(folder)


def isolation(shop: Workshop) -> Row:
    """`pip install .`: pip brings the build requirements into an environment of their own."""
    target = shop.environment("isolation")
    seconds, _ = target.pip("install", ".", cwd=shop.source("isolation"))
    row = target.check(backend="native", seconds=seconds)
    target.check_info("native")
    if seconds > INSTALL_TARGET:
        row.notes.append(f"WARNING: over the target of {INSTALL_TARGET:.0f} s")
    return row


def no_isolation(shop: Workshop) -> Row:
    """`pip install --no-build-isolation .`."""
    target = shop.environment("no-isolation")
    seconds, _ = target.pip("install", "--no-build-isolation", ".", cwd=shop.source("no-isolation"))
    return target.check(backend="native", seconds=seconds)


def editable(shop: Workshop) -> Row:
    """`pip install -e .`, then pure Python and native again in the same tree."""
    target, source = shop.environment("editable"), shop.source("editable")
    seconds, _ = target.pip("install", "-e", ".", cwd=source)
    row = target.check(backend="native", seconds=seconds, inside=source)
    again = ("install", "--no-build-isolation", "--no-deps", "-e", ".")
    target.pip(*again, cwd=source, env={"PYTRAIN_NO_NATIVE": "1"})
    target.check(backend="torch", seconds=seconds, inside=source)
    target.pip(*again, cwd=source)
    target.check(backend="native", seconds=seconds, inside=source)
    return row


def build(shop: Workshop) -> Row:
    """`python -m build`: an sdist, a wheel from that sdist, what is in the wheel, and the wheel installed."""
    target, source = shop.environment("build"), shop.source("build")
    target.pip("install", "build", cwd=source)
    start = time.perf_counter()
    run([target.python, "-m", "build"], cwd=source)
    (wheel,) = (source / "dist").glob("*.whl")
    (sdist,) = (source / "dist").glob("pytrain-*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = ("setup.py", "Makefile", "tools/*.py", "tests/**/*.py", "csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu")
    unpacked = {str(path.relative_to(source)) for pattern in sources for path in source.glob(pattern)} - packed
    if unpacked:
        raise MatrixError(f"{sdist.name} lacks {sorted(unpacked)}")
    target.pip("install", wheel, cwd=source)
    seconds = time.perf_counter() - start
    names = zipfile.ZipFile(wheel).namelist()
    strangers = [n for n in names if not n.startswith(("pytrain/", "pytrain-")) or n.endswith((".h", ".cpp", ".txt"))]
    strangers = [n for n in strangers if ".dist-info/" not in n and n != "pytrain/_cuda_reason.txt"]
    missing = [
        end
        for end in ("pytrain/_kernels.so", "pytrain/py.typed", "/licenses/LICENSE", "pytrain/optim/adamw.py")
        if not any(n.endswith(end) for n in names)
    ]
    if strangers or missing or sum(n.startswith("pytrain/_C.") and n.endswith(".so") for n in names) != 1:
        raise MatrixError(f"{wheel.name} lacks {missing}, should not have {strangers}; it has {names}")
    return target.check(backend="native", seconds=seconds)


def pure(shop: Workshop) -> Row:
    """`PYTRAIN_NO_NATIVE=1 pip install .`."""
    target = shop.environment("pure")
    seconds, _ = target.pip("install", ".", cwd=shop.source("pure"), env={"PYTRAIN_NO_NATIVE": "1"})
    row = target.check(backend="torch", seconds=seconds)
    target.check_info("PYTRAIN_NO_NATIVE=1")
    return row


def no_compiler(shop: Workshop) -> Row:
    """`pip install .` where there is no C++ compiler: pure Python, and it says so."""
    target = shop.environment("no-compiler")
    path = shop.path_without(*COMPILERS)
    seconds, output = target.pip("install", "-v", ".", cwd=shop.source("no-compiler"), env={"PATH": path})
    if "WITHOUT native kernels" not in output:
        raise MatrixError("the build did not say that it left out the kernels")
    row = target.check(backend="torch", seconds=seconds)
    target.check_info("no C++ compiler")
    return row


def no_nvcc(shop: Workshop) -> Row:
    """A build where there is no nvcc: the CPU kernels need none, and it says so; PYTRAIN_CUDA=1 is an error."""
    target, source = shop.environment("no-nvcc"), shop.source("no-nvcc")
    command = ("install", "-v", "--no-build-isolation", "--no-deps", ".")
    env = {"PATH": shop.path_without("nvcc"), "PYTRAIN_CUDA": "auto"}
    seconds, output = target.pip(*command, cwd=source, env=env)
    if "WITHOUT CUDA kernels: no nvcc was found" not in output:
        raise MatrixError("the build did not say that it left out the CUDA kernels")
    row = target.check(backend="native", seconds=seconds)
    _, output = target.pip(*command, cwd=source, env={**env, "PYTRAIN_CUDA": "1"}, must_fail=True)
    if "PYTRAIN_CUDA=1, but no nvcc was found" not in output:
        raise MatrixError(f"no clear error:\n{output[-2000:]}")
    return row


def pypi_nvcc(shop: Workshop) -> Row:
    """CUDA kernels by the toolkit of PyPI, on the CPU build of torch, with no other nvcc; then without them again."""
    target, source = shop.environment("pypi-nvcc"), shop.source("pypi-nvcc")
    target.pip("install", "--no-deps", *PYPI_TOOLKIT, cwd=source)
    command = ("install", "--no-build-isolation", "--no-deps", "--force-reinstall", ".")
    env = {"PATH": shop.path_without("nvcc"), **CUDA_SETTINGS}
    seconds, _ = target.pip(*command, cwd=source, env=env)
    row = target.check(backend="native", seconds=seconds)
    (library,) = target.folder.glob("lib/python*/site-packages/pytrain/_kernels_cuda.so")
    row.notes.append(f"CUDA kernels {library.stat().st_size / 2**10:.0f} KiB")
    target.pip(*command, cwd=source)
    if library.exists():
        raise MatrixError(f"PYTRAIN_CUDA=0 left {library}")
    return row


def clang(shop: Workshop) -> Row:
    """A build by clang."""
    if shutil.which("clang++") is None:
        raise NotHereError("no clang++ on PATH")
    target = shop.environment("clang")
    seconds, _ = target.pip("install", "--no-build-isolation", ".", cwd=shop.source("clang"), env={"CXX": "clang++"})
    target.check_info("clang")
    return target.check(backend="native", seconds=seconds)


def no_torch(shop: Workshop) -> Row:
    """A build without isolation and without torch: an error that says what to do."""
    target, source = shop.empty_environment("no-torch"), shop.source("no-torch")
    target.pip("install", *BUILD_REQUIREMENTS, cwd=source)
    seconds, output = target.pip("install", "--no-build-isolation", "--no-deps", ".", cwd=source, must_fail=True)
    if "needs the Python package 'torch'" not in output:
        raise MatrixError(f"no clear error:\n{output[-2000:]}")
    return Row(seconds)


def compile_error(shop: Workshop) -> Row:
    """A source that does not compile: an error with a hint, never a silent fallback."""
    target, source = shop.environment("compile-error"), shop.source("compile-error")
    with (source / "csrc" / "cpu" / "isa.cpp").open("a") as text:
        text.write("\n#error broken on purpose\n")
    seconds, output = target.pip("install", "--no-build-isolation", "--no-deps", ".", cwd=source, must_fail=True)
    if "Hint: PYTRAIN_NO_NATIVE=1" not in output or "broken on purpose" not in output:
        raise MatrixError(f"no clear error:\n{output[-2000:]}")
    return Row(seconds)


def other_torch(version: str) -> Callable[[Workshop], Row]:
    """A variant: the wheel as built on the pinned torch, run under another one."""

    def variant(shop: Workshop) -> Row:
        wheel = shop.wheel()
        target = shop.empty_environment(f"torch-{version}")
        target.pip("install", f"torch=={version}", "numpy", *TEST_TOOLS, cwd=shop.folder)
        seconds, _ = target.pip("install", "--no-deps", wheel, cwd=shop.folder)
        row = target.check(backend="native", seconds=seconds)
        tests = shop.folder / f"tests-{version}"
        shutil.copytree(ROOT / "tests", tests / "tests", ignore=NOT_COPIED)
        shutil.copy(ROOT / "pyproject.toml", tests)
        selection = ["-n", "2", "-m", "not slow and not matrix", "-q", "-p", "no:cacheprovider"]
        selection += ["tests/optim", "tests/cuda/test_library.py"]
        done = run([target.python, "-m", "pytest", *selection], cwd=tests, env={"PYTRAIN_BACKEND": "auto"})
        row.notes.append(done.stdout.splitlines()[-1].strip("= "))
        return row

    variant.__doc__ = f"Built on torch {TORCH_BUILT_ON}, run under {version}: the tests pass unchanged."
    return variant


VARIANTS: dict[str, Callable[[Workshop], Row]] = {
    "isolation": isolation,
    "no-isolation": no_isolation,
    "editable": editable,
    "build": build,
    "pure": pure,
    "no-compiler": no_compiler,
    "no-nvcc": no_nvcc,
    "pypi-nvcc": pypi_nvcc,
    "clang": clang,
    "no-torch": no_torch,
    "compile-error": compile_error,
    "torch-2.14.1": other_torch("2.14.1"),
    "torch-2.10.0": other_torch("2.10.0"),
}
SAMPLE = ("isolation", "no-compiler", "torch-2.14.1")


def main() -> int:
    """Run the chosen variants, print the table, return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--sample", action="store_true", help=f"{', '.join(SAMPLE)}")
    choice.add_argument("--all", action="store_true", help="every variant")
    choice.add_argument("--only", action="append", choices=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    arguments = parser.parse_args()
    names = list(VARIANTS) if arguments.all else list(SAMPLE) if arguments.sample else arguments.only

    rows: list[tuple[str, ...]] = [("variant", "install s", "total s", "_kernels.so", "torch", "result")]
    counts = {"passed": 0, "failed": 0, "not run": 0}
    with tempfile.TemporaryDirectory(prefix="pytrain-matrix-") as folder:
        shop = Workshop(Path(folder))
        for name in names:
            print(f"{name}: {VARIANTS[name].__doc__}", flush=True)
            start, row, result = time.perf_counter(), Row(), "passed"
            try:
                row = VARIANTS[name](shop)
            except MatrixError as error:
                result = "failed"
                print(f"{name} FAILED: {error}", flush=True)
            except NotHereError as error:
                result = "not run"
                row.notes.append(str(error))
            shop.tidy()
            counts[result] += 1
            size = f"{row.size / 2**10:.0f} KiB" if row.size else "-"
            total = time.perf_counter() - start
            rows.append((name, f"{row.seconds:.1f}", f"{total:.1f}", size, row.torch, "; ".join([result, *row.notes])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    skipped = f", {counts['not run']} skipped" if counts["not run"] else ""
    print(f"{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
