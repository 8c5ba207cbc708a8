"""How the build finds nvcc, for which architectures it compiles, and what it says where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import cuda_build  # noqa: E402

CUDA_12 = cuda_build.Toolkit(Path("nvcc"), "12.6", ("7.5", "8.0", "8.6", "8.9", "9.0"))
CUDA_13 = cuda_build.Toolkit(Path("nvcc"), "13.0", ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0"))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "PYTRAIN_CUDA", "PYTRAIN_NO_NATIVE", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def real() -> cuda_build.Toolkit:
    try:
        return cuda_build.probe(cuda_build.find_nvcc())
    except cuda_build.UnusableError as error:
        pytest.skip(f"needs nvcc: {error}")


def program(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def no_nvcc(monkeypatch: pytest.MonkeyPatch, empty: Path) -> None:
    monkeypatch.setenv("PATH", str(empty))
    monkeypatch.setattr(sys, "path", [str(empty)])


def test_the_default_is_every_architecture_that_nvcc_knows_and_ptx_of_the_last() -> None:
    assert cuda_build.architectures(CUDA_13) == ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
    assert cuda_build.architectures(CUDA_12) == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]


@pytest.mark.parametrize("setting", ["8.0;9.0a+PTX", "8.0 9.0a+PTX", " 8.0, 9.0a+PTX;"])
def test_torch_cuda_arch_list_is_honoured(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    names = cuda_build.architectures(CUDA_13)
    assert names == ["8.0", "9.0a+PTX"]
    assert cuda_build.code_flags(names) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize("name", ["7.0", "10.0", "Hopper", "90", "9.0+ptx"])
def test_an_architecture_that_nvcc_does_not_know_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{name}")
    with pytest.raises(SystemExit) as caught:
        cuda_build.architectures(CUDA_12)
    assert repr(name) in str(caught.value) and "7.5 8.0" in str(caught.value)


def test_nvcc_is_that_of_cuda_home_then_of_path_then_of_pypi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_nvcc(monkeypatch, tmp_path / "empty")
    with pytest.raises(cuda_build.UnusableError, match="nvidia-cuda-nvcc"):
        cuda_build.find_nvcc()
    program(tmp_path / "site" / "nvidia" / "cu12" / "bin" / "nvcc")
    of_pypi = program(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty"), str(tmp_path / "site")])
    assert cuda_build.find_nvcc() == of_pypi
    on_path = program(tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cuda_build.find_nvcc() == on_path
    at_home = program(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_build.find_nvcc() == at_home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "gone"))
    with pytest.raises(cuda_build.UnusableError, match="CUDA_HOME is .*gone"):
        cuda_build.find_nvcc()


def test_without_nvcc_auto_says_so_in_one_line_and_1_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_nvcc(monkeypatch, tmp_path)
    toolkit, reason = cuda_build.decide()
    assert toolkit is None and reason.startswith("no nvcc was found")
    assert capsys.readouterr().err == f"pytrain: building WITHOUT CUDA kernels: {reason}\n"
    monkeypatch.setenv("PYTRAIN_CUDA", "1")
    with pytest.raises(SystemExit, match="PYTRAIN_CUDA=1, but no nvcc was found"):
        cuda_build.decide()


def test_0_leaves_cuda_out_and_looks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_CUDA", "0")
    monkeypatch.setattr(cuda_build, "find_nvcc", lambda: pytest.fail("looked for nvcc"))
    assert cuda_build.decide() == (None, "PYTRAIN_CUDA=0 was set")


def test_an_nvcc_that_does_not_work_is_named_with_its_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        'case "$1" in --version) echo release 13.0;; --list*) echo sm_90;; *) echo "x.h: error: no x" >&2; exit 1; esac'
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = program(tmp_path / "bin" / "nvcc", script)
    toolkit, reason = cuda_build.decide()
    assert toolkit is None and reason == f"{nvcc} does not work: x.h: error: no x"
    monkeypatch.setenv("PYTRAIN_CUDA", "1")
    with pytest.raises(SystemExit, match="PYTRAIN_CUDA=1, but .* does not work"):
        cuda_build.decide()


def test_a_setting_that_means_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_CUDA", "yes")
    with pytest.raises(SystemExit, match="PYTRAIN_CUDA is 'yes'; it must be 0, 1 or auto"):
        cuda_build.decide()


def test_cuda_kernels_without_the_others_are_an_error() -> None:
    environment = {**os.environ, "PYTRAIN_NO_NATIVE": "1", "PYTRAIN_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "PYTRAIN_CUDA=1, but" in done.stderr and "PYTRAIN_NO_NATIVE=1" in done.stderr


def test_the_host_compiler_is_that_of_cxx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("g++-12", "ccache"):
        program(tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    for setting, flags in (("g++-12", ["-ccbin=g++-12"]), ("ccache g++-12 -m64", ["-ccbin=g++-12"]), ("", [])):
        monkeypatch.setenv("CXX", setting)
        assert cuda_build.host_compiler() == flags
    monkeypatch.setenv("NVCC_CCBIN", "clang++")
    assert cuda_build.host_compiler() == []


def test_nvcc_compiles_again_only_what_has_changed(
    real: cuda_build.Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "empty.cu"
    source.write_text("// Nothing.\n")
    monkeypatch.setattr(cuda_build, "SOURCES", [source])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", real.known[0])
    compiled: list[str] = []
    execute = cuda_build.execute
    monkeypatch.setattr(cuda_build, "execute", lambda command: (compiled.append("-c" in command), execute(command)))

    def compilations() -> int:
        compiled.clear()
        cuda_build.compile_library(real, tmp_path / "new" / "empty.so", tmp_path / "objects", [], [])
        return sum(compiled)

    monkeypatch.setattr(cuda_build, "TORCH_LIBRARIES", [])
    assert compilations() == 1
    assert compilations() == 0
    os.utime(source, (time.time() + 9, time.time() + 9))
    assert compilations() == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", real.known[-1])
    assert compilations() == 1


def test_a_source_that_does_not_compile_ends_the_build_with_a_hint(
    real: cuda_build.Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("#error broken on purpose\n")
    monkeypatch.setattr(cuda_build, "SOURCES", [source])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", real.known[0])
    with pytest.raises(SystemExit, match="PYTRAIN_CUDA=0 builds pytrain without"):
        cuda_build.compile_library(real, tmp_path / "broken.so", tmp_path / "objects", [], [])
