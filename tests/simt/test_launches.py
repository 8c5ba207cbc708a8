"""How many launches a checked step takes, and that what was folded into one gives the bits of launches of its own.

This file runs itself under PYTRAIN_BACKEND=simt, once with control blocks that the host sees and once with such as it
does not (PYTRAIN_SIMT_REMOTE=1).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import pytrain
from pytrain import backend
from pytrain.amp import LossScaler
from pytrain.control import SETTLE, SUMS, WRITE
from pytrain.optim import LAMB, REGISTRY, SGD, AdamW

SIMT = backend.simulated and os.environ.get("PYTRAIN_LAUNCHES") == "1"
REMOTE = os.environ.get("PYTRAIN_SIMT_REMOTE") == "1"
here = pytest.mark.skipif(not SIMT, reason="run by test_on_simulated_launches in its own process")
KERNELS = sorted(name for name, cls in REGISTRY.items() if cls.takes_control)
INF = float("inf")


@pytest.mark.parametrize("remote", ["0", "1"])
def test_on_simulated_launches(remote: str) -> None:
    """All others of this file."""
    if SIMT:
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from build import build

    build()
    own = {"PYTRAIN_BACKEND": "simt", "PYTRAIN_SIMT_REMOTE": remote, "PYTRAIN_LAUNCHES": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(Path(__file__))],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout


def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(backend.__file__).parent / "_kernels_simt.so"))


def launches(body: Callable[[], Any]) -> int:
    """How many launches something takes."""
    before = library().pytrain_simt_launches()
    body()
    return int(library().pytrain_simt_launches() - before)


def problem(count: int = 3, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (300,), (4099,))
    params = [Parameter(torch.randn(shapes[i % 3], generator=generator).to(dtype)) for i in range(count)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


def everything(optimizer: Any) -> list[Tensor]:
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return params + [v for p in optimizer.state.values() for v in p.values() if isinstance(v, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def apart(optimizer: Any) -> None:
    """From now on this optimizer's steps settle and move the scale in launches of their own."""
    optimizer._settled.home = None


@here
@pytest.mark.parametrize(("cls", "expected"), [(AdamW, 2), (LAMB, 3)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize("groups", [1, 12])
def test_a_checked_step_takes_two_launches_and_one_for_sums(
    cls: Any, expected: int, scaled: bool, count: int, groups: int
) -> None:
    params = problem(count * groups if count == 1 else count)
    optimizer = cls([{"params": params[i::groups]} for i in range(groups)])
    scaler = LossScaler() if scaled else None
    for _ in range(2):
        pytrain.step(optimizer, scaler)
    assert launches(lambda: pytrain.step(optimizer, scaler)) == expected
    assert launches(lambda: pytrain.step(optimizer, scaler, max_norm=1.0, clip_per="group")) == expected


@here
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_same_of_other_formats_and_of_gradients_that_lie_otherwise(dtype: torch.dtype, transposed: bool) -> None:
    params = problem(dtype=dtype)
    optimizer, scaler = AdamW(params), LossScaler()
    if transposed:  # each pass copies that gradient, and may have to tell the device where to
        params[0].grad = torch.randn(7, 5).to(dtype).t()
    for _ in range(2):
        pytrain.step(optimizer, scaler)
    assert launches(lambda: pytrain.step(optimizer, scaler, max_norm=1.0)) <= 2 + 2 * transposed
    assert optimizer.settles


@here
def test_a_skipped_step_takes_no_more() -> None:
    params = problem()
    optimizer, scaler = AdamW(params), LossScaler(init_scale=8.0)
    for _ in range(2):
        pytrain.step(optimizer, scaler)
    params[1].grad[7] = INF  # type: ignore[index]
    assert launches(lambda: pytrain.step(optimizer, scaler)) == 2 and scaler.get_scale() == 4.0


@here
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.5}, {"max_norm": 0.5, "clip_per": "group"}, {"clip_value": 0.1}])
def test_bits_are_those_of_launches_of_their_own(name: str, clip: dict[str, Any]) -> None:
    params, scaler, steps = problem(), LossScaler(init_scale=64.0, growth_interval=2), 0
    twins, twin_scaler = deepcopy(params), deepcopy(scaler)
    ours, twin = (REGISTRY[name]([{"params": p[:1]}, {"params": p[1:]}]) for p in (params, twins))
    for number, bad in enumerate((1.0, 2.0, INF, 1.0, 1.0)):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.linspace(-3.0, 5.0, p.numel()).view(p.shape) * (number + 1)
            p.grad.view(-1)[4] = bad
            q.grad = p.grad.clone()
        found = pytrain.step(ours, scaler, **clip), pytrain.step(twin, twin_scaler, **clip)
        steps += int(found[0].applied)
        assert torch.equal(found[0].scale, found[1].scale) and torch.equal(found[0].applied, found[1].applied)
        assert torch.equal(found[0]._controls[0].nan_to_num(-7.0), found[1]._controls[0].nan_to_num(-7.0))
        assert torch.equal(scaler._state, twin_scaler._state)
        assert same(everything(ours), everything(twin))
        apart(twin)
    assert steps == 4 and twin._settled is not None and twin._settled.home is None


@here
def test_a_scale_below_one_that_overflows_is_a_skip() -> None:
    params = problem(1)
    optimizer, scaler = SGD(params, lr=1.0), LossScaler(init_scale=2.0**-10)
    params[0].grad = torch.full_like(params[0], 2.0**127)
    before = params[0].detach().clone()
    assert not pytrain.step(optimizer, scaler).applied
    assert torch.equal(params[0].detach(), before) and scaler.get_scale() == 2.0**-11


@here
def test_more_groups_than_fit_in_a_launch() -> None:
    params, twins = problem(150), problem(150)
    ours, twin = (SGD([{"params": [p]} for p in every], lr=0.1) for every in (params, twins))
    for _ in range(2):
        for optimizer in (ours, twin):
            pytrain.step(optimizer, max_norm=0.5, clip_per="group")
        assert same(everything(ours), everything(twin))
        apart(twin)
    uploads = 1 + ((5 + 18 * 150 + 499) // 500 if REMOTE else 0)  # clip groups, hyperparameters: values where few
    assert launches(lambda: pytrain.step(ours, max_norm=0.5, clip_per="group")) == 2 + uploads


@here
def test_what_takes_launches_of_its_own() -> None:
    a, b = SGD(problem(), lr=0.1), SGD(problem(), lr=0.1)
    scaler = LossScaler(init_scale=4.0, growth_interval=1)
    pytrain.step([a, b], scaler)
    assert launches(lambda: pytrain.step([a, b], scaler, max_norm=1.0)) == 6  # two of each pass, settle, scaler
    assert scaler.get_scale() == 16.0
    assert launches(lambda: scaler.step(a)) == 2
    assert launches(lambda: scaler.update()) == 1 and scaler.get_scale() == 32.0
    scaler.unscale_(a)
    assert launches(lambda: pytrain.step(a, scaler)) == 4 and scaler.get_scale() == 64.0
    params = problem()
    average = pytrain.ema.EMA(torch.nn.ParameterList(params))
    c = SGD(params, lr=0.1)
    pytrain.step(c, scaler, ema=average)
    assert launches(lambda: pytrain.step(c, scaler, ema=average)) == 3 and scaler.get_scale() == 256.0


@here
def test_a_window_moves_the_scale_at_its_end() -> None:
    a, b = SGD(problem(), lr=0.1), SGD(problem(), lr=0.1)
    scaler = LossScaler(init_scale=4.0, growth_interval=1)
    with pytrain.open_step([a, b], scaler) as window:
        window.step(a)
        window.step(b)
        assert scaler.get_scale() == 4.0
    assert scaler.get_scale() == 8.0


@here
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_launch_that_fails_leaves_the_scale(name: str) -> None:
    optimizer: Any = REGISTRY[name](problem())  # type: ignore[arg-type]
    scaler = LossScaler(init_scale=4.0, growth_interval=1)
    pytrain.step(optimizer, scaler)
    state, before = scaler._state.clone(), [x.clone() for x in everything(optimizer)]
    for failing in range(launches(lambda: pytrain.step(deepcopy(optimizer), None)) - 1):
        library().pytrain_simt_fail(failing)
        with pytest.raises(RuntimeError, match="launch failed"):
            pytrain.step(optimizer, scaler)
        assert torch.equal(scaler._state, state) and same(before, everything(optimizer))
    assert pytrain.step(optimizer, scaler).applied and scaler.get_scale() == 16.0


@here
def test_a_hook_that_fails_leaves_the_scale() -> None:
    optimizer, scaler = AdamW(problem()), LossScaler(init_scale=4.0, growth_interval=1)
    pytrain.step(optimizer, scaler)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    hook = optimizer.register_step_post_hook(fail)
    with pytest.raises(ZeroDivisionError):
        pytrain.step(optimizer, scaler)
    hook.remove()
    assert scaler.get_scale() == 8.0
    assert pytrain.step(optimizer, scaler).applied and scaler.get_scale() == 16.0


@here
def test_a_scale_that_autograd_has_saved_is_seen_to_have_moved() -> None:
    params = problem(1)
    optimizer, scaler = SGD(params, lr=0.1), LossScaler()
    version = scaler.current._version
    pytrain.step(optimizer, scaler)
    assert scaler.current._version > version


@here
def test_what_a_launch_cannot_do_besides_is_an_error_before_anything_is_written() -> None:
    optimizer, scaler = AdamW(problem()), LossScaler(init_scale=4.0)
    for _ in range(2):
        pytrain.step(optimizer, scaler)
    settled: Any = optimizer._settled
    settled.begin(1.0)
    settled.gather(optimizer)
    plan, _, grads, rows = settled.work[0]
    control = settled.control
    before, state = [x.clone() for x in everything(optimizer)], scaler._state
    ops, policy = torch.ops.pytrain, list(scaler.rules)

    def call(mode: int, beside: Tensor | None, groups: list[int], numbers: list[float]) -> None:
        common = (plan.table, plan.pairs, len(grads), rows, control, settled.given, True, mode)
        ops._table_launch_pairs(*common, beside, groups, [1.0], numbers)

    with pytest.raises(RuntimeError, match="mode is 2, which _table_launch has"):
        ops._table_step_pairs(plan.table, plan.pairs, len(grads), rows, control, settled.given, True, SETTLE)
    with pytest.raises(RuntimeError, match="beside must be .* of 1 elements on the device of control, has 6"):
        call(SETTLE, state, [0], [])
    with pytest.raises(RuntimeError, match="beside must be .* of 6 elements on the device of control, has 1"):
        call(SETTLE, scaler.current, [0], policy)
    with pytest.raises(RuntimeError, match="policy has 3 entries, expected 8"):
        call(SETTLE, state, [0], policy[:3])
    with pytest.raises(RuntimeError, match="clip_groups has 2 entries, expected 1"):
        call(SETTLE, state, [0, 0], policy)
    with pytest.raises(RuntimeError, match="clip_groups has 1, expected -1 to 0"):
        call(SETTLE, state, [1], policy)
    with pytest.raises(RuntimeError, match="beside is missing"):
        call(WRITE, None, [], [])
    with pytest.raises(RuntimeError, match="no pass 1 has found where this scaler moves"):
        call(WRITE, state, [], [])
    with pytest.raises(RuntimeError, match="mode is 3, but the table has no room for sums, or the rule takes none"):
        ops._table_step_pairs(plan.table, plan.pairs, len(grads), rows, control, settled.given, True, SUMS)
    assert same(before, everything(optimizer)) and scaler.get_scale() == 4.0
