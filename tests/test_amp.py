"""pytrain.amp.LossScaler: policies against those they are named after, saved states, and the errors it raises."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

import pytrain.optim
from pytrain import backend
from pytrain.amp import POLICIES, LossScaleError, LossScaler
from pytrain.control import (
    CONTROL_HEAD,
    CONTROL_ROW,
    FIRST_BAD,
    FOUND_INF,
    INV_SCALE,
    SCALER_SIZE,
    SUMSQ,
    Policy,
    settle,
    settle_in_python,
    update_scaler,
    update_scaler_in_python,
)
from pytrain.parts import blank_control

INF, NAN = math.inf, math.nan
needs_kernels = pytest.mark.skipif(backend.facts is None, reason=f"needs the kernels: {backend.why_not_loaded}")


class Driver:
    """One small parameter, stepped with a gradient of ones or of infs."""

    def __init__(self) -> None:
        self.param = Parameter(torch.ones(2))
        self.optimizer = torch.optim.SGD([self.param], lr=0.0)

    def __call__(self, scaler: Any, bad: bool) -> float:
        self.param.grad = torch.full((2,), INF if bad else 1.0)
        scaler.step(self.optimizer)
        scaler.update()
        return float(scaler.get_scale())


# ---- the policies ----------------------------------------------------------------------------------------------------

# Growth interval 4, hysteresis 2, first scale 1024: the scale after each step. DeepSpeed's two rows are those of its
# consecutive_hysteresis.
OVERFLOWS = "                            0    1    0    1    0    1    1    0    0    0    0    0    1"
TRACES = """
    torch                          1024  512  512  256  256  128   64   64   64   64  128  128   64
    apex                           1024 1024 1024 1024 1024 1024  512  512  512  512 1024 1024 1024
    megatron                       1024 1024 1024  512  512  256  128  128  128  128  256  256  256
    deepspeed                      1024 1024 1024  512  512  256  128  128  128  128  128  256  256
    deepspeed-consecutive          1024 1024 1024 1024 1024 1024  512  512  512  512  512 1024 1024
    static                         1024 1024 1024 1024 1024 1024 1024 1024 1024 1024 1024 1024 1024
"""


ROWS = {row.split()[0]: row.split()[1:] for row in TRACES.split("\n")[1:-1]}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_gives_its_own_trace_of_the_same_overflows(policy: str) -> None:
    set_to = {} if policy == "static" else {"growth_interval": 4, "hysteresis": 1 if policy == "torch" else 2}
    scaler, drive = LossScaler(policy, init_scale=1024.0, **set_to), Driver()  # type: ignore[arg-type]
    assert [drive(scaler, flag == "1") for flag in OVERFLOWS.split()] == [float(scale) for scale in ROWS[policy]]


class Incumbent:
    """A loss scale as its inventor moves it; written from the inventor's semantics, not from pytrain's."""

    def __init__(self, scale: float, set_to: dict[str, Any]) -> None:
        self.scale, self.set_to = np.float32(scale), set_to
        self.floor = np.float32(set_to.get("min_scale") or 0.0)
        self.ceiling = np.float32(set_to.get("max_scale") or INF)
        self.interval, self.hysteresis = set_to["growth_interval"], set_to.get("hysteresis", 1)
        self.clean, self.left, self.iteration, self.last_overflow = 0, self.hysteresis, 0, -1

    def lower(self) -> None:
        lowered = np.float32(float(self.scale) * self.set_to["backoff_factor"])
        self.scale = max(lowered, self.floor)

    def grow(self) -> None:
        grown = np.float32(float(self.scale) * self.set_to["growth_factor"])
        if np.isfinite(grown):
            self.scale = min(grown, self.ceiling)


class Torch(Incumbent):
    """torch.amp.GradScaler: every overflow lowers; `interval` clean steps in a row grow."""

    def update(self, overflow: bool) -> None:
        self.clean = 0 if overflow else self.clean + 1
        if overflow:
            self.lower()
        elif self.clean == self.interval:
            self.clean = 0
            self.grow()


class Apex(Incumbent):
    """apex: only the `hysteresis`-th overflow in a row and those after it lower."""

    def update(self, overflow: bool) -> None:
        self.clean = 0 if overflow else (self.clean + 1) % self.interval
        self.left = self.left - 1 if overflow else self.hysteresis
        if overflow and self.left <= 0:
            self.lower()
        elif not overflow and self.clean == 0:
            self.grow()


class Megatron(Incumbent):
    """Megatron-LM: as apex, but growth alone gives the hysteresis back."""

    def update(self, overflow: bool) -> None:
        if overflow:
            self.clean, self.left = 0, self.left - 1
            if self.left <= 0:
                self.lower()
            return
        self.clean = (self.clean + 1) % self.interval
        if self.clean == 0:
            self.left = self.hysteresis
            self.grow()


class DeepSpeed(Incumbent):
    """DeepSpeed: no count of clean steps, but the distance to the iteration of the last overflow."""

    consecutive = False

    def update(self, overflow: bool) -> None:
        if overflow:
            if self.hysteresis == 1 or self.left == 1:
                self.lower()
            else:
                self.left -= 1
            self.last_overflow = self.iteration
        else:
            if self.consecutive:
                self.left = self.hysteresis
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % self.interval == 0:
                self.left = self.hysteresis
                self.grow()
        self.iteration += 1


INCUMBENTS: dict[str, Any] = {
    "torch": Torch,
    "apex": Apex,
    "megatron": Megatron,
    "deepspeed": DeepSpeed,
    "deepspeed-consecutive": type("DeepSpeedConsecutive", (DeepSpeed,), {"consecutive": True}),
}
LIMITS = st.sampled_from([None, 1.0, 1.4, 2.0, 7.0])  # as a ratio to the first scale


@st.composite
def scalers(draw: st.DrawFn, policy: str) -> tuple[float, dict[str, Any]]:
    """A first scale and settings."""
    scale = 2.0 ** draw(st.integers(-3, 30))
    growth, backoff = draw(st.sampled_from([2.0, 4.0, 1.5, 1.1])), draw(st.sampled_from([0.5, 0.25, 0.75, 0.3]))
    if policy in ("deepspeed", "deepspeed-consecutive"):  # has one factor for both ways
        growth, backoff = draw(st.sampled_from([(2.0, 0.5), (4.0, 0.25), (8.0, 0.125)]))
    below, above = draw(LIMITS), draw(LIMITS)
    return scale, {
        "growth_factor": growth,
        "backoff_factor": backoff,
        "growth_interval": draw(st.integers(1, 5)),
        "hysteresis": 1 if policy == "torch" else draw(st.integers(1, 3)),
        "min_scale": 2.0**-100 if below is None else scale / below,
        "max_scale": INF if above is None else scale * above,
    }


@pytest.mark.parametrize("policy", INCUMBENTS)
def test_a_policy_moves_as_the_scaler_it_is_named_after(policy: str) -> None:
    @settings(deadline=None)
    @given(scalers(policy), st.lists(st.booleans(), max_size=40), st.integers(0, 40))
    def check(set_up: tuple[float, dict[str, Any]], overflows: list[bool], saved_at: int) -> None:
        scale, set_to = set_up
        scaler, drive = LossScaler(policy, init_scale=scale, **set_to), Driver()
        incumbent = INCUMBENTS[policy](scale, set_to)
        for step, bad in enumerate(overflows):
            if step == saved_at:
                state, scaler = scaler.state_dict(), LossScaler(policy)
                scaler.load_state_dict(state)
            incumbent.update(bad)
            assert drive(scaler, bad) == incumbent.scale

    check()


def test_each_policy_has_its_inventors_defaults() -> None:
    found = {policy: LossScaler(policy) for policy in INCUMBENTS}
    assert all((s.get_growth_factor(), s.get_backoff_factor()) == (2.0, 0.5) for s in found.values())
    assert {policy: (s.get_scale(), *s.rules[2:6]) for policy, s in found.items()} == {
        "torch": (2.0**16, 2000, 1, 0.0, INF),
        "apex": (2.0**16, 2000, 1, 0.0, 2.0**24),
        "megatron": (2.0**32, 1000, 2, 1.0, INF),
        "deepspeed": (2.0**16, 1000, 2, 1.0, INF),
        "deepspeed-consecutive": (2.0**16, 1000, 2, 1.0, INF),
    }


def test_growth_stops_before_the_scale_is_infinite() -> None:
    scaler, drive = LossScaler(init_scale=2.0**126, growth_interval=1), Driver()
    assert [drive(scaler, False) for _ in range(3)] == [2.0**127] * 3


@pytest.mark.parametrize("setting", [("growth_factor", 3.0), ("backoff_factor", 0.25), ("growth_interval", 2)], ids=str)
def test_settings_can_be_changed_on_the_way(setting: tuple[str, Any]) -> None:
    name, value = setting
    scaler, drive = LossScaler(init_scale=64.0, growth_interval=1), Driver()
    getattr(scaler, f"set_{name}")(value)
    assert getattr(scaler, f"get_{name}")() == scaler.state_dict()[name] == value
    incumbent = Torch(64.0, scaler.state_dict())
    for bad in (False, False, True):
        incumbent.update(bad)
        assert drive(scaler, bad) == incumbent.scale


# ---- the kernels and their reference ---------------------------------------------------------------------------------

SQUARES = [0.0, 1e-320, 1e-30, 0.1, 3.7, 1e30, 1e300, INF, NAN]


def random_controls(draw: st.DrawFn) -> list[Tensor]:
    controls = []
    for _ in range(draw(st.integers(1, 3))):
        control = blank_control(draw(st.integers(1, 4)), draw(st.sampled_from([1.0, 1 / 3, 0.1, 1e-300, 1e300])))
        control[FOUND_INF] = draw(st.sampled_from([0.0, 0.0, 1.0, 2.0, NAN]))
        control[FIRST_BAD] = draw(st.sampled_from([-1.0, -1.0, 0.0, 7.0]))
        for row in control[CONTROL_HEAD:].view(-1, CONTROL_ROW):
            row[SUMSQ] = draw(st.sampled_from(SQUARES) | st.floats(0.0, 1e6))
        controls.append(control)
    return controls


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit, but that any nan is like any other."""
    whole = torch.int64 if a.dtype == torch.float64 else torch.int32
    return bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


@needs_kernels
@settings(deadline=None)
@given(st.data())
def test_settle_is_its_python_reference_to_the_bit(data: st.DataObject) -> None:
    controls = random_controls(data.draw)  # type: ignore[arg-type]
    twins = [control.clone() for control in controls]
    scale = torch.tensor(data.draw(st.sampled_from([0.0, 2.0**-149, 2.0**-130, 0.3, 1.0, 3.0, 65536.0, 3e38])))
    scaled = [data.draw(st.integers(0, 1)) for _ in controls]
    max_norms = data.draw(st.lists(st.sampled_from([1e-3, 0.7, 1.0, 1e20, INF]), max_size=3))
    rows = sum((len(control) - CONTROL_HEAD) // CONTROL_ROW for control in controls)
    groups = [data.draw(st.integers(-1, len(max_norms) - 1)) for _ in range(rows)]
    settle(controls, scale, scaled, groups, max_norms)
    settle_in_python(twins, scale, scaled, groups, max_norms)
    assert all(same(a, b) for a, b in zip(controls, twins, strict=True))
    assert all(control[INV_SCALE].isfinite() or control[FOUND_INF] != 0 for control in controls)


@needs_kernels
@settings(deadline=None)
@given(st.data())
def test_the_scales_update_is_its_python_reference_to_the_bit(data: st.DataObject) -> None:
    whole = st.integers(1, 6).map(float)
    state = torch.zeros(SCALER_SIZE)
    scales = st.sampled_from([0.0, 2.0**-149, 0.1, 1.0, 3.0, 65536.0, 2.0**127, 3e38])
    for place in range(SCALER_SIZE):
        state[place] = data.draw(scales if place == 0 else whole.map(lambda x: x - 1))
    low = data.draw(st.sampled_from([0.0, 0.1, 1.0, 100.0]))
    policy = Policy(
        data.draw(st.sampled_from([1.0, 1.1, 2.0, 1e30])),
        data.draw(st.sampled_from([0.5, 0.3, 1.0])),
        data.draw(whole),
        data.draw(whole),
        low,
        data.draw(st.sampled_from([low + 0.2, low + 1e5, 1e300, INF])),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    twin = state.clone()
    for _ in range(4):
        controls = random_controls(data.draw)  # type: ignore[arg-type]
        update_scaler(state, controls, policy)
        update_scaler_in_python(twin, controls, policy)
        assert same(state, twin)


# ---- saved states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_goes_through_a_weights_only_file(policy: str) -> None:
    made = {"init_scale": 8.0, "max_skipped_in_a_row": 1000}
    a, b, drive = LossScaler(policy, **made), LossScaler(policy, **made), Driver()  # type: ignore[arg-type]
    for bad in (False, True, True, False, True):
        drive(a, bad)
    torch.save(a.state_dict(), file := io.BytesIO())
    b.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert b.state_dict() == a.state_dict() and b.get_scale() == a.get_scale()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(copied: Callable[[LossScaler], LossScaler]) -> None:
    """GradScaler is one of the things that users pickle between two steps."""
    scaler, drive = LossScaler(init_scale=8.0, min_scale=4.0, max_skipped_in_a_row=3), Driver()
    other = copied(scaler)
    assert drive(other, True) == other.state_dict()["scale"] == 4.0
    assert other.scale(torch.ones(())) == 4.0 and scaler.get_scale() == 8.0
    drive(other, True)
    with pytest.raises(LossScaleError):
        drive(other, True)


def test_a_step_that_is_open_has_no_state() -> None:
    for unscale in (True, False):
        scaler, drive = LossScaler(init_scale=8.0), Driver()
        state = scaler.state_dict()
        drive.param.grad = torch.ones(2)
        scaler.unscale_(drive.optimizer) if unscale else scaler.step(drive.optimizer)
        with pytest.raises(RuntimeError, match="state_dict: a step is under way"):
            scaler.state_dict()
        with pytest.raises(RuntimeError, match="load_state_dict: a step is under way"):
            scaler.load_state_dict(state)
        scaler.update()
        assert scaler.state_dict() == state | {"_growth_tracker": 1}


def test_a_state_of_another_kind_is_refused() -> None:
    scaler = LossScaler("megatron")
    before = scaler.state_dict()
    with pytest.raises(ValueError, match="policy 'torch', this scaler has 'megatron'"):
        scaler.load_state_dict(LossScaler().state_dict())
    with pytest.raises(RuntimeError, match="enabled=False"):
        scaler.load_state_dict({})
    with pytest.raises(ValueError, match=r"missing keys \['scale', '_growth_tracker'\]"):
        scaler.load_state_dict({k: v for k, v in before.items() if k not in ("scale", "_growth_tracker")})
    assert scaler.state_dict() == before


BAD_STATES = [
    *[("scale", value) for value in (-1.0, INF, NAN, 1e39)],
    *[("_growth_tracker", value) for value in (-3, NAN)],
    *[("growth_interval", value) for value in (0, 2.5)],
    *[("growth_factor", value) for value in (0.5, INF)],
    *[("backoff_factor", value) for value in (1.5, 0.0)],
    *[("hysteresis", 0), ("hysteresis_left", -1), ("skipped_in_a_row", -2), ("min_scale", -1.0), ("max_scale", 0.0)],
]


@pytest.mark.parametrize(("key", "value"), BAD_STATES, ids=str)
def test_a_state_out_of_range_is_refused_and_changes_nothing(key: str, value: float) -> None:
    scaler = LossScaler()
    before = scaler.state_dict()
    with pytest.raises(ValueError, match=key):
        scaler.load_state_dict(before | {key: value})
    assert scaler.state_dict() == before


# ---- errors at the floor ---------------------------------------------------------------------------------------------


def test_the_error_comes_only_at_the_floor() -> None:
    scaler, drive = LossScaler("megatron", init_scale=4.0, hysteresis=1, max_skipped_in_a_row=2), Driver()
    assert drive(scaler, True) == 2.0
    with pytest.raises(LossScaleError, match=r"^2 steps in a row .* lowest .*scale, 1;"):
        drive(scaler, True)
    scaler = LossScaler("megatron", hysteresis=1, max_skipped_in_a_row=2)
    assert [drive(scaler, True) for _ in range(4)] == [2.0**31, 2.0**30, 2.0**29, 2.0**28]


def test_a_clean_step_begins_the_count_anew() -> None:
    scaler, drive = LossScaler(init_scale=1.0, min_scale=1.0, max_skipped_in_a_row=3), Driver()
    for bad in (True, True, False, True, True):
        drive(scaler, bad)
    resumed = LossScaler(max_skipped_in_a_row=3)
    resumed.load_state_dict(scaler.state_dict())
    for one in (scaler, resumed):
        with pytest.raises(LossScaleError, match="^3 steps in a row"):
            drive(one, True)


def test_a_static_scale_is_its_own_floor_and_never_moves() -> None:
    scaler, drive = LossScaler("static", init_scale=1024.0, max_skipped_in_a_row=3), Driver()
    assert drive(scaler, True) == drive(scaler, True) == 1024.0
    with pytest.raises(LossScaleError, match="^3 steps in a row .* 1024;"):
        drive(scaler, True)


@pytest.mark.parametrize("floor", [0.25, 0.1, 0.3, 1e-3])
def test_a_floor_that_fp32_rounds_is_a_floor_too(floor: float) -> None:
    scaler, drive = LossScaler(init_scale=2 * floor, min_scale=floor, max_skipped_in_a_row=4), Driver()
    with pytest.raises(LossScaleError):
        for _ in range(4):
            drive(scaler, True)


KINDS = [torch.optim.AdamW, pytrain.optim.AdamW]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", [False, True])
def test_the_error_names_the_first_bad_parameter(kind: type[torch.optim.Optimizer], named: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    each = [list(part.named_parameters() if named else part.parameters()) for part in model]
    fine = torch.optim.SGD([Parameter(torch.ones(7))], lr=0.1)
    optimizer = kind([{"params": each[0]}, {"params": each[1]}, {"params": each[2]}])  # type: ignore[call-arg]
    scaler = LossScaler("static", init_scale=8.0, max_skipped_in_a_row=2)
    # The bad parameter of the first step is told, whatever the later ones are.
    with pytest.raises(LossScaleError) as caught:
        for bad in (model[1].bias, model[0].weight):
            for p in model.parameters():
                p.grad = torch.full_like(p, INF if p is bad or p is model[2].weight else 1.0)
            scaler.step(fine)
            scaler.step(optimizer)
            scaler.update()
    assert bad is model[0].weight
    name = " (bias)" if named else ""
    assert f"AdamW: param_groups[1]['params'][1]{name}, of shape (4,)" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_unscale_found_is_never_blamed_on_another_parameter(kind: type[torch.optim.Optimizer]) -> None:
    params = [Parameter(torch.ones(n)) for n in (1, 2, 3)]
    optimizer, scaler = kind(params), LossScaler("static", init_scale=8.0, max_skipped_in_a_row=1)
    for p in params:
        p.grad = torch.full_like(p, INF if p is params[0] else 1.0)
    scaler.unscale_(optimizer)
    params[0].grad = torch.zeros(1)
    scaler.step(optimizer)
    with pytest.raises(LossScaleError) as caught:
        scaler.update()
    named = str(caught.value)
    assert "['params'][0], of shape (1,)" in named or "param_groups" not in named


def test_the_error_knows_its_optimizer_when_their_order_changes() -> None:
    bad, good = Parameter(torch.ones(1)), Parameter(torch.ones(2))
    sgd, adam = torch.optim.SGD([bad], lr=0.1), torch.optim.Adam([good])
    scaler = LossScaler("static", init_scale=8.0, max_skipped_in_a_row=2)

    with pytest.raises(LossScaleError) as caught:
        for order in ((sgd, adam), (adam, sgd)):
            bad.grad, good.grad = torch.full((1,), INF), torch.ones(2)
            for optimizer in order:
                scaler.step(optimizer)
            scaler.update()
    assert "Adam:" not in str(caught.value)
