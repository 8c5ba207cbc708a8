"""torch.amp.GradScaler on the CPU: every mix of flag, scale and unscale_, and what hosts look at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_cases import (
    VARIANTS,
    began,
    bits,
    error,
    fastest,
    largest,
    like,
    make_params,
    ours,
    run,
    same_bits,
    torch_class,
)
from torch import Tensor
from torch.nn import Parameter

from pytrain.optim import REGISTRY, SGD, AdamW, FusedOptimizer

NAMES = list(VARIANTS)
INF = float("inf")


def everything(optimizer: FusedOptimizer) -> list[Tensor]:
    """Every tensor that a step may change, in a fixed order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [p.detach() for p in params] + states


def set_amp(optimizer: torch.optim.Optimizer, scale: float | None, flag: Any) -> None:
    """What GradScaler.step sets on an optimizer that takes them."""
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)  # type: ignore[attr-defined]
    optimizer.found_inf = flag  # type: ignore[attr-defined]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", NAMES)
def test_flag_and_scale_in_every_combination(name: str, fused: bool | None) -> None:
    for scale in (None, 1.0, 3.0, 2.0**-10, 65536.0):
        for flag in (0, 0.0, 1.0, 2.0, 1e-38, -1.0, math.nan):
            check_flag_and_scale(name, scale, flag, fused)


def check_flag_and_scale(name: str, scale: float | None, flag: float, fused: bool | None) -> None:
    """A step with this flag and scale is a plain step with unscaled gradients, or none."""
    params, plain = make_params(torch.float32, [(7,), (2, 3)]), make_params(torch.float32, [(7,), (2, 3)])
    a, b = ours(name, params, fused=fused), ours(name, plain, fused=fused)
    run(a, params, params, 1)
    run(b, plain, plain, 1)
    for p, q in zip(params, plain, strict=True):
        q.grad = torch.linspace(1, 2, p.numel()).reshape(p.shape)
        p.grad = q.grad * (scale or 1.0)
    before = [bits(x).clone() for x in everything(a)]
    set_amp(a, scale, flag if flag == 0 and isinstance(flag, int) else torch.tensor(flag))
    a.step()
    assert a.step_was_skipped is (flag != 0)
    if flag != 0:
        assert all(torch.equal(x, bits(y)) for x, y in zip(before, everything(a), strict=True))
        return
    b.step()
    if scale == 3.0:  # the one scale here whose inverse rounds
        assert all(torch.allclose(p, q, rtol=1e-6) for p, q in zip(params, plain, strict=True))
    else:
        assert same_bits(everything(a), everything(b))


# torch refuses to unscale_ fp16 gradients.
MIXES = [(d, u) for d in (torch.float32, torch.bfloat16, torch.float16) for u in (False, True)][:-1]


@pytest.mark.parametrize(("dtype", "unscale_first"), MIXES)
@pytest.mark.parametrize("name", [name for name in NAMES if torch_class(name) and fastest(name)])
def test_a_scaled_run_is_as_exact_as_torchs_fused_one(name: str, unscale_first: bool, dtype: torch.dtype) -> None:
    """Ten steps under a growing scale, two of them with an inf, against the eight good ones in fp64."""
    start, good = torch.linspace(-1, 1, 64).to(dtype), torch.linspace(0.5, 1.5, 64).to(dtype)
    exact = Parameter(start.double())
    plain = torch_class(name)([exact], lr=0.01, foreach=False)  # type: ignore[misc, call-arg]
    for _ in range(8):
        exact.grad = good.double()
        plain.step()
    finals, scales = [], []
    for make, how in ((REGISTRY[name], {}), (torch_class(name), {"fused": True})):
        p = Parameter(start.clone())
        optimizer: Any = make([p], lr=0.01, **how)  # type: ignore[misc, call-arg, arg-type]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        for step in range(10):
            optimizer.zero_grad()
            x = good.clone()
            if step in (4, 7):
                x[5] = INF
            scaler.scale((p * x).sum()).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        finals.append(p)
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    rounding = torch.finfo(dtype).eps * largest([exact])
    assert error(finals[:1], [exact]) <= max(2 * error(finals[1:], [exact]), rounding)


@pytest.mark.parametrize("amp_scaling", [True, False])
def test_two_optimizers_under_one_scaler_have_flags_of_their_own(amp_scaling: bool) -> None:
    good, bad = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizers = [SGD([good], lr=1.0, amp_scaling=amp_scaling), SGD([bad], lr=1.0, amp_scaling=amp_scaling)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = good.sum() + (bad * torch.tensor([1.0, INF, 1.0])).sum()
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert good.detach().tolist() == [0.0] * 3 and bad.detach().tolist() == [1.0] * 3
    assert [o.step_was_skipped for o in optimizers] == [False, amp_scaling]
    assert scaler.get_scale() == 4.0


def test_the_flag_of_one_step_does_not_reach_the_next() -> None:
    p = Parameter(torch.ones(2))
    optimizer, scaler = SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, skipped in ((INF, True), (1.0, False), (INF, True)):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.step_was_skipped is skipped
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    p.grad = torch.ones(2)
    optimizer.step()
    assert not optimizer.step_was_skipped and p.detach().tolist() == [-1.0, -1.0]


def test_an_optimizer_without_gradients_steps_under_a_scaler() -> None:
    """GradScaler then passes the plain number 0 as the flag."""
    p, other = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer, scaler = AdamW([p]), torch.amp.GradScaler("cpu")
    scaler.scale(other.sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p.detach(), torch.ones(2)) and not optimizer.state and not optimizer.step_was_skipped


def test_clipping_between_unscale_and_step_sees_true_gradients() -> None:
    p = Parameter(torch.zeros(4))
    optimizer, scaler = SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * 3.0).sum()).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_([p], 3.0)
    scaler.step(optimizer)
    assert norm.item() == 6.0 and torch.allclose(p.detach(), torch.full((4,), -1.5), rtol=1e-5)


def test_gradients_stay_scaled() -> None:
    p = Parameter(torch.zeros(2))
    optimizer, scaler = SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert p.grad is not None and p.grad.tolist() == [16.0, 16.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_skip_before_the_first_step_makes_no_state(name: str) -> None:
    params = make_params(torch.float16, [(5,), ()])
    before = like(params)
    optimizer, scaler = ours(name, params), torch.amp.GradScaler("cpu")
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert not began(optimizer) and same_bits(params, before) and optimizer.step_was_skipped


def test_a_host_that_watches_for_skips_sees_them_without_amp_scaling() -> None:
    """As Accelerate does: it replaces `optimizer.step` and takes a step that was not called for a skipped one."""
    for amp_scaling, seen in ((False, [True, False]), (True, [True, True])):
        p = Parameter(torch.ones(2))
        optimizer, scaler, calls = SGD([p], lr=1.0, amp_scaling=amp_scaling), torch.amp.GradScaler("cpu"), []
        original = optimizer.step

        def patched(*args: Any, original: Any = original, calls: list[int] = calls) -> Any:
            calls.append(1)
            return original(*args)

        optimizer.step = patched  # type: ignore[method-assign]
        called = []
        for factor in (1.0, INF):
            optimizer.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            calls.clear()
            scaler.step(optimizer)
            scaler.update()
            called.append(bool(calls))
        assert called == seen and optimizer.step_was_skipped is amp_scaling


def test_closures_are_refused_by_the_scaler_as_for_torch() -> None:
    p = Parameter(torch.ones(2))
    optimizer, scaler = SGD([p], lr=1.0), torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError, match="[Cc]losure"):
        scaler.step(optimizer, closure=lambda: p.sum())
    assert torch.equal(p.detach(), torch.ones(2))
