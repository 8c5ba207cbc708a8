"""What all tests share: the device they run on, a header that says so, and a guard over torch's global settings."""

from __future__ import annotations

from collections.abc import Iterator

import devices
import pytest
import torch

from pytrain import backend

devices.choose()  # before the tests are read: some of them make tensors then


def pytest_report_header() -> str:
    """The torch, the kernels and the machine's instruction sets, so that every skip can be understood."""
    if backend.facts is None:
        return f"pytrain: torch {torch.__version__}, no kernels ({backend.why_not_loaded})"
    levels = ", ".join(level if has else f"no {level}" for level, has in backend.facts.isa_levels().items())
    kernels = f"kernels by {backend.facts.compiler}"
    return f"pytrain: torch {torch.__version__}, tensors on {devices.CHOSEN}, {kernels}, this machine has {levels}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what only the CPU's own loops have, where tensors are elsewhere."""
    for item in items:
        if reason := devices.why_not(item.name):
            item.add_marker(pytest.mark.skip(reason=reason))


def global_settings() -> dict[str, object]:
    """What one test could spoil for the next."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "instruction set": backend.isa() if backend.facts else None,
        "swap on conversion": torch.__future__.get_swap_module_params_on_conversion(),
    }


@pytest.fixture(autouse=True)
def settings_are_left_as_found() -> Iterator[None]:
    """Fail the test that leaves a global setting changed, not the one after it."""
    before = global_settings()
    yield
    assert global_settings() == before
