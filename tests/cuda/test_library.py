"""The library of CUDA kernels: what it takes from torch and exports, under which torch it loads, and what it says
where there is no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pytrain
from pytrain import backend
from pytrain.control import CONTROL_HEAD, CONTROL_ROW
from pytrain.info import info

LIBRARY = Path(pytrain.__file__).with_name("_kernels_cuda.so")
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|librt|libdl|ld-linux[\w-]*)\.so\.\d+$")

is_built = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels are not built: `make cuda` builds them")
takes_cuda = torch.version.cuda is not None and torch.__version__ >= "{}.{}".format(*backend.CUDA_TORCH)
has_kernels = pytest.mark.skipif(backend.facts is None, reason="needs the kernels")


def output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


@is_built
def test_of_torch_it_takes_only_the_stable_abi_s_c_functions() -> None:
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", LIBRARY).splitlines()]
    unversioned = {name for name in undefined if "@" not in name and not name.startswith(("_ITM_", "__gmon"))}
    assert unversioned, "it takes nothing from torch"
    assert not [name for name in unversioned if not name.startswith(("aoti_torch_", "torch_"))]
    assert not [name for name in undefined if name.startswith(("cuda", "cu", "__cuda"))]


@is_built
def test_the_cuda_runtime_is_inside_and_not_for_others() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", LIBRARY))
    assert not [name for name in needed if name != "libtorch_cpu.so" and not SYSTEM_LIBRARIES.match(name)]
    defined = [line.split()[-1] for line in output("nm", "-D", "--defined-only", LIBRARY).splitlines()]
    own = [name for name in defined if not name.startswith("_")]
    assert sorted(own) == ["pytrain_backend", "pytrain_cuda_architectures", "pytrain_cuda_version"]
    assert not [name for name in defined if "pytrain" in name and name not in own]


@is_built
def test_it_names_no_folder_of_the_machine_that_built_it() -> None:
    assert not re.findall(r"\((RPATH|RUNPATH)\)", output("readelf", "-d", LIBRARY))
    assert not re.search(rb"/site-packages/|/csrc/cuda/", LIBRARY.read_bytes())


@has_kernels
def test_every_rule_has_a_kernel_for_cuda() -> None:
    assert backend.facts is not None
    for rule in backend.facts.rules():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pytrain::{rule}_", "CUDA"), rule


def cuda(dtype: torch.dtype, n: int) -> Tensor:
    """A tensor that says it lies on a GPU, where there may be none."""
    memory = torch.zeros(n, dtype=dtype)
    device = torch.device("cuda", 0)
    storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), device, memory.nbytes)
    facts = {"storage_offset": 0, "size": (n,), "stride": (1,), "dtype": dtype, "device": device}
    made: Tensor = torch._C._construct_CUDA_Tensor_From_Storage_And_Metadata(facts, storage)
    made.memory = memory  # type: ignore[attr-defined]
    return made


@is_built
@pytest.mark.skipif(not takes_cuda, reason="this torch is built without CUDA, or too old for the CUDA kernels")
class TestUnderTorchForCuda:
    def test_it_is_loaded_and_info_says_for_what(self) -> None:
        assert backend.why_no_cuda == ""
        assert re.search(r"^cuda +kernels for CUDA \d+\.\d, architectures \d+\.\d", info(), flags=re.MULTILINE)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_a_call_says_what_is_missing(self) -> None:
        states = [[cuda(torch.float32, 4)] for _ in range(4)]
        control = cuda(torch.float64, CONTROL_HEAD + CONTROL_ROW)
        assert backend.select(states[0][0]).reason == "CUDA kernels"
        reason = r"cannot use device cuda:0: .*driver.*\(kernels: CUDA \d+\.\d; driver: .*\)"
        with pytest.raises(RuntimeError, match=reason):
            torch.ops.pytrain.adamw_(*states, [cuda(torch.float32, 1)], control, [0])
        with pytest.raises(RuntimeError, match=reason):
            torch.ops.pytrain._upload(control, torch.zeros(control.numel(), dtype=torch.float64))


@has_kernels
class TestWhyNot:
    """Each with a library that has nothing in it but its version."""

    @pytest.fixture(autouse=True)
    def package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(backend, "_FOLDER", tmp_path)
        monkeypatch.setattr(torch.version, "cuda", "12.6")
        return tmp_path

    def library(self, folder: Path, text: str) -> None:
        compiler = shutil.which("c++") or shutil.which("g++") or pytest.skip("needs a C++ compiler")
        source = folder / "library.cpp"
        source.write_text(text)
        output(compiler, "-shared", "-fPIC", source, "-o", folder / "_kernels_cuda.so")

    def test_a_torch_of_another_cuda_major(self, package: Path) -> None:
        self.library(package, 'extern "C" int pytrain_cuda_version() { return 13000; }')
        assert backend._load_cuda() == (
            "",
            "they were built for CUDA 13, this torch for CUDA 12.6; install pytrain again with an nvcc of CUDA 12",
        )

    def test_a_library_that_does_not_load(self, package: Path) -> None:
        self.library(package, 'extern "C" void gone(); extern "C" int pytrain_cuda_version() { gone(); return 12060; }')
        what, why = backend._load_cuda()
        assert what == "" and "_kernels_cuda.so does not load" in why and "gone" in why

    def test_a_library_of_another_build(self, package: Path) -> None:
        table = 'long long table[9]; extern "C" void* pytrain_backend() { return table; }'
        self.library(package, f'extern "C" int pytrain_cuda_version() {{ return 12060; }} {table}')
        what, why = backend._load_cuda()
        assert what == "" and "come from different builds of pytrain" in why

    def test_a_torch_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "__version__", "2.12.1+cu126")
        assert backend._load_cuda() == ("", "they need torch 2.13 or later, this is 2.12.1+cu126")

    def test_a_torch_without_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert backend._load_cuda() == ("", "this torch is built without CUDA")

    def test_a_build_without_nvcc(self, package: Path) -> None:
        assert backend._load_cuda() == ("", "_kernels_cuda.so was not built")
        (package / "_cuda_reason.txt").write_text("no nvcc was found\n")
        assert backend._load_cuda() == ("", "_kernels_cuda.so was not built: no nvcc was found")
