"""The second device that tests/devices.py lets a machine without a GPU stand in for one with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import CHOSEN, HOST, HOST_ONLY, SECOND, SecondDevice, randn

pytestmark = pytest.mark.skipif(CHOSEN != "cpu", reason="tensors are on another device already")


@pytest.fixture(autouse=True)
def second() -> Iterator[None]:
    torch.set_default_device(SECOND)
    with SecondDevice():
        yield
    torch.set_default_device(None)


def test_tensors_are_elsewhere_unless_they_are_said_to_be_here() -> None:
    there, here = torch.zeros(3), torch.zeros(3, device="cpu")
    assert there.device == SECOND and here.device == HOST
    assert (there + 1).device == torch.zeros_like(there).device == there[1:].device == SECOND
    assert (here + 1).device == torch.zeros_like(here).device == here[1:].device == HOST
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.nn.Linear(2, 2).weight.device == there.new_zeros(2).device == SECOND
    assert torch.zeros(2, device=there.device).device == SECOND and torch.zeros(2, device=here.device).device == HOST


def test_the_tests_that_are_skipped_elsewhere_are_there() -> None:
    names = [name.partition("\\[")[0] for names in HOST_ONLY.values() for name in names]
    texts = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert len(names) == len(set(names)) and [name for name in names if f"def {name}(" not in texts] == []


def test_moving_makes_a_copy() -> None:
    there = torch.zeros(3)
    here = there.cpu()
    here += 1
    back = here.to(there.device)
    back += 1
    assert there.sum() == 0 and here.sum() == 3 and back.sum() == 6 and back.device == SECOND
    assert here.to("cpu") is here and there.to(SECOND).device == SECOND


def test_assigned_memory_takes_its_place_along() -> None:
    there = torch.zeros(3)
    there.data = torch.ones(3, device="cpu")
    assert there.device == HOST
    there.data = torch.ones(3)
    assert there.device == SECOND


def test_tensors_of_both_are_refused_in_one_operation() -> None:
    there, here = torch.zeros(3), torch.ones(3, device="cpu")
    for mixed in (lambda: there + here, lambda: torch.equal(here, there), lambda: torch._foreach_add_([there], [here])):
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            mixed()
    there += torch.tensor(2.0, device="cpu")  # but for one number
    there.copy_(here)  # and for copies
    assert there.sum() == 3 and there.device == SECOND


def test_numpy_and_the_cpus_generators_are_refused() -> None:
    there = torch.zeros(3)
    for read in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="the tensor is on the second device"):
            read()
    assert there.cpu().numpy().sum() == 0
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="expected a generator of the second device"):
        torch.randn(3, generator=generator)
    drawn = randn(3, generator=generator, dtype=torch.float64)
    again = torch.randn(3, generator=generator.manual_seed(0), device="cpu", dtype=torch.float64)
    assert drawn.device == SECOND and torch.equal(drawn.cpu(), again)


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu", "expected one of cpu, cuda, second, got 'gpu'"), ("cuda", "torch finds no CUDA device here")],
)
def test_a_device_that_is_not_there_is_a_named_error(device: str, message: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "PYTRAIN_TEST_DEVICE": device}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and message in done.stdout + done.stderr
