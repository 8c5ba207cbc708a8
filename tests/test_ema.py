"""EMA and SWA: when averages are taken, and that they are those of torch's AveragedModel to rounding."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from devices import randn
from ema_cases import (
    DECAY,
    KINDS,
    SETTINGS,
    STEPS,
    Net,
    copies,
    error,
    exact,
    listed,
    made,
    same_bits,
    torchs,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pytrain.optim
from pytrain.ema import EMA, SWA, Average, average_

OPTIMIZERS = [pytest.param(torch.optim.AdamW, id="torch"), pytest.param(pytrain.optim.AdamW, id="pytrain")]


# ---- the same as torch's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_a_training_are_those_of_averaged_model(
    kind: type[Average], dtype: torch.dtype, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    model = Net().to(dtype)
    average, theirs = made(kind, model), torchs(kind, model)
    history = []

    def after(step: int) -> None:
        average.update()
        theirs.update_parameters(model)
        history.append(copies(model.parameters()))

    train(model, optimizer(model.parameters(), lr=0.05, weight_decay=0.1), after)
    truth, found = exact(kind, history), list(theirs.module.parameters())
    assert 0 < error(listed(average), truth) <= 2 * error(found, truth)
    assert average.steps == average.n_averaged == STEPS == int(theirs.n_averaged)
    assert not same_bits(history[0], history[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_average_of_a_frozen_parameter_is_the_parameter(kind: type[Average]) -> None:
    model = Net()
    average = made(kind, model)
    train(model, torch.optim.AdamW(model.parameters(), lr=0.05), lambda step: average.update(), thaw=STEPS + 1)
    frozen = list(model.frozen.parameters())
    assert same_bits([average.averages[id(p)] for p in frozen], frozen)


def test_the_first_average_is_a_copy_also_after_the_model_was_loaded() -> None:
    model = nn.Linear(3, 2)
    average = EMA(model)
    model.load_state_dict({"weight": torch.full((2, 3), 7.0), "bias": torch.full((2,), -1e30)})
    average.update()
    assert same_bits(listed(average), model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_low_precision_are_fp32_and_move(dtype: torch.dtype) -> None:
    model, wide = nn.Linear(16, 4).to(dtype), nn.Linear(16, 4)
    with torch.no_grad():
        for p in (*model.parameters(), *wide.parameters()):
            p.fill_(1.0)
    average, as_wide = EMA(model, 0.9999), EMA(wide, 0.9999)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    for _ in range(20):
        with torch.no_grad():
            for p in (*model.parameters(), *wide.parameters()):
                p += 0.0625
        average.update()
        as_wide.update()
        theirs.update_parameters(model)
    assert same_bits(listed(average), listed(as_wide))  # as exact as beside fp32 parameters
    assert all((a > 1.0625).all() for a in listed(average))
    assert all((p == 1.0625).all() for p in theirs.module.parameters())  # torch's has not moved at all
    with average.swap():
        assert same_bits(model.parameters(), [a.to(dtype) for a in listed(average)])


def test_averages_have_their_parameters_strides_and_no_gradient() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    average = EMA(model)
    average.update()
    for p, a in zip(average.params, listed(average), strict=True):
        assert a.stride() == p.stride() and not a.requires_grad and type(a) is Tensor
        assert a.data_ptr() != p.data_ptr()
    model.weight.data = model.weight.data.contiguous() + 1.0  # other strides, the same parameter
    average.update()
    assert average.averages[id(model.weight)].is_contiguous(memory_format=torch.channels_last)


def test_tied_parameters_are_averaged_once() -> None:
    model = Net()
    average = EMA(model)
    assert [id(p) for p in average.params] == [id(p) for p in model.parameters()]
    assert len(average.averages) == len(average.params)


def test_complex_parameters_are_averaged_as_their_parts_are() -> None:
    model, parts = nn.Linear(3, 2, dtype=torch.complex64), nn.Module()
    parts.weight = nn.Parameter(torch.view_as_real(model.weight.detach()).clone())
    parts.bias = nn.Parameter(torch.view_as_real(model.bias.detach()).clone())
    a, b = EMA(model, DECAY), EMA(parts, DECAY)
    for step in range(5):
        for p, q in zip(model.parameters(), parts.parameters(), strict=True):
            p.data += step * (1 - 2j)
            q.data += torch.tensor([1.0, -2.0]) * step
        a.update()
        b.update()
    assert same_bits(map(torch.view_as_real, listed(a)), listed(b))


# ---- one average, to the bit -----------------------------------------------------------------------------------------

FLOATS = {torch.float32: (np.float32, 32), torch.float64: (np.float64, 64)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight", [1e-3, 0.1, 1.0 / 3.0, 0.5 - 1e-12, 0.5, 0.7, 1.0 - 1e-9, 1.0])
def test_an_average_is_lerp_rounded_after_each_operation(weight: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(), (0,), (1,), (67,), (9, 11)]
    averages = [randn(s, generator=generator, dtype=dtype) for s in shapes]
    params = [randn(s, generator=generator, dtype=dtype) for s in shapes]
    kind = FLOATS[dtype][0]
    w, one = kind(weight), kind(1)
    both = [(a.cpu().numpy().copy(), b.cpu().numpy()) for a, b in zip(averages, params, strict=True)]
    wanted = [a + w * (b - a) if w < kind(0.5) else b - (b - a) * (one - w) for a, b in both]
    average_(averages, params, weight)
    for found, want in zip(averages, wanted, strict=True):
        assert found.cpu().numpy().tobytes() == np.asarray(want).tobytes()


@SETTINGS
@given(data=st.data(), dtype=st.sampled_from(list(FLOATS)), weight=st.floats(2.0**-60, 1.0))
def test_an_average_is_within_the_rounding_of_its_operations(data: Any, dtype: torch.dtype, weight: float) -> None:
    numbers = st.floats(-1e6, 1e6, width=FLOATS[dtype][1]).filter(lambda x: x == 0 or abs(x) > 1e-6)
    a, b = data.draw(numbers), data.draw(numbers)
    average = torch.tensor([a], dtype=dtype)
    average_([average], [torch.tensor([b], dtype=dtype)], weight)
    w = Fraction(weight)
    truth = Fraction(a) + w * (Fraction(b) - Fraction(a))
    # The weight, the difference, the product and the sum are each rounded to half an ulp; each of the two forms has a
    # share of the difference that is at most its larger one. Twice that covers the products of the errors.
    half_ulp, span = Fraction(torch.finfo(dtype).eps) / 2, abs(Fraction(b) - Fraction(a))
    share = w if w < Fraction(1, 2) else 1
    assert abs(Fraction(average.item()) - truth) <= 2 * half_ulp * (3 * share * span + abs(truth))


# ---- when an average is taken ----------------------------------------------------------------------------------------


def test_next_weight_says_what_the_next_step_does() -> None:
    model = nn.Linear(2, 2)
    ema, swa = EMA(model, 0.75, start_step=2, every=3), SWA(model, start_step=1)
    weights = []
    for _ in range(12):
        weights.append((ema.next_weight(), swa.next_weight()))
        ema.update()
        swa.update()
    assert [e for e, _ in weights] == [0, 0, 0, 0, 1, 0, 0, 0.25, 0, 0, 0.25, 0]
    assert [s for _, s in weights] == [0, 1] + [1 / n for n in range(2, 12)]
    assert (ema.steps, ema.n_averaged, swa.steps, swa.n_averaged) == (12, 3, 12, 11)


@pytest.mark.parametrize(("start_step", "every"), [(0, 1), (0, 2), (5, 1), (4, 3), (STEPS - 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_start_step_and_every_choose_the_averaged_steps(kind: type[Average], start_step: int, every: int) -> None:
    model = Net()
    average, theirs, history = made(kind, model, start_step=start_step, every=every), torchs(kind, model), []

    def after(step: int) -> None:
        average.update()
        if step in range(start_step + every, STEPS + 1, every):
            theirs.update_parameters(model)
            history.append(copies(model.parameters()))

    train(model, torch.optim.AdamW(model.parameters(), lr=0.05), after)
    truth = exact(kind, history)
    assert error(listed(average), truth) <= 2 * error(list(theirs.module.parameters()), truth)
    assert average.steps == STEPS and average.n_averaged == len(history)


@pytest.mark.parametrize("kind", KINDS)
def test_advance_averages_what_the_optimizers_own_loop_has_not(kind: type[Average]) -> None:
    models = [Net(), Net()]
    whole, shared = (made(kind, model, start_step=1, every=2) for model in models)
    own = set(map(id, shared.params[::2]))
    for step in range(9):
        for model in models:
            for i, p in enumerate(model.parameters()):
                p.data += (step + 1) * 0.1 * i
        whole.update()
        weight = shared.next_weight()
        if weight:
            mine = [p for p in shared.params if id(p) in own]
            average_([shared.averages[id(p)] for p in mine], mine, weight)
        shared.advance(own if step % 2 else list(own))
        assert same_bits(listed(whole), listed(shared))
    assert whole.n_averaged == shared.n_averaged == 4


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan"), float("inf"), True, "0.9", None])
def test_decay_is_checked(decay: Any) -> None:
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\)"):
        EMA(nn.Linear(2, 2), decay)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_checked(kind: type[Average]) -> None:
    for value in (-1, 1.0, True, None):
        with pytest.raises(ValueError, match="start_step: expected an integer >= 0"):
            made(kind, nn.Linear(2, 2), start_step=value)
    for value in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="every: expected an integer >= 1"):
            made(kind, nn.Linear(2, 2), every=value)


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        EMA(nn.ReLU())
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        EMA([nn.Parameter(torch.ones(1))])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameter 'weight' has no shape yet"):
        EMA(nn.LazyLinear(3))
    for value, match in [
        (torch.ones(2, dtype=torch.int8), "parameter 'p' is torch.int8"),
        (torch.eye(2).to_sparse(), "parameter 'p' is torch.sparse_coo"),
    ]:
        model = nn.Module()
        model.p = nn.Parameter(value, requires_grad=False)
        with pytest.raises(ValueError, match=match):
            SWA(model)


def test_a_replaced_parameter_is_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    average = EMA(model)
    average.update()
    state = average.state_dict()
    model[0].weight = nn.Parameter(torch.zeros(2, 2))
    model[1].bias = None
    calls = (
        lambda: average.swap().__enter__(),
        lambda: average.copy_to(model),
        lambda: average.load_state_dict(state),
        average.state_dict,
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"parameters \['0.weight', '1.bias'\] were replaced"):
            call()


@pytest.mark.parametrize("data", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_a_parameter_of_another_shape_or_dtype_is_found(data: Tensor) -> None:
    model = nn.Linear(2, 2)
    average = EMA(model)
    average.update()
    before = copies(listed(average))
    model.bias.data = data
    for call in (average.update, lambda: average.swap().__enter__()):
        with pytest.raises(RuntimeError, match="parameter 'bias' is torch.float"):
            call()
    assert same_bits(listed(average), before) and average.steps == 1


def test_an_average_is_not_copied_or_pickled() -> None:
    average = EMA(nn.Linear(2, 2))
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
            call(average)
