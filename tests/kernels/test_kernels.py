"""Builds the C++ tests without torch and runs them: natively, with sanitizers, and on an emulated old processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = [f"csrc/cpu/{name}.cpp" for name in (
    "isa", "dispatch", "kernels_baseline", "kernels_avx2", "kernels_avx512"
)]  # fmt: skip
SOURCES = {"kernel_test": ["tests/kernels/kernel_test.cpp", *KERNELS], "codec_test": ["tests/kernels/codec_test.cpp"]}
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Icsrc"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
QEMU = shutil.which("qemu-x86_64")


def build(folder: Path, compiler: str, flags: list[str], name: str = "kernel_test") -> Path:
    """Compile a test; skips where the compiler is missing."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    program = folder / name
    subprocess.run([compiler, *FLAGS, *flags, *SOURCES[name], "-o", str(program)], check=True, cwd=ROOT)
    return program


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("kernels"), os.environ.get("CXX", "g++"), ["-O3"])


def test_all_levels_of_this_machine_give_the_baselines_bits(program: Path) -> None:
    done = run([str(program)])
    assert done.returncode == 0 and done.stdout.rstrip().endswith(" passed, 0 failed"), done.stdout + done.stderr


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_codecs_agree_with_slow_ones_in_fp64(compiler: str, tmp_path: Path) -> None:
    done = run([str(build(tmp_path, compiler, ["-O3"], "codec_test"))])
    assert done.returncode == 0 and done.stdout.rstrip().endswith(" passed, 0 failed"), done.stdout + done.stderr


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_sanitizers_find_nothing(compiler: str, name: str, tmp_path: Path) -> None:
    done = run([str(build(tmp_path, compiler, SANITIZE, name)), "few"])
    if "cannot find" in done.stderr and "asan" in done.stderr:
        pytest.skip(f"{compiler} has no sanitizer runtime here")
    assert done.returncode == 0, done.stdout + done.stderr


emulated = pytest.mark.skipif(
    QEMU is None or platform.machine() != "x86_64", reason="needs qemu-x86_64 (Debian: qemu-user) on x86-64"
)


@emulated
def test_the_baseline_runs_on_a_processor_without_avx(program: Path) -> None:
    done = run([str(QEMU), "-cpu", "Nehalem", str(program), "few"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("level")] == ["level baseline"]


@emulated
def test_a_level_that_the_processor_lacks_is_a_clear_error(program: Path) -> None:
    done = run([str(QEMU), "-cpu", "Nehalem", str(program), "avx2"])
    assert done.returncode == 2
    assert done.stdout == "PYTRAIN_ISA: this machine does not have 'avx2'; it has: baseline\n"


@emulated
def test_avx2_gives_the_baselines_bits_when_emulated(program: Path) -> None:
    done = run([str(QEMU), "-cpu", "max", str(program), "few", "avx2"])
    assert done.returncode == 0 and "level avx2" in done.stdout, done.stdout + done.stderr
