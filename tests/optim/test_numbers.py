"""Numbers at the edges: betas of zero, eps of zero, late steps, infinite parameters, every small size."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from devices import there
from optim_cases import (
    CASES,
    DTYPES,
    LR,
    VARIANTS,
    error,
    fastest,
    largest,
    like,
    needs_kernels,
    ours,
    same_bits,
    torch_class,
)
from torch import Tensor
from torch.nn import Parameter

from pytrain.optim import REGISTRY
from pytrain.optim.base import Rule


def rule_of(name: str, options: dict[str, Any]) -> Rule:
    """The rule that these options select; Rprop's takes no learning rate."""
    optimizer = ours(name, [Parameter(torch.ones(1))], **options)
    return optimizer.rule(optimizer.param_groups[0])


NAMES = list(VARIANTS)
COUNTING = [name for name in NAMES if REGISTRY[name].steps_in_state]
BIASED = [  # those that divide by 1 - beta^t, and keep no other number than t
    name
    for name in COUNTING
    if torch_class(name) and "betas" in inspect.signature(REGISTRY[name]).parameters and name != "nadam"
]
# Each goes to every optimizer that takes these arguments.
EDGES: list[dict[str, Any]] = [
    {"betas": (0.0, 0.99)},
    {"betas": (0.5, 0.999)},
    {"eps": 0.0},
    {"eps": 1.0},
    {"weight_decay": 0.0},
    {"momentum": 1.0},
    {"momentum": 0.9, "dampening": 1.0},
]


def takes(name: str, options: dict[str, Any]) -> bool:
    """Whether the optimizer has these arguments, and these values are in their ranges."""
    if not options.keys() <= inspect.signature(REGISTRY[name]).parameters.keys():
        return False
    try:
        ours(name, [Parameter(torch.ones(1))], **options)
    except (ValueError, IndexError):
        return False
    return True


EDGE_CASES = [
    pytest.param(name, options, id=f"{name}-{options}") for name in NAMES for options in EDGES if takes(name, options)
]


def wide_gradients(n: int, steps: int) -> list[Tensor]:
    """Gradients over twelve decades, none of them zero."""
    generator = torch.Generator().manual_seed(5)
    shape = (steps, n)
    sign = torch.randint(2, shape, generator=generator, device="cpu").double() * 2 - 1
    return list(there(sign * 10.0 ** (torch.rand(shape, generator=generator, device="cpu").double() * 12 - 9)))


def walk(optimizer: torch.optim.Optimizer, p: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Step a parameter along gradients, cast to its dtype."""
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return [p]


def torch_or_ours(name: str, p: Tensor, options: dict[str, Any]) -> torch.optim.Optimizer:
    """torch's plain loop in fp64 and its fused step below, or our reference where torch has no such optimizer."""
    cls = torch_class(name)
    if cls is None:
        return ours(name, [p], fused=False, **options)
    how = {"foreach": False} if p.dtype == torch.float64 else fastest(name)
    return cls([p], lr=LR, **how, **options)  # type: ignore[call-arg]


@needs_kernels
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("name", "options"), EDGE_CASES)
def test_edges_of_the_hyperparameters_are_as_exact_as_torch(
    name: str, options: dict[str, Any], fused: bool | None
) -> None:
    n, grads = 200, wide_gradients(200, 12)
    start = torch.linspace(-1, 1, n)
    exact = Parameter(start.double())
    walk(torch_or_ours(name, exact, options), exact, [g.float().double() for g in grads])
    theirs, mine = Parameter(start.clone()), Parameter(start.clone())
    walk(torch_or_ours(name, theirs, options), theirs, grads)
    walk(ours(name, [mine], fused=fused, **options), mine, grads)
    rounding = torch.finfo(torch.float32).eps * max(1.0, largest([exact]))
    assert error([mine], [exact]) <= max(rounding, 2 * error([theirs], [exact]))


@needs_kernels
@pytest.mark.parametrize("t", [1000.0, 123_457.0, 1e6])
@pytest.mark.parametrize("name", BIASED)
def test_late_steps_agree_with_torch(name: str, t: float) -> None:
    """beta^t by repeated squaring is off by at most t units in its last place, and the step divides by 1 - beta^t."""
    finals, moved = [], 0.0
    for make in (REGISTRY[name], torch_class(name)):
        p = Parameter(torch.linspace(-1, 1, 50).double())
        optimizer = make([p], lr=LR, betas=(0.9, 0.9999))  # type: ignore[misc, call-arg]
        p.grad = torch.linspace(1, 2, 50).double()
        optimizer.step()
        optimizer.state[p]["step"].fill_(t)
        before = like([p])
        optimizer.step()
        finals.append(p)
        moved = error([p], before)
        assert optimizer.state[p]["step"].item() == t + 1
    rounding = torch.finfo(torch.float64).eps
    power = 0.9999 ** (t + 1)
    assert error([finals[0]], [finals[1]]) <= (4 + moved * (4 + t * power / (1 - power))) * rounding


@needs_kernels
@pytest.mark.parametrize("name", COUNTING)
def test_a_step_count_that_fp32_cannot_raise_stays(name: str) -> None:
    """As in torch: 2^24 + 1 is 2^24 in fp32."""
    p = Parameter(torch.ones(3))
    optimizer = ours(name, [p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["step"].fill_(2.0**24)
    optimizer.step()
    assert optimizer.state[p]["step"].item() == 2.0**24 and p.isfinite().all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if "lr" in rule_of(*case.values).hypers])
def test_a_learning_rate_of_zero_changes_no_bit(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    p = Parameter(torch.linspace(-3, 3, 77).to(dtype))
    before = like([p])
    optimizer = REGISTRY[name]([p], lr=0.0, **options)  # type: ignore[call-arg, arg-type]
    for _ in range(3):
        p.grad = torch.linspace(1, -2, 77).to(dtype)
        optimizer.step()
    assert same_bits([p], before)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), [case for case in CASES if not rule_of(*case.values).sums])
def test_every_size_from_0_to_70_is_right(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    whole = torch.linspace(-1, 1, 70)
    grads = [torch.linspace(1, -1, 70) + 0.25, torch.linspace(-1, 2, 70)]
    params = [Parameter(whole[:n].to(dtype)) for n in range(71)]
    optimizer = ours(name, params, **options)
    for g in grads:
        for n, p in enumerate(params):
            p.grad = g[:n].to(dtype)
        optimizer.step()
    exact, theirs = Parameter(whole.to(dtype).double()), Parameter(whole.to(dtype))
    walk(torch_or_ours(name, exact, options), exact, [g.to(dtype).double() for g in grads])
    walk(torch_or_ours(name, theirs, options), theirs, grads)
    rounding = torch.finfo(dtype).eps * largest([exact])
    allowed = 2 * rounding if dtype == torch.float64 else max(rounding, 2 * error([theirs], [exact]))
    for n, p in enumerate(params):
        assert n == 0 or error([p], [exact[:n]]) <= allowed, n
        assert same_bits([p], [params[70][:n]])
