"""What holds where the host cannot look into a device's memory: shown on the CPU, with control blocks kept apart.

PYTRAIN_SIMT_REMOTE=1 has every control block in memory that the host writes by launches only, as on a GPU, so that
this file runs itself in a process with that set.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

import pytrain
from pytrain import backend
from pytrain.amp import LossScaler
from pytrain.ema import EMA, SWA
from pytrain.optim import REGISTRY
from pytrain.optim.schedules import InverseSqrt, WarmupCosine

REMOTE = backend.simulated and os.environ.get("PYTRAIN_SIMT_REMOTE") == "1"
here = pytest.mark.skipif(not REMOTE, reason="run by test_on_a_device_that_the_host_cannot_see in its own process")
KERNELS = sorted(name for name, cls in REGISTRY.items() if cls.takes_control)
READS = {"item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy", "__array__", "__len__"}


def test_on_a_device_that_the_host_cannot_see() -> None:
    """All others of this file."""
    run_remote(__file__)


def run_remote(file: str) -> None:
    """Run the tests of a file in a process where no control block can be seen; nothing where this is one."""
    if REMOTE:
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from build import build

    build()
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", file],
        env={**os.environ, "PYTRAIN_BACKEND": "simt", "PYTRAIN_SIMT_REMOTE": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


class NoReads(TorchFunctionMode):
    """Notes every question of the host about a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in READS or (name == "to" and any(str(a) == "cpu" for a in args)):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


def problem(bad: float | None = None) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 7), (300,), ())]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    if bad is not None:
        params[1].grad[7] = bad  # type: ignore[index]
    return params


def everything(optimizer: Any) -> list[Tensor]:
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return params + [v for p in optimizer.state.values() for v in p.values() if isinstance(v, Tensor)]


@here
@pytest.mark.parametrize("name", KERNELS)
def test_a_step_asks_the_device_nothing(name: str) -> None:
    params = problem()
    optimizer, scaler = REGISTRY[name](params), LossScaler(init_scale=4.0)  # type: ignore[arg-type]
    pytrain.step(optimizer, scaler, max_norm=1.0)
    with NoReads() as seen:
        for _ in range(3):
            info = pytrain.step(optimizer, scaler, max_norm=1.0)
    assert seen.reads == []
    assert info.applied and info.scale == 4.0 and not optimizer.step_was_skipped


@here
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_skip_that_only_the_device_knows_of_writes_nothing(name: str, bad: float) -> None:
    params = problem()
    optimizer, scaler = REGISTRY[name](params), LossScaler(init_scale=4.0)  # type: ignore[arg-type]
    pytrain.step(optimizer, scaler)
    before = [x.clone() for x in everything(optimizer)]
    params[1].grad[7] = bad  # type: ignore[index]
    with NoReads() as seen:
        info = pytrain.step(optimizer, scaler, max_norm=1.0)
    assert seen.reads == []
    assert not info.applied and info.first_bad == 1 and optimizer.step_was_skipped and scaler.get_scale() == 2.0
    assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))
    params[1].grad[7] = 1.0  # type: ignore[index]
    assert pytrain.step(optimizer, scaler).applied and not optimizer.step_was_skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_skip_zeroes_the_gradients_where_the_step_does(dtype: torch.dtype) -> None:
    params = [Parameter(p.detach().to(dtype)) for p in problem()] + [Parameter(torch.ones(9000, dtype=dtype)[1:])]
    optimizer = REGISTRY["adamw"](params, lr=0.1, zero_grad_in_step=True)  # type: ignore[call-arg, arg-type]
    for bad in (1.0, float("inf"), 1.0):
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad[7] = bad  # type: ignore[index]
        before = [p.detach().clone() for p in params]
        assert pytrain.step(optimizer).applied == (bad == 1.0)
        assert all((p.grad == 0).all() for p in params)  # type: ignore[union-attr]
        moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        assert all(moved) if bad == 1.0 else not any(moved)


@here
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])
def test_a_grad_scaler_of_torch_is_asked_nothing(name: str, found: float) -> None:
    params, twins = problem(), problem()
    ours, plain = REGISTRY[name](params), REGISTRY[name](twins)  # type: ignore[arg-type]
    for optimizer in (ours, plain):
        optimizer.step()
    before = [x.clone() for x in everything(ours)]
    for p in params:
        p.grad *= 8.0  # type: ignore[operator]
    ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor([found])  # type: ignore[attr-defined]
    with NoReads() as seen:
        ours.step()
    assert seen.reads == [] and ours.step_was_skipped == (found != 0.0)
    plain.step()
    expected = before if found else everything(plain)
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), expected, strict=True))
    del ours.grad_scale, ours.found_inf  # type: ignore[attr-defined]
    ours.step()
    assert not ours.step_was_skipped


@here
def test_an_average_follows_applied_steps_and_asks_the_device_nothing() -> None:
    model = nn.ParameterList(problem())
    params = list(model)
    optimizer, ema = REGISTRY["sgd"](params, lr=0.1), EMA(model, 0.75)  # type: ignore[call-arg, arg-type]
    pytrain.step(optimizer, ema=ema)
    expected = [p.detach().double() for p in params]
    with NoReads() as seen:
        for bad in (1.0, float("inf"), float("nan"), 1.0, 1.0):
            params[1].grad[7] = bad
            pytrain.step(optimizer, ema=ema)
            if bad == 1.0:
                expected = [0.75 * e + 0.25 * p.detach().double() for e, p in zip(expected, params, strict=True)]
    assert seen.reads == []
    assert ema.steps == ema.n_averaged == 4 and ema.state_dict()["steps"] == 4
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(ema.averages[id(p)].double(), e, rtol=1e-6, atol=1e-6)
    pytrain.step(optimizer, ema=ema)
    ema.update()
    assert ema.steps == 6


@here
@pytest.mark.parametrize("groups", [1, 40])
def test_a_schedule_follows_applied_steps_and_asks_the_device_nothing(groups: int) -> None:
    def make() -> tuple[list[Parameter], Any, WarmupCosine]:
        params = [Parameter(torch.ones(3)) for _ in range(groups)]
        listed = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
        optimizer = REGISTRY["adamw"](listed)  # type: ignore[arg-type]
        return params, optimizer, WarmupCosine(optimizer, warmup_steps=2, total_steps=5, min_factor=0.1)

    (params, ours, schedule), (twins, plain, expected) = make(), make()
    for step, bad in enumerate((1.0, 1.0, float("inf"), 1.0, float("nan"), 1.0, 1.0, 1.0)):
        for p, q in zip(params, twins, strict=True):
            p.grad, q.grad = torch.full_like(p, 0.5), torch.full_like(q, 0.5)
        params[0].grad[1] = 0.5 * bad  # type: ignore[index]
        with NoReads() as seen:
            pytrain.step(ours, schedule=schedule)
        assert seen.reads == [] or step == 0  # the first has tables made
        if bad == 1.0:
            plain.step()
            expected.step()
    assert schedule.last_epoch == expected.last_epoch == 6
    assert [float(lr) for lr in schedule.get_last_lr()] == expected.get_last_lr()
    assert [float(group["lr"]) for group in ours.param_groups] == [group["lr"] for group in plain.param_groups]
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
    state = schedule.state_dict()
    assert {k: v for k, v in state.items() if k[0] != "_"} == {
        k: v for k, v in expected.state_dict().items() if k[0] != "_"
    }
    schedule.step()  # by hand: the host has the count again
    expected.step()
    assert [group["lr"] for group in ours.param_groups] == [group["lr"] for group in plain.param_groups]
    schedule.load_state_dict(state)
    assert schedule.last_epoch == 6 and copy.copy(schedule).last_epoch == 6


@here
def test_a_schedules_table_is_renewed_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytrain.optim.schedules.WINDOW", 3)
    params = [Parameter(torch.ones(3))]
    optimizer = REGISTRY["sgd"](params, lr=1.0)  # type: ignore[call-arg, arg-type]
    schedule = InverseSqrt(optimizer, warmup_steps=2)
    for n in range(10):
        assert float(optimizer.param_groups[0]["lr"]) == schedule.factor(n)
        params[0].grad = torch.ones(3)
        pytrain.step(optimizer, schedule=schedule)
    assert schedule.last_epoch == 10


@here
@pytest.mark.parametrize("make", [lambda m: EMA(m, start_step=3), lambda m: EMA(m, every=2), SWA])
def test_an_average_whose_weights_depend_on_the_count_is_right_too(make: Any) -> None:
    model = nn.ParameterList(problem())
    params = list(model)
    optimizer, average = REGISTRY["sgd"](params, lr=0.1), make(model)  # type: ignore[call-arg, arg-type]
    other = make(model)
    for bad in (1.0, float("inf"), 1.0, 1.0, float("nan"), 1.0, 1.0, 1.0):
        params[1].grad[7] = bad
        if pytrain.step(optimizer, ema=average).applied:
            other.update()
    assert (average.steps, average.n_averaged) == (other.steps, other.n_averaged) == (6, other.n_averaged)
    for p in params:
        assert torch.equal(average.averages[id(p)], other.averages[id(p)])


@here
def test_one_norm_over_two_optimizers_is_made_on_the_device() -> None:
    a, b = problem(), problem()
    first, second = REGISTRY["sgd"](a, lr=1.0), REGISTRY["sgd"](b, lr=1.0)  # type: ignore[call-arg, arg-type]
    pytrain.step([first, second], max_norm=1.0, clip_per="all")
    before = [p.detach().clone() for p in a]
    with NoReads() as seen:
        pytrain.step([first, second], max_norm=1.0, clip_per="all")
    assert seen.reads == []
    norm = torch.sqrt(2 * sum(p.grad.double().square().sum() for p in a))  # type: ignore[union-attr, arg-type]
    for p, old in zip(a, before, strict=True):
        torch.testing.assert_close(p.detach(), old - (p.grad / norm).float())  # type: ignore[operator]


@here
def test_more_param_groups_than_a_launch_carries() -> None:
    params, twins = [Parameter(torch.ones(3)) for _ in range(40)], [Parameter(torch.ones(3)) for _ in range(40)]
    for p, q in zip(params, twins, strict=True):
        p.grad, q.grad = torch.ones(3), torch.ones(3)
    groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]
    exact = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(twins)]
    ours, theirs = REGISTRY["adamw"](groups), torch.optim.AdamW(exact)  # type: ignore[arg-type]
    for step in range(3):
        pytrain.step(ours, max_norm=1e9)
        theirs.step()
        ours.param_groups[5]["lr"] = theirs.param_groups[5]["lr"] = 0.3 / (step + 1)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "ademamix": {"T_alpha_beta3": 5}}
CHOOSE = {"sgd": {"momentum"}, "rmsprop": {"momentum"}}  # numbers that select a rule, which the host does


def on_device(value: Any) -> Any:
    """The same number, or numbers, where only the device knows it; what is no number as it is."""
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    return torch.tensor(value, dtype=torch.float64) if type(value) in (int, float) else value


def with_numbers_on_device(name: str, params: Any) -> Any:
    """An optimizer whose hyperparameters are all tensors."""
    optimizer: Any = REGISTRY[name](params, **OPTIONS.get(name, {}))
    for group in optimizer.param_groups:
        group.update({k: on_device(v) for k, v in group.items() if k != "params" and k not in CHOOSE.get(name, ())})
    return optimizer


def step_at(optimizer: Any, lr: float, checked: bool) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if checked:
        pytrain.step(optimizer, max_norm=1.0)
    else:
        optimizer.step()


@here
@pytest.mark.parametrize("groups", [1, 15])
@pytest.mark.parametrize("name", KERNELS)
def test_numbers_on_the_device_are_read_there(name: str, groups: int) -> None:
    """As if they were floats, however many param groups, in plain and in checked steps, and changed in place."""
    split, same = ([{"params": problem()} for _ in range(groups)] for _ in range(2))
    ours, plain = with_numbers_on_device(name, split), REGISTRY[name](same, **OPTIONS.get(name, {}))  # type: ignore
    for optimizer in (ours, plain):
        optimizer.step()
    with NoReads() as seen:
        for i in range(4):
            step_at(ours, 0.01 * i, checked=i % 2 == 1)
    assert seen.reads == []
    for i in range(4):
        step_at(plain, 0.01 * i, checked=i % 2 == 1)
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(plain), strict=True))


@here
@pytest.mark.parametrize("options", [{"state_dtype": "8bit"}, {"ema_decay": 0.9}, {"step_in_backward": True}], ids=str)
def test_numbers_on_the_device_go_with_every_kind_of_step(options: dict[str, Any]) -> None:
    results = []
    for lr in (0.125, torch.tensor(0.125)):
        p = Parameter(torch.linspace(-1, 1, 5000))
        optimizer = REGISTRY["adamw"]([p], lr=lr, **options)  # type: ignore[call-arg]
        for i in range(3):
            if i == 2:
                optimizer.param_groups[0]["lr"] *= 0.5
            (p * p).sum().backward()  # steps in backward, where the mode sees nothing
            with NoReads() as seen:
                optimizer.step()
            assert i == 0 or seen.reads == []
            p.grad = None
        results.append(everything(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_lr_of_a_scheduler_is_never_asked_for(dtype: torch.dtype) -> None:
    """Torch fills a tensor lr in place; here of one element, in a dimension."""
    params, twins = problem(), problem()
    lr = torch.tensor([0.125], dtype=dtype)
    ours, plain = REGISTRY["adamw"](params, lr=lr), REGISTRY["adamw"](twins, lr=0.125)  # type: ignore
    schedule = torch.optim.lr_scheduler.ExponentialLR(ours, 0.5)
    ours.step()
    with NoReads() as seen:
        for _ in range(3):
            schedule.step()
            ours.step()
    assert seen.reads == [] and ours.param_groups[0]["lr"] is lr
    for i in range(4):
        plain.param_groups[0]["lr"] = 0.125 * 0.5**i
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(plain), strict=True))


@here
def test_an_lr_may_become_a_tensor_and_a_number_again() -> None:
    params, twins = problem(), problem()
    ours, plain = REGISTRY["adamw"](params, lr=0.5), REGISTRY["adamw"](twins, lr=0.5)  # type: ignore
    for lr in (0.5, torch.tensor(0.25), 0.25, torch.tensor(0.25), torch.tensor(0.0625)):
        ours.param_groups[0]["lr"], plain.param_groups[0]["lr"] = lr, float(lr)
        ours.step()
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(plain), strict=True))


@here
@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(()) * 1j])
def test_a_number_on_the_device_is_one_number(wrong: Tensor) -> None:
    params = problem()
    optimizer = REGISTRY["adamw"]([{"params": params[:1]}, {"params": params[1:]}])  # type: ignore
    optimizer.step()
    before = [x.clone() for x in everything(optimizer)]
    optimizer.param_groups[1]["lr"] = wrong
    with pytest.raises(ValueError, match=r"AdamW: param_groups\[1\]: lr: expected one real element, got "):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(optimizer), strict=True))


@here
def test_a_torch_grad_scaler_goes_with_an_lr_on_the_device() -> None:
    params, twins = problem(), problem()
    ours, plain = REGISTRY["adamw"](params, lr=torch.tensor(0.5)), REGISTRY["adamw"](twins, lr=0.5)  # type: ignore
    for optimizer in (ours, plain):
        optimizer.step()
    for p in params:
        p.grad *= 8.0  # type: ignore[operator]
    ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor([0.0])  # type: ignore[attr-defined]
    with NoReads() as seen:
        ours.step()
    assert seen.reads == []
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(plain), strict=True))


@here
def test_the_torch_path_reads_an_lr_on_the_device() -> None:
    params, twins = problem(), problem()
    groups = [{"params": params[:1], "fused": False}, {"params": params[1:]}]
    same = [{"params": twins[:1], "fused": False}, {"params": twins[1:]}]
    ours, plain = REGISTRY["adamw"](groups, lr=torch.tensor(0.5)), REGISTRY["adamw"](same, lr=0.5)  # type: ignore
    for _ in range(2):
        ours.step()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(plain), strict=True))


@here
@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clip_by_value_holds_for_any_number_of_param_groups(count: int, dtype: torch.dtype) -> None:
    params = [Parameter(torch.ones(3, dtype=dtype)) for _ in range(count)]
    optimizer = REGISTRY["sgd"]([{"params": [p]} for p in params], lr=1.0)  # type: ignore[call-arg, arg-type]
    for _ in range(2):
        for p in params:
            p.grad = torch.full_like(p, 3.0)
        pytrain.step(optimizer, clip_value=0.5)
    assert all((p == 0.0).all() for p in params)
