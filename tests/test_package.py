"""What was built and installed: the binaries' imports and size, the metadata, and how much `import pytrain` loads."""

from __future__ import annotations

import importlib.metadata
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import pytrain

FOLDER = Path(pytrain.__file__).parent
LIBRARY = FOLDER / "_kernels.so"
LIBRARY_LIMIT = 10 * 2**20  # bytes
MODULE_LIMIT = 40
# Shared libraries that every Linux has, and the one of torch that holds the stable ABI's shims.
SYSTEM_LIBRARIES = re.compile(r"(libc|libm|libstdc\+\+|libgcc_s|libpthread|ld-linux[\w-]*)\.so\.\d+$")
STABLE_LIBRARY = "libtorch_cpu.so"

LOADED = """
import json, sys
import torch, numpy
before = set(sys.modules)
import pytrain
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def undefined_symbols(binary: Path) -> list[str]:
    """What the binary takes from others, without the version suffix."""
    return [line.split()[-1].split("@")[0] for line in output("nm", "-D", "--undefined-only", binary).splitlines()]


def dynamic_entries(binary: Path, tag: str) -> list[str]:
    """The values in brackets of one kind of entry in the dynamic section."""
    return re.findall(rf"\({tag}\).*\[(.*)\]", output("readelf", "-d", binary))


def binaries() -> list[Path]:
    """What every build makes; tests/cuda/test_library.py looks at the CUDA kernels."""
    return sorted(path for path in FOLDER.glob("*.so") if path.name not in ("_kernels_cuda.so", "_kernels_simt.so"))


def test_the_package_holds_the_kernel_library_and_one_python_module() -> None:
    assert LIBRARY in binaries()
    assert [path.name.split(".")[0] for path in binaries()] == ["_C", "_kernels"]


def test_kernel_library_imports_no_cpp_symbol_of_libtorch() -> None:
    demangled = output("nm", "-D", "-C", "--undefined-only", LIBRARY)
    assert not re.findall(r".*\b(?:c10|at|torch|caffe2)::.*", demangled)
    symbols = undefined_symbols(LIBRARY)
    shims = [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
    assert shims, "the library registers nothing with torch"
    mangled = [name for name in symbols if name.startswith("_Z")]
    runtime = (
        "_ZNSt",
        "_ZNKSt",
        "_ZSt",
        "_ZNS",
        "_ZNKS",
        "_ZTVN10__cxxabiv1",
        "_ZTISt",
        "_ZTVSt",
        "_Zn",
        "_Zd",
        "_ZTTNS",
    )
    assert not [name for name in mangled if not name.startswith(runtime)], "only the C++ runtime may be mangled"


def test_kernel_library_imports_no_symbol_of_python() -> None:
    assert not [name for name in undefined_symbols(LIBRARY) if name.startswith(("Py", "_Py"))]


def test_kernel_library_exports_no_function_of_its_own() -> None:
    defined = [line.split()[-1] for line in output("nm", "-D", "--defined-only", "-C", LIBRARY).splitlines()]
    assert not [name for name in defined if "pytrain" in name]


@pytest.mark.parametrize("binary", ["_kernels", "_C"])
def test_needed_libraries_are_the_system_s_and_at_most_libtorch_cpu(binary: str) -> None:
    (path,) = FOLDER.glob(f"{binary}.*so")
    allowed = {STABLE_LIBRARY} if binary == "_kernels" else set()
    needed = dynamic_entries(path, "NEEDED")
    assert not [name for name in needed if name not in allowed and not SYSTEM_LIBRARIES.match(name)]
    assert allowed <= set(needed)


@pytest.mark.parametrize("tag", ["RPATH", "RUNPATH"])
def test_binaries_name_no_folder_of_the_machine_that_built_them(tag: str) -> None:
    for path in binaries():
        assert not dynamic_entries(path, tag), path.name
        assert not re.search(rb"/site-packages/|/csrc/ops/", path.read_bytes()), path.name


def test_binaries_are_small() -> None:
    assert sum(path.stat().st_size for path in binaries()) < LIBRARY_LIMIT


def test_metadata_and_module_agree_on_the_version() -> None:
    metadata = importlib.metadata.metadata("pytrain")
    assert metadata["Version"] == pytrain.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [r for r in importlib.metadata.requires("pytrain") or [] if "extra ==" not in r]
    assert sorted(re.split(r"[><=]", r)[0] for r in required) == ["numpy", "torch"]


def test_the_package_is_typed() -> None:
    assert (FOLDER / "py.typed").exists()


def test_import_loads_at_most_forty_modules_beyond_torch() -> None:
    loaded = json.loads(output(sys.executable, "-c", LOADED))
    assert len(loaded) <= MODULE_LIMIT, loaded
    assert not [name for name in loaded if name.split(".")[0] in ("rich", "matplotlib", "sklearn", "scipy")]


def test_info_names_the_version_and_the_backend() -> None:
    text = output(sys.executable, "-m", "pytrain", "info")
    assert pytrain.__version__ in text
    assert "native" in text


def test_seed_everything_repeats_the_random_numbers_of_torch_python_and_numpy() -> None:
    def drawn() -> tuple[float, float, float]:
        assert pytrain.seed_everything(7, workers=True) == 7
        return torch.rand(()).item(), random.random(), float(numpy.random.rand())

    first = drawn()
    assert drawn() == first
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(ValueError, match=r"seed must be an int from 0 to 2\*\*32 - 1"):
            pytrain.seed_everything(seed)
