"""What all tests share: a header that says what is tested where, and a guard over torch's global settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pytrain import backend


def pytest_report_header() -> str:
    """The torch, the kernels and the machine's instruction sets, so that every skip can be understood."""
    if backend.facts is None:
        return f"pytrain: torch {torch.__version__}, no kernels ({backend.why_not_loaded})"
    levels = ", ".join(level if has else f"no {level}" for level, has in backend.facts.isa_levels().items())
    return f"pytrain: torch {torch.__version__}, kernels by {backend.facts.compiler}, this machine has {levels}"


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
