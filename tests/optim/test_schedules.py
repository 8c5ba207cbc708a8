"""Schedules: their formulas, torch's where they coincide, resuming, and what they refuse."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, SequentialLR

import pytrain
from pytrain.optim import SGD, AdamW
from pytrain.optim.schedules import InverseSqrt, Schedule, WarmupCosine, WarmupLinear, WarmupStableDecay

Make = tuple[type[Schedule], dict[str, Any]]
CASES: list[Make] = [
    (WarmupCosine, {"warmup_steps": 4, "total_steps": 20, "min_factor": 0.1}),
    (WarmupCosine, {"warmup_steps": 0, "total_steps": 7}),
    (WarmupLinear, {"warmup_steps": 3, "total_steps": 11}),
    (WarmupStableDecay, {"warmup_steps": 2, "decay_steps": 5, "total_steps": 12}),
    (WarmupStableDecay, {"warmup_steps": 0, "decay_steps": 4, "total_steps": 4, "decay": "sqrt", "min_factor": 0.2}),
    (WarmupStableDecay, {"warmup_steps": 1, "decay_steps": 6, "total_steps": 9, "decay": "cosine"}),
    (InverseSqrt, {"warmup_steps": 5}),
    (InverseSqrt, {"warmup_steps": 0, "timescale": 8}),
]
IDS = [f"{cls.__name__}-{i}" for i, (cls, _) in enumerate(CASES)]


def optimizer_with(*lrs: float) -> torch.optim.Optimizer:
    return SGD([{"params": [Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=lrs[0])


def expected(cls: type[Schedule], o: dict[str, Any], n: int) -> float:
    """The factor of the n-th step, n from 1, as the docstrings have it."""
    warmup = o["warmup_steps"]
    if n <= warmup:
        return n / warmup
    after = n - 1 - warmup
    if cls is InverseSqrt:
        scale = o.get("timescale", max(1, warmup))
        return (1 + after / scale) ** -0.5
    low, total = o.get("min_factor", 0.0), o["total_steps"]
    if cls is WarmupStableDecay:
        x = min(max((n - 1 - total + o["decay_steps"]) / o["decay_steps"], 0.0), 1.0)
        kind = o.get("decay", "linear")
    else:
        x, kind = min(after / (total - warmup), 1.0), "cosine" if cls is WarmupCosine else "linear"
    left = {"linear": 1 - x, "cosine": math.cos(math.pi * x / 2) ** 2, "sqrt": 1 - x**0.5}[kind]
    return low * (1 - left) + left


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_every_step_has_the_documented_factor(cls: Any, options: dict[str, Any]) -> None:
    optimizer = optimizer_with(0.5, 2.0)
    schedule = cls(optimizer, **options)
    for n in range(1, 31):
        factor = expected(cls, options, n)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5 * factor, 2.0 * factor], abs=1e-15)
        assert schedule.table(n - 1, n).tolist() == [schedule.factor(n - 1)] == pytest.approx([factor], abs=1e-15)
        assert 0 <= schedule.factor(n - 1) <= 1
        optimizer.step()
        schedule.step()


def test_without_warm_up_the_cosine_is_torchs() -> None:
    a, b = optimizer_with(0.3), optimizer_with(0.3)
    ours, theirs = WarmupCosine(a, warmup_steps=0, total_steps=9, min_factor=0.1), CosineAnnealingLR(b, 9, 0.03)
    for _ in range(9):
        assert a.param_groups[0]["lr"] == pytest.approx(b.param_groups[0]["lr"], rel=1e-14)
        for optimizer, schedule in ((a, ours), (b, theirs)):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_it_goes_on_bit_for_bit_from_any_step(cls: Any, options: dict[str, Any]) -> None:
    def run(optimizer: torch.optim.Optimizer, schedule: Schedule, count: int) -> list[float]:
        seen = []
        for _ in range(count):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    one = optimizer_with(0.7)
    whole = run(one, cls(one, **options), 25)
    for at in (0, 1, 4, 13):
        a, b = optimizer_with(0.7), optimizer_with(0.7)
        first = cls(a, **options)
        run(a, first, at)
        file = io.BytesIO()
        torch.save([a.state_dict(), first.state_dict()], file)
        file.seek(0)
        second = cls(b, **options)
        for part, state in zip((b, second), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert run(b, second, 25 - at) == whole[at:]


def test_a_skipped_step_does_not_advance_it() -> None:
    p = Parameter(torch.ones(2))
    optimizer = AdamW([p], lr=1.0)
    schedule = WarmupLinear(optimizer, warmup_steps=4, total_steps=10)
    for bad in (False, True, True, False):
        p.grad = torch.tensor([float("nan") if bad else 1.0, 1.0])
        pytrain.step(optimizer, schedule=schedule)
    assert schedule.last_epoch == 2 and optimizer.param_groups[0]["lr"] == 0.75


def test_tensor_lr_and_torchs_combinations() -> None:
    lr = torch.tensor(0.8)
    optimizer = AdamW([Parameter(torch.ones(2))], lr=lr)
    schedule = WarmupLinear(optimizer, warmup_steps=4, total_steps=8)
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == pytest.approx(0.2)
    optimizer.step()
    schedule.step()
    assert lr.item() == pytest.approx(0.4)
    other = optimizer_with(1.0)
    parts = [LambdaLR(other, lambda _: 0.5), WarmupCosine(other, warmup_steps=0, total_steps=4)]
    sequence = SequentialLR(other, parts, [2])
    seen = []
    for _ in range(4):
        seen.append(other.param_groups[0]["lr"])
        other.step()
        sequence.step()
    assert seen == pytest.approx([0.5, 0.5, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4)])


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 50), st.integers(1, 50), st.floats(0, 1))
def test_the_way_up_rises_and_the_way_down_falls(warmup: int, rest: int, low: float) -> None:
    options = {"warmup_steps": warmup, "total_steps": warmup + rest, "min_factor": low}
    for schedule in (
        WarmupCosine(optimizer_with(1.0), **options),  # type: ignore[arg-type]
        WarmupLinear(optimizer_with(1.0), **options),  # type: ignore[arg-type]
        WarmupStableDecay(optimizer_with(1.0), decay_steps=rest, decay="sqrt", **options),  # type: ignore[arg-type]
        InverseSqrt(optimizer_with(1.0), warmup_steps=warmup),
    ):
        factors = schedule.table(0, warmup + rest + 5)
        assert (factors[:warmup].diff() > 0).all() and (factors[warmup:].diff() <= 1e-15).all()
        assert factors.max() <= 1 and (isinstance(schedule, InverseSqrt) or factors[-1] == pytest.approx(low))


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (WarmupCosine, {"warmup_steps": -1, "total_steps": 5}, "warmup_steps: expected an int >= 0, got -1"),
        (WarmupCosine, {"warmup_steps": 5, "total_steps": 5}, "total_steps: expected more than warmup_steps=5, got 5"),
        (WarmupCosine, {"warmup_steps": True, "total_steps": 5}, "warmup_steps: expected an int >= 0, got True"),
        (WarmupLinear, {"warmup_steps": 1, "total_steps": 2.0}, "total_steps: expected an int >= 1, got 2.0"),
        (WarmupLinear, {"warmup_steps": 1, "total_steps": 5, "min_factor": 1.5}, r"min_factor: .* \[0, 1\], got 1.5"),
        (WarmupStableDecay, {"warmup_steps": 3, "decay_steps": 3, "total_steps": 5}, "decay_steps: .*= 2, got 3"),
        (WarmupStableDecay, {"warmup_steps": 0, "decay_steps": 0, "total_steps": 5}, "decay_steps: .*>= 1, got 0"),
        (
            WarmupStableDecay,
            {"warmup_steps": 0, "decay_steps": 1, "total_steps": 5, "decay": "exp"},
            "decay: expected one of 'linear', 'cosine', 'sqrt', got 'exp'",
        ),
        (InverseSqrt, {"warmup_steps": 0, "timescale": 0}, "timescale: expected an int >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(optimizer_with(1.0), **options)
