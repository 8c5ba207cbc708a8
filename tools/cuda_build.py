"""Compiles csrc/cuda into one library by nvcc alone, so that any torch serves to build on, also one without CUDA.

setup.py calls it. It reads PYTRAIN_CUDA (0, 1 or auto), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS and CXX.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ROOT / "csrc" / "cuda" / "library.cpp"]
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # and PTX of the last, for what comes after it
PYPI_PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime"

TORCH_TARGET_VERSION = "0x020D000000000000"  # the oldest torch to run under, 2.13: it first tells a stream's own handle
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-fmad=false",  # this and the next two: the same bits as on the CPU
    "-prec-div=true",
    "-prec-sqrt=true",
    "-Xcompiler=-fPIC,-g0,-fno-lto,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra",
]
# The runtime's own functions stay inside: torch has loaded a runtime too, and must not be given this one.
LINK_FLAGS = ["-shared", "-nodlink", "-cudart=static", "-Xlinker=--exclude-libs=ALL,--as-needed,--no-undefined"]
TORCH_LIBRARIES = ["-ltorch_cpu"]
PROBE = "#include <cuda_runtime.h>\n__global__ void probe() {}\nvoid run() { probe<<<1, 1>>>(); }\n"


class UnusableError(Exception):
    """There is no nvcc, or it does not work; the text says why."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that compiles and links."""

    nvcc: Path
    version: str
    known: tuple[str, ...]  # architectures

    def __str__(self) -> str:
        return f"{self.nvcc} (CUDA {self.version})"


def decide() -> tuple[Toolkit | None, str]:
    """Return the toolkit to build with and "", or None and why there is nothing to build; say it in one line.

    Raises:
        SystemExit: PYTRAIN_CUDA=1, and there is no nvcc that works; or a setting that means nothing.
    """
    wanted = os.environ.get("PYTRAIN_CUDA") or "auto"
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"pytrain: PYTRAIN_CUDA is {wanted!r}; it must be 0, 1 or auto")
    try:
        if wanted == "0":
            raise UnusableError("PYTRAIN_CUDA=0 was set")
        toolkit = probe(find_nvcc())
    except UnusableError as error:
        if wanted == "1":
            raise SystemExit(f"pytrain: PYTRAIN_CUDA=1, but {error}") from error
        print(f"pytrain: building WITHOUT CUDA kernels: {error}", file=sys.stderr, flush=True)
        return None, str(error)
    names = " ".join(architectures(toolkit))
    print(f"pytrain: building CUDA kernels for {names} by {toolkit}", file=sys.stderr, flush=True)
    return toolkit, ""


def find_nvcc() -> Path:
    """Return nvcc of CUDA_HOME (or CUDA_PATH), else the one on PATH, else that of PyPI's packages."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.is_file():
            raise UnusableError(f"CUDA_HOME is {home!r}, where there is no bin/nvcc")
        return nvcc
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    for folder in sys.path:
        if of_pypi := sorted(Path(folder or ".", "nvidia").glob("cu[0-9]*/bin/nvcc")):
            return of_pypi[-1]
    raise UnusableError(
        "no nvcc was found (CUDA_HOME is not set, there is none on PATH, and PyPI's packages are not installed:"
        f" {PYPI_PACKAGES})"
    )


def probe(nvcc: Path) -> Toolkit:
    """Compile and link one empty kernel."""
    said = run([nvcc, "--version"]).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    if not version:
        raise UnusableError(f"{nvcc} does not say its version: {said.strip()[:200]!r}")
    codes = re.findall(r"sm_(\d+)(\d)\b", run([nvcc, "--list-gpu-code"]).stdout)
    with tempfile.TemporaryDirectory() as folder:
        source, flags = Path(folder, "probe.cu"), [*COMPILE_FLAGS, *host_compiler(), *LINK_FLAGS, *library_folder(nvcc)]
        source.write_text(PROBE)
        run([nvcc, *flags, source, "-o", f"{folder}/probe"])
    return Toolkit(nvcc, version[1], tuple(f"{major}.{minor}" for major, minor in codes))


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command of the probe."""
    try:
        return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    except OSError as error:
        raise UnusableError(f"nvcc does not start: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in (error.stderr or error.stdout).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it says nothing")
        raise UnusableError(f"{command[0]} does not work: {first}") from error


def host_compiler() -> list[str]:
    """Let nvcc take the compiler of CXX, unless it was told one of its own."""
    if "NVCC_CCBIN" in os.environ:
        return []
    words = [word for word in shlex.split(os.environ.get("CXX", "")) if shutil.which(word)]
    return [f"-ccbin={words[-1]}"] if words else []  # the last: "ccache g++"


def library_folder(nvcc: Path) -> list[str]:
    """Where PyPI's packages keep the static runtime; nvcc itself knows the other places."""
    folder = nvcc.parent.parent / "lib"
    return [f"-L{folder}"] if (folder / "libcudart_static.a").exists() else []


def architectures(toolkit: Toolkit) -> list[str]:
    """Return what TORCH_CUDA_ARCH_LIST asks for, or the default as far as this nvcc knows it: "9.0", "12.0+PTX"."""
    wanted = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if wanted == [""]:
        known = [name for name in ARCHITECTURES if name in toolkit.known]
        return [*known[:-1], f"{known[-1]}+PTX"]
    for name in wanted:
        number = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if not number or number[1] not in toolkit.known:
            raise SystemExit(
                f"pytrain: TORCH_CUDA_ARCH_LIST has {name!r}; nvcc of CUDA {toolkit.version} compiles for"
                f" {' '.join(toolkit.known)}, each of them also with +PTX"
            )
    return wanted


def code_flags(names: list[str]) -> list[str]:
    """Return nvcc's words for these architectures."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_library(
    toolkit: Toolkit, target: Path, folder: Path, includes: Sequence[str], libraries: Sequence[str]
) -> None:
    """Compile what has changed since the last time, and link.

    Args:
        target: the library.
        folder: for objects.
        includes: torch's folders of headers.
        libraries: torch's folders of libraries.

    Raises:
        SystemExit: nvcc failed; its messages stand above.
    """
    names = architectures(toolkit)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    flags = [*COMPILE_FLAGS, *host_compiler(), *code_flags(names), f"-I{ROOT / 'csrc'}"]
    if int(toolkit.version.split(".")[0]) >= 13:  # a fifth of the size; drivers of CUDA 12 may not read it
        flags.append("--compress-mode=size")
    for path in (ROOT, *includes):  # messages name csrc/..., not a folder of the machine that built it
        flags.append(f"-Xcompiler=-ffile-prefix-map={path}/=")
    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *(f"-isystem={path}" for path in includes)]
    torch_flags.append(f'-DPYTRAIN_CUDA_ARCHITECTURES="{" ".join(names)}"')
    newest = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/**/*.h"), Path(__file__)])
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        made, record = folder / f"{source.stem}.o", folder / f"{source.stem}.txt"
        command = [str(toolkit.nvcc), *flags, *(torch_flags if source.suffix == ".cpp" else [])]
        command += [f"--threads={jobs}", "-c", str(source), "-o", str(made)]
        known = f"{toolkit.version} {shlex.join(command)}"
        same = made.exists() and record.exists() and record.read_text() == known
        if same and made.stat().st_mtime > max(newest, source.stat().st_mtime):
            return made
        record.unlink(missing_ok=True)
        execute(command)
        record.write_text(known)
        return made

    # nvcc compiles a file's architectures side by side; two files, because the first waits for its slowest one.
    with ThreadPoolExecutor(min(2, jobs)) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    command = [str(toolkit.nvcc), *host_compiler(), *LINK_FLAGS, *map(str, objects), "-o", str(target)]
    execute([*command, *library_folder(toolkit.nvcc), *(f"-L{path}" for path in libraries), *TORCH_LIBRARIES])


def execute(command: list[str]) -> None:
    """Show a command and run it."""
    print(shlex.join(command), flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(
            f"pytrain: {command[0]} failed (its messages stand above).\n"
            "Hint: PYTRAIN_CUDA=0 builds pytrain without CUDA kernels."
        )
