"""Builds pytrain/_kernels_simt.so: the CUDA kernels compiled for the CPU, which PYTRAIN_BACKEND=simt loads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SHIM = [ROOT / "tests" / "simt" / "shim.cpp", ROOT / "tests" / "simt" / "backend.cpp"]
LIBRARY = ROOT / "pytrain" / "_kernels_simt.so"
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-lto", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}"]


def newest(folders: list[Path]) -> float:
    """The time of the last change of any source in these folders."""
    return max(path.stat().st_mtime for folder in folders for path in folder.rglob("*") if path.is_file())


def compile_all(sources: list[Path], folder: Path, flags: list[str], compiler: str) -> list[Path]:
    """Compile sources to objects, two at a time."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        command = [compiler, "-x", "c++", *FLAGS, *flags, *INCLUDES, "-c", str(source), "-o", str(made)]
        subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def build(library: Path = LIBRARY) -> Path:
    """Build the library where a source is newer than it; several processes may call this at once."""
    sources = [ROOT / "csrc" / "cuda", ROOT / "csrc" / "core", ROOT / "csrc" / "rules", ROOT / "tests" / "simt"]
    if library.exists() and library.stat().st_mtime > newest(sources):
        return library
    compiler = os.environ.get("CXX", "g++")
    objects = compile_all([*KERNELS, *SHIM], ROOT / "build" / f"simt-{os.getpid()}", ["-O2"], compiler)
    made = library.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(made)], check=True)
    os.replace(made, library)
    return library


if __name__ == "__main__":
    start = time.monotonic()
    print(f"{build()}: {time.monotonic() - start:.1f} s", file=sys.stderr)
