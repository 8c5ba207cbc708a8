"""Tensors of 2^31 elements and more: bug class 1 of fused optimizers, on memory that is really that large."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from optim_cases import needs_kernels
from torch.nn import Parameter

from pytrain.optim import SGD, AdamW

NUMEL = 2**31 + 4096 + 5
CHANGED = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, NUMEL - 1]  # an index of 32 bits would miss, or hit another


def needs_memory(gib: int) -> pytest.MarkDecorator:
    """Skip where so much is not free."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        free = 0
    return pytest.mark.skipif(free < gib << 30, reason=f"needs {gib} GiB of free memory")


def step_once(cls: Any, **options: Any) -> tuple[Parameter, Any]:
    """One step of a bf16 parameter whose gradient is zero but for a few elements."""
    p = Parameter(torch.zeros(NUMEL, dtype=torch.bfloat16))
    p.grad = torch.zeros_like(p)
    p.grad[CHANGED] = 1.0
    optimizer = cls([p], lr=1.0, fused=True, **options)
    optimizer.step()
    return p, optimizer


def check(p: Parameter) -> None:
    """Exactly the elements that had a gradient went down by lr."""
    assert p.detach()[CHANGED].tolist() == [-1.0] * len(CHANGED)
    assert p.detach().count_nonzero() == len(CHANGED)


@needs_kernels
@needs_memory(11)
def test_every_element_of_two_to_the_31_is_stepped() -> None:
    check(step_once(SGD)[0])


@pytest.mark.slow
@needs_kernels
@needs_memory(16)
def test_every_code_and_scale_of_two_to_the_31_is_written() -> None:
    p, optimizer = step_once(AdamW, weight_decay=0.0, state_dtype="8bit", rounding="stochastic")
    check(p)
    codes = optimizer.state[p]["exp_avg"]
    assert codes.count_nonzero() == len(CHANGED) and bool((codes[CHANGED] != 0).all())
