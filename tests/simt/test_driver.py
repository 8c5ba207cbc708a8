"""The CUDA kernels on the CPU without torch: every launch against a plain reference, in other orders too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from mutate_cuda import CUDA, FAULTS, plant

from build import FLAGS, INCLUDES, ROOT, build


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver with the library of kernels that the other tests load."""
    library = build()
    made = tmp_path_factory.mktemp("simt") / "driver"
    source = ROOT / "tests" / "simt" / "driver.cpp"
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    command = [os.environ.get("CXX", "g++"), *FLAGS, *INCLUDES, "-O1", str(source), *link, "-o", str(made)]
    subprocess.run(command, check=True)
    return made


@pytest.mark.parametrize("area", ["fp32", "fp64", "mixed", "stats", "control", "copy"])
def test_launches_give_the_references_bits_in_any_order(driver: Path, area: str) -> None:
    done = subprocess.run([str(driver), "few", area], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.rstrip().endswith(" passed, 0 failed"), done.stdout + done.stderr


def test_budgets_are_the_arithmetic_of_the_storage() -> None:
    """No step moves more than each number in and each changed number out."""
    budgets = json.loads((ROOT / "tests" / "simt" / "budgets.json").read_text())
    assert budgets["adamw in fp32"]["bytes"] == 28.0
    assert budgets["adamw in fp32, averaged, gradients zeroed, with pass 1"]["bytes"] == 44.0
    for name, budget in budgets.items():
        if "least" in budget and "one element off" not in name:
            assert budget["bytes"] == budget["least"], name
        if "codes" not in name and "off" not in name:
            assert budget["efficiency"] >= 0.99, name
        if name.endswith(" in fp32"):
            assert set(budget["accesses"]) == {"16"}, name


def test_planted_faults_still_have_their_place() -> None:
    assert len(FAULTS) >= 20 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        text = (CUDA / fault.file).read_text()
        assert plant(fault, text) != text
