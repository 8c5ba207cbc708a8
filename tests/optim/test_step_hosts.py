"""pytrain.step among others: windows of several optimizers, hooks, schedules, torch.compile, and budgets."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import (
    bits,
    gradients,
    make_params,
    needs_kernels,
    same_bits,
)
from step_cases import INF, NAN, copies, everything
from torch.nn import Parameter

import pytrain
from pytrain.amp import LossScaler
from pytrain.optim import REGISTRY, SGD, AdamW
from pytrain.steps import StepWindow

# ---- windows of several optimizers ----------------------------------------------------------------------------------


def test_a_window_moves_the_scale_once() -> None:
    p, q = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    a, b = SGD([p], lr=1.0), torch.optim.SGD([q], lr=1.0)
    scaler = LossScaler(init_scale=4.0, growth_interval=1)
    with pytrain.open_step([a, b], scaler) as window:
        scaler.scale(p * 2.0).backward()
        assert window.step(a, max_norm=1.0).grad_norm == 2.0
        scaler.scale(q * 3.0).backward()
        info = window.step(b)
        assert info.grad_norm == 3.0 and info.scale == 4.0
        with pytest.raises(RuntimeError, match="end of its open_step"):
            scaler.update()
        with pytest.raises(RuntimeError, match="under way"):
            pytrain.step(a, scaler)
        with pytest.raises(RuntimeError, match="has already stepped"):
            window.step(a)
        with pytest.raises(RuntimeError, match="none of the optimizers"):
            window.step(SGD([p]))
    assert scaler.get_scale() == 8.0 and q.item() == -2.0
    with pytest.raises(RuntimeError, match="closed"):
        window.step(a)


def test_a_window_that_is_left_open_is_an_error_and_moves_nothing() -> None:
    p, q = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    a, b, scaler = SGD([p], lr=1.0), AdamW([q]), LossScaler(init_scale=4.0, growth_interval=1)
    p.grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="before AdamW stepped"), pytrain.open_step([a, b], scaler) as window:
        window.step(a)
    assert scaler.get_scale() == 4.0
    with pytest.raises(ZeroDivisionError), pytrain.open_step([a, b], scaler) as window:
        window.step(a)
        raise ZeroDivisionError
    assert scaler.get_scale() == 4.0
    assert pytrain.step(a, scaler).applied and scaler.get_scale() == 8.0  # and the scaler is free again


def test_a_step_left_open_by_hand_is_an_error() -> None:
    p, q = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    a, b, scaler = SGD([p], lr=1.0), SGD([q], lr=1.0), LossScaler()
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    scaler.step(a)
    with pytest.raises(RuntimeError, match="SGD has stepped under this scaler and the step was left open"):
        pytrain.step(b, scaler)
    scaler.update()
    assert pytrain.step(b, scaler).applied


def test_a_skip_of_an_optimizer_that_steps_in_backward_is_told_and_not_averaged() -> None:
    model = torch.nn.Linear(80, 80)
    optimizer = AdamW(model.parameters(), state_dtype="8bit", step_in_backward=True)
    average = pytrain.ema.EMA(model)
    for bad, applied in ((1.0, True), (NAN, False), (1.0, True)):
        (model(torch.ones(1, 80)).sum() * bad).backward()
        assert pytrain.step(optimizer, ema=average).applied == applied
    assert average.steps == 2


def test_gan_with_growth_and_overflow_at_every_step() -> None:
    """Whatever the scale does, each optimizer uses the true gradient: 2 and 3."""
    for bad_at in range(6):
        for who in (0, 1):
            p, q = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
            optimizers = [SGD([p], lr=1.0), SGD([q], lr=1.0)]
            scaler, applied = LossScaler(init_scale=8.0, growth_interval=2), [0, 0]
            for step in range(6):
                with pytrain.open_step(optimizers, scaler) as window:
                    for i, (param, grad) in enumerate(((p, 2.0), (q, 3.0))):
                        optimizers[i].zero_grad()
                        factor = INF if step == bad_at and i == who else grad
                        scaler.scale(param * factor).backward()
                        applied[i] += int(window.step(optimizers[i]).applied)
            assert applied == [5 if who == 0 else 6, 5 if who == 1 else 6]
            assert [p.item(), q.item()] == [-2.0 * applied[0], -3.0 * applied[1]]


# ---- hosts, hooks, budgets ------------------------------------------------------------------------------------------


def test_hooks_run_and_an_inf_that_one_brings_in_is_skipped() -> None:
    p = Parameter(torch.ones(2))
    optimizer, seen = AdamW([p]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    p.grad = torch.ones(2)
    info = pytrain.step(optimizer)
    assert info.applied and seen == ["before", "after"]
    assert info.grad_norm == 2.0**0.5  # of what the hook has met
    assert info.group_norms[0][0] == pytest.approx(2.0**0.5, rel=4e-16)  # torch.sqrt may be one ulp off

    def spoil(*_: Any) -> None:
        assert p.grad is not None
        p.grad[0] = NAN

    optimizer.register_step_pre_hook(spoil)
    before = copies(everything(optimizer))
    assert not pytrain.step(optimizer).applied and same_bits(before, everything(optimizer))


def test_a_replaced_step_is_called() -> None:
    """Accelerate and torch's schedulers replace optimizer.step."""
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer, calls = SGD([p], lr=1.0), []
    original = optimizer.step
    optimizer.step = lambda *a: (calls.append(1), original(*a))[1]  # type: ignore[method-assign, func-returns-value]
    assert pytrain.step(optimizer, max_norm=1.0).applied and calls == [1]
    assert p[0].item() == pytest.approx(1 - 1 / (math.sqrt(2) + 1e-6), rel=1e-6)


def test_a_torch_schedule_does_not_warn_of_a_missing_step() -> None:
    p = Parameter(torch.ones(2))
    optimizer = SGD([p], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    p.grad = torch.ones(2)
    pytrain.step(optimizer, schedule=schedule)  # warnings are errors here
    assert schedule.get_last_lr() == [0.5]


def test_it_works_under_torch_compile() -> None:
    p = Parameter(torch.ones(2))
    optimizer = SGD([p], lr=1.0)

    def body() -> pytrain.StepInfo:
        optimizer.zero_grad()
        (p * 2).sum().backward()
        return pytrain.step(optimizer, max_norm=100.0)

    compiled = torch.compile(body, backend="eager")
    for _ in range(3):
        info = compiled()
    assert info.applied and p.tolist() == [-5.0, -5.0]


def test_swapped_parameters_are_not_stepped() -> None:
    p = Parameter(torch.ones(2))
    optimizer = AdamW([p], ema_decay=0.5)
    p.grad = torch.ones(2)
    pytrain.step(optimizer)
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="averages"):
        pytrain.step(optimizer)


@needs_kernels
@pytest.mark.parametrize("count", [1, 300])
def test_a_whole_step_takes_at_most_60_calls_whatever_the_number_of_tensors(count: int) -> None:
    params = make_params(torch.float32, [(8,)] * count)
    for p in params:
        p.grad = torch.ones(8)
    optimizer, scaler = AdamW(params), LossScaler()
    for _ in range(2):
        pytrain.step(optimizer, scaler, max_norm=1.0)
    calls: list[str] = []

    def count_calls(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(frame.f_code.co_name if event == "call" else str(argument))

    sys.setprofile(count_calls)
    pytrain.step(optimizer, scaler, max_norm=1.0)
    sys.setprofile(None)
    assert len(calls) - 1 <= 60, calls  # the last one is setprofile


def test_the_whole_step_stands_in_one_function_of_at_most_60_lines() -> None:
    source = Path(inspect.getfile(StepWindow)).read_text()
    take = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "take")
    lines = source.splitlines()[take.lineno - 1 : take.end_lineno]
    assert len(lines) <= 60
    text = "\n".join(lines)
    places = [text.index(word) for word in ("PASS 1", "AGREE", "CONTROL", "PASS 2")]
    assert places == sorted(places)


def test_the_registry_takes_part_as_it_is() -> None:
    own = [name for name, cls in REGISTRY.items() if not cls.takes_control]
    assert own == [] or set(own) <= {"muon", "adafactor"}


def test_parameters_without_gradients_are_left_alone() -> None:
    params = make_params(torch.float32, [(3,), (4,)])
    optimizer = AdamW(params)
    assert pytrain.step(optimizer).applied and not optimizer.state
    params[1].grad = torch.ones(4)
    assert pytrain.step(optimizer, max_norm=1.0).grad_norm == 2.0
    assert params[0] not in optimizer.state and optimizer.state[params[1]]["step"] == 1
    params[0].grad, params[1].grad = torch.ones(3), None
    pytrain.step(optimizer)
    assert [float(optimizer.state[p]["step"]) for p in params] == [1.0, 1.0]


def test_bits_do_not_depend_on_a_clip_that_does_nothing() -> None:
    params, twins = make_params(torch.float32), make_params(torch.float32)
    a, b = AdamW(params), AdamW(twins)
    for p, q, g in zip(params, twins, gradients(params, 0), strict=True):
        p.grad, q.grad = g, g.clone()
    pytrain.step(a, max_norm=1e9)
    b.step()
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(everything(a), everything(b), strict=True))
