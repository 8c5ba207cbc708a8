"""EMA and SWA: put into the parameters, taken out, renewed, saved and resumed, all to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ema_cases import (
    KINDS,
    SETTINGS,
    Net,
    batch,
    copies,
    listed,
    made,
    same_bits,
    saved,
    torchs,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from pytrain.ema import EMA, SWA, Average

# ---- in and out of the parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_swap_puts_averages_in_and_parameters_back_to_the_bit(kind: type[Average], dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    average = made(kind, model)
    average.update()
    for p in model.parameters():
        p.data += 1.0
    average.update()
    with torch.no_grad():
        model.last.bias[:3] = torch.tensor([float("nan"), -0.0, float("-inf")])
        bits_of_bias = model.last.bias.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        bits_of_bias[0] ^= 5  # a nan with a payload
    before, averages = copies(model.parameters()), copies(listed(average))
    buffers, places = copies(model.buffers()), [p.data_ptr() for p in model.parameters()]
    grads = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    for fails in (False, True):
        assert not average.swapped
        try:
            with average.swap():
                assert average.swapped
                assert same_bits(model.parameters(), [a.to(dtype) for a in averages])
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert not average.swapped
        assert same_bits(model.parameters(), before) and same_bits(listed(average), averages)
    assert same_bits(model.buffers(), buffers)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


def test_what_is_written_inside_swap_is_lost() -> None:
    model = nn.Linear(2, 2)
    average = EMA(model)
    average.update()
    before, averages = copies(model.parameters()), copies(listed(average))
    with average.swap():
        model.weight.data.zero_()
    assert same_bits(model.parameters(), before) and same_bits(listed(average), averages)


def test_averages_are_not_taken_loaded_or_nested_inside_swap() -> None:
    model = nn.Linear(2, 2)
    average = SWA(model)
    average.update()
    state, before = average.state_dict(), copies(model.parameters())
    calls: list[Callable[[], Any]] = [
        average.update,
        average.advance,
        lambda: average.load_state_dict(state),
        lambda: average.copy_to(model),
        lambda: average.update_bn([torch.ones(2, 2)]),
        lambda: average.swap().__enter__(),
    ]
    with average.swap():
        for call in calls:
            with pytest.raises(RuntimeError, match="leave the swap"):
                call()
        average.copy_to(nn.Linear(2, 2))
        assert same_bits(average.state_dict()["averages"].values(), listed(average))
    assert same_bits(model.parameters(), before) and average.steps == 1


def test_swap_and_copy_want_an_average() -> None:
    model = nn.Linear(2, 2)
    average = EMA(model, start_step=3)
    average.update()
    for call in (lambda: average.swap().__enter__(), lambda: average.copy_to(model), lambda: average.update_bn([])):
        with pytest.raises(RuntimeError, match=r"nothing was averaged yet, after 1 applied steps with start_step=3"):
            call()
    assert not average.swapped


@pytest.mark.parametrize("kind", KINDS)
def test_copy_to_makes_the_averaged_model(kind: type[Average]) -> None:
    model = Net()
    average, theirs = made(kind, model), torchs(kind, model)

    def after(step: int) -> None:
        average.update()
        theirs.update_parameters(model)

    train(model, torch.optim.AdamW(model.parameters(), lr=0.05), after)
    target, low = Net(), Net().bfloat16()
    average.copy_to(target)
    average.copy_to(low)
    assert same_bits(target.parameters(), listed(average)) and same_bits(target.buffers(), theirs.module.buffers())
    assert same_bits(low.parameters(), [a.bfloat16() for a in listed(average)])
    average.copy_to(model)
    assert same_bits(model.parameters(), listed(average))


def test_copy_to_checks_names_and_shapes_before_it_writes() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = EMA(model)
    average.update()
    for other, match in [
        (
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)),
            r"parameters: missing \['1.weight', '1.bias'\]",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(1, 1)), r"unexpected \['2.weight', '2.bias'\]"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), r"'0.weight': expected shape \(2, 2\), got \(2, 3\)"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), "buffers: missing"),
    ]:
        before = copies(other.parameters())
        with pytest.raises(ValueError, match=match):
            average.copy_to(other)
        assert same_bits(other.parameters(), before)


# ---- BatchNorm -------------------------------------------------------------------------------------------------------


def with_norms(kind: type[Average]) -> tuple[nn.Sequential, Average]:
    """A trained model with BatchNorm, a part of it in evaluation mode, and its average."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=0.3), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2)
    )
    average = made(kind, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(6):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        average.update()
    model[4].eval()
    return model, average


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    modules = list(model.modules())
    momenta = [m.momentum for m in modules if isinstance(m, nn.BatchNorm1d)]
    return [m.training for m in modules], momenta, [id(b) for b in model.buffers()]


@pytest.mark.parametrize("kind", KINDS)
def test_renewed_statistics_are_those_of_torchs_update_bn_and_stay_out_of_the_model(kind: type[Average]) -> None:
    model, average = with_norms(kind)
    loader = [(batch(50 + i), torch.zeros(8)) for i in range(4)]
    target = copy.deepcopy(model)
    average.copy_to(target)
    update_bn(loader, target)
    params, buffers, seen = copies(model.parameters()), copies(model.buffers()), fingerprint(model)
    average.update_bn(loader, device="cpu")
    assert same_bits(model.parameters(), params) and same_bits(model.buffers(), buffers) and fingerprint(model) == seen
    assert list(average.buffers) == [name for name, _ in model.named_buffers()]
    assert same_bits(average.buffers.values(), target.buffers()) and not same_bits(target.buffers(), buffers)
    with average.swap():
        assert same_bits(model.state_dict().values(), target.state_dict().values())
    assert same_bits(model.parameters(), params) and same_bits(model.buffers(), buffers) and fingerprint(model) == seen
    other = copy.deepcopy(model)
    average.copy_to(other)
    assert same_bits(other.state_dict().values(), target.state_dict().values())


def test_renewed_statistics_are_saved_and_dropped_by_the_next_average() -> None:
    model, average = with_norms(SWA)
    average.update_bn([batch(60)])
    resumed_model = copy.deepcopy(model)
    resumed = SWA(resumed_model)
    resumed.load_state_dict(saved(average.state_dict()))
    assert list(resumed.buffers) == list(average.buffers)
    assert same_bits(resumed.buffers.values(), average.buffers.values())
    with average.swap(), resumed.swap():
        assert same_bits(model.state_dict().values(), resumed_model.state_dict().values())
    resumed.load_state_dict(average.state_dict())  # copies: the saved state may change later
    for name, value in average.buffers.items():
        assert resumed.buffers[name].data_ptr() != value.data_ptr()
    average.update()
    assert not average.buffers


def test_a_loader_that_fails_or_is_empty_leaves_model_and_average_as_they_were() -> None:
    model, average = with_norms(SWA)
    average.update_bn([batch(60)])

    def failing() -> Iterator[Tensor]:
        yield batch(61)
        raise OSError("the disk")

    renewed, state, seen = copies(average.buffers.values()), copies(model.state_dict().values()), fingerprint(model)
    with pytest.raises(OSError, match="the disk"):
        average.update_bn(failing())
    with pytest.raises(ValueError, match="the loader gave no batch"):
        average.update_bn([])
    assert same_bits(average.buffers.values(), renewed) and same_bits(model.state_dict().values(), state)
    assert fingerprint(model) == seen and not average.swapped


def test_update_bn_takes_back_what_other_layers_do_to_their_buffers() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1.0  # type: ignore[operator]
            self.calls = self.calls + 1.0  # another tensor
            return x

    model = nn.Sequential(Counts(), nn.BatchNorm1d(5, track_running_stats=False), nn.BatchNorm1d(5))
    average = SWA(model)
    average.update()
    before = dict(model.named_buffers())
    average.update_bn([batch(1), batch(2)])
    assert list(average.buffers) == ["2.running_mean", "2.running_var", "2.num_batches_tracked"]
    assert average.buffers["2.num_batches_tracked"] == 2
    assert all(value is before[name] for name, value in model.named_buffers())
    assert model[0].seen == 0 and model[0].calls == 0 and model[2].num_batches_tracked == 0


def test_update_bn_without_batch_norm_does_nothing() -> None:
    average = SWA(nn.Linear(2, 2))
    average.update()
    average.update_bn(iter(()))
    assert not average.buffers


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"start_step": 2, "every": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_can_be_resumed_after_every_step(kind: type[Average], options: dict[str, int]) -> None:
    steps = 8
    model = Net()
    average = made(kind, model, **options)
    states: list[Any] = [(copies(model.parameters()), saved(average.state_dict()))]

    def after(step: int) -> None:
        average.update()
        states.append((copies(model.parameters()), saved(average.state_dict())))

    train(model, torch.optim.AdamW(model.parameters(), lr=0.05), after, steps)
    for begin in range(steps + 1):
        other = Net()
        resumed = made(kind, other, **options)
        places = [a.data_ptr() for a in listed(resumed)]
        resumed.load_state_dict(states[begin][1])
        for params, _ in states[begin + 1 :]:
            for p, value in zip(other.parameters(), params, strict=True):
                p.data.copy_(value)
            resumed.update()
        assert same_bits(listed(resumed), listed(average))
        assert (resumed.steps, resumed.n_averaged) == (average.steps, average.n_averaged)
        assert [a.data_ptr() for a in listed(resumed)] == places  # the fused loop may hold on to them


def test_a_state_is_plain_and_says_what_it_is() -> None:
    model = nn.Linear(2, 2)
    ema, swa = EMA(model, 0.5, start_step=1, every=2), SWA(model)
    assert ema.state_dict() == {
        "format": 1,
        "kind": "EMA",
        "steps": 0,
        "n_averaged": 0,
        "decay": 0.5,
        "start_step": 1,
        "every": 2,
        "averages": {},
        "buffers": {},
    }
    swa.update()
    state = swa.state_dict()
    assert state["kind"] == "SWA" and "decay" not in state and list(state["averages"]) == ["weight", "bias"]


def test_settings_stay_the_objects_own() -> None:
    model = nn.Linear(2, 2)
    before = EMA(model, 0.5, start_step=1, every=1)
    for _ in range(3):
        before.update()
    after = EMA(model, 0.75, start_step=0, every=2)
    after.load_state_dict(before.state_dict())
    assert (after.decay, after.start_step, after.every, after.steps, after.n_averaged) == (0.75, 0, 2, 3, 2)
    assert after.next_weight() == 0.25


def test_a_wrong_state_is_refused_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    average = SWA(model)
    average.update()
    average.update()
    average.update_bn([torch.randn(4, 2)])
    good = average.state_dict()
    averages, buffers = good["averages"], good["buffers"]
    before = copies(listed(average)) + copies(buffers.values())
    other = nn.Linear(2, 3)
    ema = EMA(other)
    ema.update()
    wrong = {name: a for name, a in averages.items() if name != "0.bias"}
    cases: list[tuple[dict[str, Any], str]] = [
        (ema.state_dict(), "kind: expected 'SWA', got 'EMA'"),
        ({}, "missing keys"),
        ({k: v for k, v in good.items() if k != "averages"}, r"missing keys \['averages'\]"),
        (good | {"format": 2}, "format: expected 1, got 2"),
        (good | {"averages": wrong}, r"averages: missing \['0.bias'\], unexpected \[\]"),
        (good | {"averages": averages | {"2.weight": wrong["0.weight"]}}, r"unexpected \['2.weight'\]"),
        (good | {"averages": averages | {"0.bias": torch.ones(4)}}, r"'0.bias': expected shape \(3,\), got \(4,\)"),
        (good | {"averages": averages | {"0.bias": torch.ones(3).double()}}, "'0.bias': expected torch.float32, got"),
        (good | {"averages": averages | {"0.bias": 1.0}}, "'0.bias': expected a tensor, got float"),
        (good | {"averages": None}, "averages: expected a dict of tensors, got NoneType"),
        (good | {"averages": {}}, "averages: missing"),
        (good | {"n_averaged": 0}, "averages: missing .* unexpected"),
        (good | {"n_averaged": 3}, "steps: expected an integer >= 3, got 2"),
        (good | {"n_averaged": True}, "n_averaged: expected an integer"),
        (good | {"steps": 2.0}, "steps: expected an integer"),
        (good | {"buffers": {"1.running_mean": torch.zeros(3)}}, r"buffers: missing \['1.running_var', '1.num_b"),
        (good | {"buffers": buffers | {"1.running_mean": torch.zeros(2)}}, r"'1.running_mean': expected shape"),
    ]
    for state, match in cases:
        with pytest.raises(ValueError, match=match):
            average.load_state_dict(state)
        assert same_bits(listed(average) + list(average.buffers.values()), before)
        assert (average.steps, average.n_averaged) == (2, 2)
    average.load_state_dict(good)


# ---- any order of events ---------------------------------------------------------------------------------------------

EVENTS = st.lists(st.sampled_from(["step", "swap", "fail", "reload", "copy", "bn"]), max_size=20)


@SETTINGS
@given(
    kind=st.sampled_from([EMA, SWA]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    start_step=st.integers(0, 3),
    every=st.integers(1, 3),
    events=EVENTS,
)
def test_no_event_between_steps_changes_parameters_or_averages(
    kind: type[Average], dtype: torch.dtype, start_step: int, every: int, events: list[str]
) -> None:
    def moved(model: nn.Module, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.data += torch.randn(p.shape, generator=generator).to(dtype)

    plain, model = Net().to(dtype), Net().to(dtype)
    want, average = (made(kind, m, start_step=start_step, every=every) for m in (plain, model))
    for number, event in enumerate(events):
        if event == "step":
            for m, a in ((plain, want), (model, average)):
                moved(m, number)
                a.update()
        elif event == "reload":
            state = saved(average.state_dict())
            average = made(kind, model, start_step=start_step, every=every)
            average.load_state_dict(state)
        elif not average.n_averaged:
            with pytest.raises(RuntimeError, match="nothing was averaged"):
                average.swap().__enter__()
        elif event == "copy":
            target = Net().to(dtype)
            average.copy_to(target)
            assert same_bits(target.parameters(), [a.to(dtype) for a in listed(average)])
        elif event == "bn":
            average.update_bn([batch(number, dtype)])
        else:
            try:
                with average.swap():
                    assert same_bits(model.parameters(), [a.to(dtype) for a in listed(average)])
                    model(batch(number, dtype))
                    if event == "fail":
                        raise ArithmeticError
            except ArithmeticError:
                assert event == "fail"
        assert same_bits(model.parameters(), plain.parameters())
        assert (average.steps, average.n_averaged) == (want.steps, want.n_averaged)
        if average.n_averaged:
            assert same_bits(listed(average), listed(want))
