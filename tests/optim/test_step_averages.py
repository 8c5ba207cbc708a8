"""Averages that pass 2 of pytrain.step moves: the same bits as an update() after each applied step."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from devices import randn
from optim_cases import VARIANTS, bits, gradients, ours
from torch import Tensor, nn

import pytrain
from pytrain.amp import LossScaler
from pytrain.ema import EMA, SWA, Average
from pytrain.optim import REGISTRY, SGD, AdamW

INF = float("inf")
MAKERS = [
    pytest.param(lambda model: EMA(model, 0.7), id="EMA"),
    pytest.param(lambda model: EMA(model, 0.2, start_step=2, every=2), id="EMA late"),
    pytest.param(lambda model: SWA(model), id="SWA"),
    pytest.param(lambda model: SWA(model, start_step=3), id="SWA late"),
]


class Model(nn.Module):
    """A few parameters of odd shapes; one is frozen, one never has a gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = [(5,), (33, 7), (5000,), ()]
        values = [randn(shape, generator=generator).to(dtype) for shape in shapes]
        self.parts = nn.ParameterList(nn.Parameter(value) for value in values)
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.idle = nn.Parameter(torch.ones(2, dtype=dtype))


def give_gradients(model: Model, step: int) -> None:
    for i, (p, g) in enumerate(zip(model.parts, gradients(list(model.parts), step), strict=True)):
        p.grad = None if i == 0 and step % 3 == 1 else g  # this one is left out at times
    if step == 4:
        model.parts[1].grad[0, 0] = INF  # type: ignore[index]


def averages_of(average: Average) -> list[Tensor]:
    return [average.averages[id(p)] for p in average.params]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "torch path"])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", VARIANTS)
def test_pass_two_averages_as_an_update_after_each_applied_step(name: str, make: Any, fused: bool | None) -> None:
    model, twin = Model(), Model()
    a, b = ours(name, list(model.parameters()), fused=fused), ours(name, list(twin.parameters()), fused=fused)
    inside, beside = make(model), make(twin)
    for step in range(8):
        give_gradients(model, step)
        give_gradients(twin, step)
        one, two = pytrain.step(a, ema=inside), pytrain.step(b)
        assert bool(one.applied) == bool(two.applied) == (step != 4)
        if two.applied:
            beside.update()
        assert (inside.steps, inside.n_averaged) == (beside.steps, beside.n_averaged)
        assert same(averages_of(inside), averages_of(beside))
        assert same(list(model.parameters()), list(twin.parameters()))  # type: ignore[arg-type]


def test_torchs_optimizers_have_averages_too() -> None:
    model, twin = Model(), Model()
    a, b = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(twin.parameters())
    inside, beside = EMA(model, 0.5), EMA(twin, 0.5)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(twin, step)
        pytrain.step(a, ema=inside)
        b.step()
        beside.update()
    assert same(averages_of(inside), averages_of(beside))


def test_a_skipped_step_leaves_the_averages_and_their_count() -> None:
    for make in (EMA, SWA):
        model = Model()
        optimizer, average = AdamW(model.parameters()), make(model)
        for step in (0, 1):
            give_gradients(model, step)
            pytrain.step(optimizer, ema=average)
        before = [x.clone() for x in averages_of(average)]
        give_gradients(model, 4)
        assert not pytrain.step(optimizer, LossScaler(init_scale=1.0), ema=average).applied
        assert same(before, averages_of(average)) and (average.steps, average.n_averaged) == (2, 2)


def test_of_two_optimizers_the_skipped_one_keeps_its_averages() -> None:
    model = Model()
    optimizers = [SGD([model.parts[1]], lr=0.1), SGD([model.parts[2]], lr=0.1)]
    average = EMA(model, 0.5)
    for step in (0, 2, 4):
        give_gradients(model, step)
        before = [x.clone() for x in averages_of(average)]
        applied = pytrain.step(optimizers, ema=average).applied.tolist()
        assert applied == [step != 4, True]
    moved = [not same([x], [y]) for x, y in zip(before, averages_of(average), strict=True)]
    at = {id(p): i for i, p in enumerate(average.params)}
    assert not moved[at[id(model.parts[1])]] and moved[at[id(model.parts[2])]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_master_the_average_is_of_the_master(dtype: torch.dtype) -> None:
    model = Model(dtype)
    optimizer, average = AdamW(model.parameters(), lr=1e-5, master_weights=True), EMA(model, 0.5)
    p, masters = model.parts[2], []
    for step in (0, 2):
        give_gradients(model, step)
        pytrain.step(optimizer, ema=average)
        masters.append(optimizer.state[p]["master"].clone())
    found = average.averages[id(p)]
    assert found.dtype == torch.float32 and torch.equal(found, masters[1] - (masters[1] - masters[0]) * 0.5)
    assert (found != p.float()).sum() > 4000  # steps of 1e-5 hardly show in the parameter


def test_the_average_of_one_step_is_not_touched_by_steps_without_it() -> None:
    model = Model()
    optimizer, average = AdamW(model.parameters()), EMA(model, 0.5)
    give_gradients(model, 0)
    pytrain.step(optimizer, ema=average)
    before = [x.clone() for x in averages_of(average)]
    pytrain.step(optimizer)
    optimizer.step()
    assert same(before, averages_of(average))


def test_a_parameter_whose_strides_changed_is_still_averaged() -> None:
    model = Model()
    optimizer, average = AdamW(model.parameters()), EMA(model, 0.5)
    model.parts[1].data = model.parts[1].data.t().contiguous().t()
    for step in (0, 2):
        give_gradients(model, step)
        pytrain.step(optimizer, ema=average)
    expected = model.parts[1].detach()
    assert average.n_averaged == 2 and (average.averages[id(model.parts[1])] - expected).abs().max() < 2e-3


def test_swapped_parameters_are_not_stepped() -> None:
    model = Model()
    optimizer, average = AdamW(model.parameters()), EMA(model)
    give_gradients(model, 0)
    pytrain.step(optimizer, ema=average)
    with average.swap(), pytest.raises(RuntimeError, match="leave the swap"):
        pytrain.step(optimizer, ema=average)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_scaler_schedule_and_average_resume_bit_for_bit_at_any_step(name: str, make: Any) -> None:
    def build() -> tuple[Any, ...]:
        model = Model()
        optimizer = REGISTRY[name](model.parameters(), lr=0.01)  # type: ignore[call-arg, arg-type]
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return model, optimizer, schedule, LossScaler(init_scale=8.0, growth_interval=2), make(model)

    def run(parts: tuple[Any, ...], begin: int, end: int) -> list[Tensor]:
        model, optimizer, schedule, scaler, average = parts
        for step in range(begin, end):
            give_gradients(model, step)
            for p in model.parts:
                if p.grad is not None:
                    p.grad = scaler.scale(p.grad)
            pytrain.step(optimizer, scaler, max_norm=1.0, schedule=schedule, ema=average)
        lr = torch.tensor([optimizer.param_groups[0]["lr"], scaler.get_scale()])
        return [*model.parameters(), *averages_of(average), lr]

    whole = [x.clone() for x in run(build(), 0, 8)]
    for at in range(8):
        first, second = build(), build()
        run(first, 0, at)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert same(whole, run(second, at, 8))
