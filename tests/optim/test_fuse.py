"""fuse: an optimizer of torch goes on as ours, with all that it had; what cannot is an error that changes nothing."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import (
    DTYPES,
    LR,
    VARIANTS,
    error,
    gradients,
    largest,
    like,
    make_params,
    needs_kernels,
    ours,
    reference64,
    same_bits,
    torch_class,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from pytrain import backend
from pytrain.optim import REGISTRY, FusedOptimizer
from pytrain.optim.fuse import fuse

NAMES = [name for name in VARIANTS if torch_class(name) is not None]
CASES = [pytest.param(name, options, id=f"{name}-{options}") for name in NAMES for options in VARIANTS[name]]
# torch 2.13's own fused SGD and Adagrad go wrong on the CPU in half precision (pytorch#191763).
HALVES = [*((dtype, {}) for dtype in DTYPES), (torch.float32, {"fused": True}), (torch.float32, {"foreach": True})]
HALF_CASES = [
    pytest.param(*case.values, dtype, how, id=f"{case.id}-{dtype}-{how}")
    for case in CASES
    for dtype, how in HALVES
    if how.keys() <= inspect.signature(torch_class(case.values[0])).parameters.keys()  # type: ignore[arg-type]
]
STEPS = 4


def theirs(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """torch's optimizer with the tests' learning rate."""
    cls: Any = torch_class(name)
    return cls(params, **{"lr": LR, **options})  # type: ignore[no-any-return]


def walk(optimizer: torch.optim.Optimizer, params: list[Tensor], like_these: list[Tensor], numbers: range) -> None:
    """Some of the steps of `optim_cases.run`."""
    for number in numbers:
        for p, g in zip(params, gradients(like_these, number), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def bound(name: str, options: dict[str, Any], start: list[Tensor], exact: list[Tensor]) -> float:
    """Twice the error of torch alone; at least what each step rounds of a parameter, here and in the reference."""
    alone = like(start)
    walk(theirs(name, alone, **options), alone, start, range(STEPS))
    return max(2 * error(alone, exact), STEPS * torch.finfo(start[0].dtype).eps * largest(exact))


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if backend.facts is None:
            warnings.filterwarnings("ignore", message=".*the kernels (are|do) not")
        yield


# ---- the numbers, and what stays ----------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(("name", "options", "dtype", "how"), HALF_CASES)
def test_half_of_the_steps_by_torch_and_half_by_ours(
    name: str, options: dict[str, Any], dtype: torch.dtype, how: dict[str, Any]
) -> None:
    start = make_params(dtype)
    params = like(start)
    optimizer = theirs(name, params, **options, **how)
    walk(optimizer, params, start, range(STEPS // 2))
    held = {p: dict(state) for p, state in optimizer.state.items()}
    fused = fuse(optimizer)
    assert fused is optimizer and type(fused) is REGISTRY[name] and fused.backend == "native"
    walk(fused, params, start, range(STEPS // 2, STEPS))
    assert all(fused.state[p][key] is value for p, state in held.items() for key, value in state.items())
    exact = reference64(name, start, options, STEPS)
    assert error(params, exact) <= bound(name, {**options, **how}, start, exact)


@needs_kernels
@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_class_changes(name: str) -> None:
    params = make_params(torch.float32, [(5,), (2, 3)])
    optimizer = theirs(name, [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}])
    walk(optimizer, params, params, range(1))
    before, groups = vars(optimizer).copy(), [dict(group) for group in optimizer.param_groups]
    saved = copy.deepcopy(optimizer.state_dict())
    fused = fuse(optimizer)
    assert fused is optimizer and isinstance(fused, REGISTRY[name])
    assert all(vars(fused)[key] is value for key, value in before.items() if key != "_zero_grad_profile_name")
    assert fused.param_groups == groups and str(fused.state_dict()) == str(saved)
    assert fuse(fused) is fused
    made = vars(ours(name, params))
    assert made.keys() <= vars(fused).keys(), "FusedOptimizer.__init__ sets what fuse does not"
    assert {k: v for k, v in made.items() if k not in before} == {k: vars(fused)[k] for k in made if k not in before}


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("name", NAMES)
def test_a_new_group_and_a_fresh_optimizer_are_ours(name: str) -> None:
    """Fused before the first step, with a group added afterwards."""
    start = make_params(torch.float32, [(5,), (2, 3)])
    params, plain = like(start), like(start)
    options = VARIANTS[name][-1]
    fused, expected = fuse(theirs(name, params[:1], **options)), ours(name, plain[:1], **options)
    for optimizer, side in ((fused, params), (expected, plain)):
        optimizer.add_param_group({"params": side[1:]})
        walk(optimizer, side, start, range(STEPS))
    assert same_bits(params, plain)


@pytest.mark.parametrize(
    "storage",
    [{"master_weights": True}, {"kahan": True}, {"state_dtype": "fp32", "ema_decay": 0.9}, {"rounding": "stochastic"}],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_storage_options_do_as_to_a_checkpoint_of_torch(name: str, storage: dict[str, Any]) -> None:
    start = make_params(torch.bfloat16, [(5,), (2, 3)])
    params, options = like(start), VARIANTS[name][-1]
    optimizer = theirs(name, params, **options)
    walk(optimizer, params, start, range(2))
    copies = like(params)
    expected = ours(name, copies, **options, **storage)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fused = fuse(optimizer, **storage)
    walk(fused, params, start, range(2, STEPS))
    walk(expected, copies, start, range(2, STEPS))
    assert same_bits(params, copies)
    for p, q in zip(params, copies, strict=True):
        assert fused.state[p].keys() == expected.state[q].keys()
        assert all(torch.equal(fused.state[p][key], value) for key, value in expected.state[q].items())


@needs_kernels
def test_gradients_can_be_stepped_in_backward_from_then_on() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    fused, plain = fuse(torch.optim.AdamW([p], lr=0.1), step_in_backward=True), torch.optim.AdamW([q], lr=0.1)
    for optimizer, param in ((fused, p), (plain, q)):
        (param * torch.tensor([1.0, 2.0, 3.0])).sum().backward()  # type: ignore[no-untyped-call]
        assert (param.grad is None) is (optimizer is fused)
        optimizer.step()
    assert error([p], [q]) <= 4 * torch.finfo(torch.float32).eps


# ---- schedulers ---------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", NAMES)
def test_schedulers_go_on(name: str, maker: str, when: str) -> None:
    start = make_params(torch.float64, [(5,), (2, 3)])
    finals, rates = [], []
    for fused in (True, False):
        params = like(start)
        optimizer = theirs(name, params)
        if fused and when == "after":
            fuse(optimizer)
        plan = MAKERS[maker](optimizer)
        if fused and when == "before":
            fuse(optimizer)
        for number in range(6):
            if fused and when == "between" and number == 3:
                fuse(optimizer)
            walk(optimizer, params, start, range(number, number + 1))
            plan.step(*([1.0] if maker == "ReduceLROnPlateau" else []))
        finals.append(params)
        rates.append(optimizer.param_groups[0]["lr"])
        assert isinstance(optimizer, FusedOptimizer) is fused
    assert rates[0] == rates[1] != LR
    # Six steps round on both sides; what RAdam multiplies its rate by, 0.1 at most, is a difference of numbers of 2000.
    assert error(*finals) <= torch.finfo(torch.float64).eps * (6 * 2 * largest(start) + 2000 * 0.1)


@pytest.mark.parametrize("stepped", ["not", "by torch", "by ours"])
@pytest.mark.parametrize("before", [True, False])
def test_the_schedulers_order_check_works(before: bool, stepped: str) -> None:
    p = Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    if not before:
        fuse(optimizer)
    plan = lr_scheduler.StepLR(optimizer, 1)
    if stepped == "by torch":
        optimizer.step()
    fuse(optimizer)
    if stepped == "by ours":
        optimizer.step()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan.step()
    assert [str(w.message)[:45] for w in seen] == ["Detected call of `lr_scheduler.step()` before"] * (stepped == "not")


@needs_kernels
def test_a_scheduled_optimizer_steps_by_the_kernels_and_dies_alone() -> None:
    p = Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p])
    lr_scheduler.StepLR(optimizer, 1)
    fuse(optimizer)
    p.grad = torch.ones(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        optimizer.step()
    names = [event.key for event in seen.key_averages()]
    assert names.count("Optimizer.step#AdamW.step") == 1 and any(name.startswith("pytrain::") for name in names)
    dead = weakref.ref(optimizer)
    del optimizer
    assert dead() is None


# ---- hooks, profiler, closures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_hooks_run_once_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY[name], "step", inspect.unwrap(FusedOptimizer.step))  # as before its first optimizer
    p = Parameter(torch.ones(2))
    optimizer = theirs(name, [p])
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(f"before {type(o).__module__}"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    fuse(optimizer)
    handle = register_optimizer_step_post_hook(lambda *_: seen.append("after all"))
    try:
        p.grad = torch.ones(2)
        assert optimizer.step(lambda: 5.0) == 5.0
    finally:
        handle.remove()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    module = REGISTRY[name].__module__
    assert seen == [f"before {module}", "after", "after all", "saving", "loading", "loaded"]
    assert saved["more"] == 1 and type(optimizer).step.hooked  # type: ignore[attr-defined]


# ---- loss scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp_scaling", [True, False])
@pytest.mark.parametrize("between", ["steps", "unscale and step"])
@pytest.mark.parametrize("name", NAMES)
def test_a_scaled_run_goes_on(name: str, between: str, amp_scaling: bool) -> None:
    """Six steps under one scaler, the second and the fifth with an inf, against the four good ones in fp64."""
    start = torch.linspace(-1, 1, 32)
    exact: Tensor = Parameter(start.double())
    plain = theirs(name, [exact], foreach=False)
    for _ in range(4):
        exact.grad = torch.ones_like(exact)
        plain.step()
    finals: list[Tensor] = []
    scales = []
    for fused in (True, False):
        p = Parameter(start.clone())
        optimizer = theirs(name, [p])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        for number in range(6):
            if fused and number == 3 and between == "steps":
                fuse(optimizer, amp_scaling=amp_scaling)
            optimizer.zero_grad()
            scaler.scale((p * (float("inf") if number in (1, 4) else 1.0)).sum()).backward()
            if between != "steps":
                scaler.unscale_(optimizer)
                if fused and number == 3:
                    fuse(optimizer, amp_scaling=amp_scaling)
            scaler.step(optimizer)
            scaler.update()
            if isinstance(optimizer, FusedOptimizer):
                assert optimizer.step_was_skipped is (amp_scaling and number == 4)
        finals.append(p)
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    bound = max(2 * error(finals[1:], [exact]), 4 * torch.finfo(torch.float32).eps * largest([exact]))
    assert error(finals[:1], [exact]) <= bound


# ---- copies and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict", "to torch"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_copies_and_checkpoints_go_on(name: str, options: dict[str, Any], how: str) -> None:
    start = make_params(torch.float64, [(5,), (2, 3)])
    params = like(start)
    optimizer: torch.optim.Optimizer = theirs(name, params, **options)
    lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)  # leaves a wrapper of step, which no copy may keep
    walk(optimizer, params, start, range(1))
    fuse(optimizer, amp_scaling=False)
    walk(optimizer, params, start, range(1, 2))
    if how in ("pickle", "deepcopy"):
        other: Any = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
        assert other._step_supports_amp_scaling is False
    else:
        other = (theirs if how == "to torch" else ours)(name, like(params))
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(other, FusedOptimizer) is (how != "to torch") and "step" not in vars(other)
    copies = [p for group in other.param_groups for p in group["params"]]
    walk(optimizer, params, start, range(2, STEPS))
    walk(other, copies, start, range(2, STEPS))
    if how == "to torch":
        # torch casts NAdam's fp32 scalar to the parameter's dtype on loading, and goes on in that.
        precision = torch.float32 if any(rule.scalars for rule in REGISTRY[name].rules) else torch.float64
        assert error(copies, params) <= 4 * STEPS * torch.finfo(precision).eps * largest(start)
    else:
        assert same_bits(copies, params)
