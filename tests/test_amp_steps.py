"""pytrain.amp.LossScaler in training: beside torch.amp.GradScaler, in its users' cases, and what a skip leaves."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).parent / "optim"))  # the optimizers' cases
from optim_cases import CASES, gradients, make_params, ours, same_bits

import pytrain.optim
from pytrain.amp import LossScaler

INF, NAN = math.inf, math.nan
Scaler = Any  # a LossScaler or torch.amp.GradScaler
SGDS = [pytest.param(torch.optim.SGD, id="torch"), pytest.param(pytrain.optim.SGD, id="pytrain")]


def both(**set_to: Any) -> tuple[LossScaler, torch.amp.GradScaler]:
    return LossScaler(**set_to), torch.amp.GradScaler("cpu", **set_to)


def go(scaler: Scaler, optimizer: torch.optim.Optimizer, *, unscale: bool = False) -> None:
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the parameters, of all states with their step counts, and of the numbers in the param groups."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for _, value in sorted(optimizer.state.get(p, {}).items())]
    numbers = [v for g in optimizer.param_groups for _, v in sorted(g.items()) if isinstance(v, (int, float, Tensor))]
    return [torch.as_tensor(x).detach().clone() for x in (*params, *states, *numbers)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return [x.dtype for x in a] == [x.dtype for x in b] and same_bits(a, b)


# ---- beside torch.amp.GradScaler -------------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding, whose gradient may be sparse, and a linear map; an input of inf overflows."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)

    def forward(self, words: Tensor, factor: float) -> Tensor:
        return (self.linear(self.embedding(words)) * factor).tanh().square().mean() * min(factor, 1e38)


# Fused SGD has no momentum here: GradScaler leaves its buffer unset where the first step is skipped.
MAKERS: dict[str, tuple[bool, Callable[[Net], torch.optim.Optimizer]]] = {
    "SGD": (False, lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)),
    "SGD fused": (False, lambda net: torch.optim.SGD(net.parameters(), lr=0.1, fused=True)),
    "SGD sparse": (True, lambda net: torch.optim.SGD(net.parameters(), lr=0.1)),
    "SparseAdam": (True, lambda net: torch.optim.SparseAdam(net.embedding.parameters(), lr=0.1)),
    "AdamW": (False, lambda net: torch.optim.AdamW(net.parameters(), lr=0.1)),
    "AdamW foreach": (False, lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, foreach=True)),
    "AdamW fused": (False, lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)),
    "pytrain AdamW": (False, lambda net: pytrain.optim.AdamW(net.parameters(), lr=0.1)),
}
PLANS = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=12)


@pytest.mark.parametrize("name", MAKERS)
def test_it_drops_in_for_torchs_scaler(name: str) -> None:
    """The same run under both, which change places at some step with each other's state."""
    sparse, make = MAKERS[name]

    @settings(deadline=None, max_examples=40)
    @given(PLANS, st.integers(0, 12), st.integers(-2, 16), st.integers(1, 4))
    def check(plan: list[tuple[bool, bool, bool]], swap_at: int, exponent: int, interval: int) -> None:
        scalers: list[Scaler] = list(both(init_scale=2.0**exponent, growth_interval=interval))
        nets = Net(sparse), Net(sparse)
        optimizers = [make(net) for net in nets]
        for step, (bad, unscale, clip) in enumerate(plan):
            if step == swap_at:
                states = [scaler.state_dict() for scaler in scalers]
                assert states[1].items() <= states[0].items()
                scalers = [torch.amp.GradScaler("cpu"), LossScaler()]
                for scaler, state in zip(scalers, states, strict=True):
                    scaler.load_state_dict(copy.deepcopy(state))
            for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
                optimizer.zero_grad()
                words = torch.tensor([step % 6, (step + 1) % 6, (step + 3) % 6])
                scaler.scale(net(words, INF if bad else 1.0)).backward()
                if bad:
                    touched = net.embedding.weight.grad
                    assert touched is not None
                    (touched._values() if sparse else touched)[0, 0] = INF
                if unscale:
                    scaler.unscale_(optimizer)
                    if clip and not sparse and not bad:
                        nn.utils.clip_grad_norm_(net.parameters(), 0.01)
                go(scaler, optimizer)
            assert scalers[0].get_scale() == scalers[1].get_scale()
            assert same_bits(list(nets[0].parameters()), list(nets[1].parameters()))

    check()


@pytest.mark.parametrize("name", ["SGD", "SGD sparse", "AdamW", "AdamW foreach"])
def test_a_scale_that_is_no_power_of_two_rounds_as_torchs_does(name: str) -> None:
    sparse, make = MAKERS[name]
    results = []
    for scaler in both(init_scale=3.3, growth_factor=1.7, growth_interval=1):
        optimizer = make(net := Net(sparse))
        for step in range(8):
            optimizer.zero_grad()
            scaler.scale(net(torch.tensor([step % 6, (step + 2) % 6]), 1.0)).backward()
            go(scaler, optimizer)
        results.append([torch.tensor(scaler.get_scale()), *net.parameters()])
    assert same_bits(*results)


@pytest.mark.parametrize("unscale", [False, True])
def test_sparse_rows_that_repeat_step_as_under_torchs_scaler(unscale: bool) -> None:
    results = []
    for scaler in both(init_scale=4.0):
        optimizer = torch.optim.SGD((net := Net(sparse=True)).parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(net(torch.tensor([step, 1, 1, 3, 1]), 1.0)).backward()
            go(scaler, optimizer, unscale=unscale)
        results.append(list(net.parameters()))
    assert same_bits(*results)


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("who", [{0}, {1}, {0, 1}], ids=["first", "second", "both"])
@pytest.mark.parametrize("when", range(7))
def test_two_optimizers_with_one_overflow_at_any_step(
    kind: type[torch.optim.Optimizer], who: set[int], when: int
) -> None:
    """A GAN's loop of seven steps: the one that met the inf is skipped, and the scale moves once a step for both."""
    results = []
    for scaler in both(init_scale=128.0, growth_interval=2):
        params, scales = [Parameter(torch.tensor([1.0, 2.0])), Parameter(torch.tensor([3.0, 4.0]))], []
        optimizers = [kind([p], lr=0.25) for p in params]  # type: ignore[call-arg]
        for step in range(7):
            for i, (p, optimizer) in enumerate(zip(params, optimizers, strict=True)):
                optimizer.zero_grad()
                scaler.scale((params[0] * params[1]).sum()).backward(inputs=[p])
                bad, before = step == when and i in who, p.detach().clone()
                p.grad[1] += INF if bad else 0.0  # type: ignore[index]
                scaler.step(optimizer)
                assert torch.equal(p.detach(), before) is bad
            scaler.update()
            scales.append(scaler.get_scale())
        results.append([torch.tensor(scales), *params])
    assert same_bits(*results)


@pytest.mark.parametrize("kind", SGDS)
def test_a_gradient_penalty_over_two_micro_batches(kind: type[torch.optim.Optimizer]) -> None:
    results = []
    for scaler in both(init_scale=64.0, growth_interval=2):
        optimizer = kind((net := Net(sparse=False)).parameters(), lr=0.1)  # type: ignore[call-arg]
        for step in range(6):
            optimizer.zero_grad()
            for micro in range(2):
                loss = net(torch.tensor([step % 6, micro]), 1.0)
                scaled = torch.autograd.grad(scaler.scale(loss), list(net.parameters()), create_graph=True)
                penalty = sum((g / scaler.get_scale()).square().sum() for g in scaled)
                scaler.scale((loss + penalty) / 2).backward()
            if step in (1, 4):
                net.linear.bias.grad[0] = -INF  # type: ignore[index]
            go(scaler, optimizer)
        results.append([torch.tensor(scaler.get_scale()), *net.parameters()])
    assert same_bits(*results)


# ---- scale -----------------------------------------------------------------------------------------------------------


def test_scale_takes_any_nesting_as_torchs_does() -> None:
    def flat(x: Any) -> list[Any]:
        return [x.dtype, x.tolist()] if isinstance(x, Tensor) else [type(x), *map(flat, x)]

    a, b = torch.tensor([1.0, 2.0]), torch.tensor(3.0, dtype=torch.float16)
    mine, theirs = both(init_scale=8.0)
    for nested in ([a, (b, [a, b]), (), [[a]]], (b,), []):
        assert flat(mine.scale(nested)) == flat(theirs.scale(nested))
        assert flat(mine.scale(x for x in nested)) == flat(theirs.scale(x for x in nested))
    assert a.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_keeps_a_tensors_dtype(dtype: torch.dtype) -> None:
    mine, theirs = both(init_scale=3.0)
    for x in (torch.ones(2, dtype=dtype, requires_grad=True), torch.ones((), dtype=dtype, requires_grad=True)):
        one, other = mine.scale(x), theirs.scale(x)
        assert one.dtype == other.dtype and torch.equal(one, other)
        one.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype and bool((x.grad == 3.0).all())


@pytest.mark.parametrize("value", [None, 3, [torch.ones(1), 2.0], [[None]]])
def test_scale_refuses_what_is_no_tensor(value: Any) -> None:
    with pytest.raises(ValueError, match="^scale: expected a tensor or an iterable of tensors, got "):
        LossScaler().scale(value)


# ---- the order of calls ----------------------------------------------------------------------------------------------


class Loop:
    """One parameter of ones with a gradient of 8, at scale 8: an SGD step of 1 makes it zeros."""

    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **set_to: Any) -> None:
        self.param = Parameter(torch.ones(3))
        self.optimizer = kind([self.param], lr=1.0)  # type: ignore[call-arg]
        self.scaler = LossScaler(init_scale=8.0, growth_interval=1, **set_to)
        self.set(8.0)

    def set(self, value: float) -> None:
        self.param.grad = torch.full((3,), value)

    @property
    def values(self) -> list[float]:
        return [*self.param.tolist(), self.scaler.get_scale()]


@pytest.mark.parametrize("kind", SGDS)
def test_calls_out_of_order_are_refused_and_change_nothing(kind: type[torch.optim.Optimizer]) -> None:
    loop = Loop(kind)
    scaler, optimizer = loop.scaler, loop.optimizer
    with pytest.raises(RuntimeError, match="^update: no optimizer was stepped"):
        scaler.update()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    assert loop.param.grad is not None and loop.param.grad.tolist() == [1.0] * 3
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\)"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called"):
        scaler.step(optimizer)
    assert loop.values == [0.0] * 3 + [8.0]
    scaler.update()
    assert loop.values == [0.0] * 3 + [16.0]
    loop.set(16.0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step"):
        scaler.unscale_(optimizer)
    scaler.update()
    assert loop.values == [-1.0] * 3 + [32.0]


@pytest.mark.parametrize("wrapped", [float, torch.tensor])
def test_update_sets_a_scale_and_closes_the_step_as_torchs_does(wrapped: Callable[[float], Any]) -> None:
    for scaler in both(init_scale=8.0):
        loop, new_scale = Loop(), wrapped(4.0)
        scaler.scale(loop.param)
        for scale, update in ((8.0, None), (8.0, new_scale), (4.0, None), (4.0, None)):
            loop.set(scale)
            scaler.step(loop.optimizer)
            scaler.update(update)
            if isinstance(update, Tensor):
                update.fill_(9.0)
        assert loop.param.tolist() == [-3.0] * 3
        assert scaler.get_scale() == 4.0 and scaler.state_dict()["_growth_tracker"] == 3


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_what_becomes_bad_between_unscale_and_step_is_skipped(kind: type[torch.optim.Optimizer], value: float) -> None:
    """GradScaler applies such a step (pytorch#97415)."""
    loop = Loop(kind)
    loop.scaler.unscale_(loop.optimizer)
    loop.param.grad[1] = value  # type: ignore[index]
    go(loop.scaler, loop.optimizer)
    assert loop.values == [1.0] * 3 + [4.0]


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("stepped", [False, True])
def test_a_nan_that_the_user_mended_after_unscale_counts_as_torchs_does(
    kind: type[torch.optim.Optimizer], stepped: bool
) -> None:
    """Its step is skipped, and it lowers the scale whether there was a step or not."""
    for scaler in both(init_scale=8.0):
        loop = Loop(kind)
        loop.set(NAN)
        scaler.scale(loop.param)
        scaler.unscale_(loop.optimizer)
        loop.set(1.0)
        if stepped:
            scaler.step(loop.optimizer)
        scaler.update()
        assert loop.param.tolist() == [1.0] * 3 and scaler.get_scale() == 4.0
        go(scaler, loop.optimizer)
        assert loop.param.tolist() == [0.75] * 3


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("unscale", [False, True])
def test_parameters_without_gradients_are_left_alone(kind: type[torch.optim.Optimizer], unscale: bool) -> None:
    for some in (True, False):
        params = [Parameter(torch.ones(2)) for _ in range(4)]
        optimizer = kind([{"params": params[:2]}, {"params": params[2:]}], lr=1.0, momentum=0.9)
        scaler = LossScaler(init_scale=8.0, growth_interval=1)
        if some:
            params[1].grad = torch.full((2,), 8.0)
        go(scaler, optimizer, unscale=unscale)
        assert [p.tolist() for p in params] == [[1.0] * 2, [0.0 if some else 1.0] * 2, [1.0] * 2, [1.0] * 2]
        assert scaler.get_scale() == 16.0
        assert all(optimizer.state.get(p, {}).get("momentum_buffer") is None for p in (params[0], *params[2:]))


def test_a_disabled_scaler_passes_everything_through() -> None:
    loop = Loop(enabled=False)
    scaler, loss = loop.scaler, torch.ones(2)
    assert not scaler.is_enabled() and scaler.get_scale() == 1.0
    assert scaler.scale(loss) is loss and scaler.scale("whatever") == "whatever"  # type: ignore[type-var]
    scaler.unscale_(loop.optimizer)
    scaler.unscale_(loop.optimizer)
    assert loop.param.grad is not None and loop.param.grad.tolist() == [8.0] * 3
    assert scaler.step(loop.optimizer, lambda: 5.0) == 5.0
    assert scaler.step(loop.optimizer, closure=lambda: 6.0) == 6.0
    assert loop.param.tolist() == [-15.0] * 3
    loop.set(INF)
    scaler.step(loop.optimizer)
    assert loop.param.tolist() == [-INF] * 3
    scaler.update(3.0)
    scaler.load_state_dict(LossScaler().state_dict())
    scaler.load_state_dict({})
    assert scaler.state_dict() == {} and scaler.get_scale() == 1.0


@pytest.mark.parametrize("kind", SGDS)
def test_closures_are_refused_before_anything_happens(kind: type[torch.optim.Optimizer]) -> None:
    loop, closure = Loop(kind), lambda: pytest.fail("called")
    for arguments, named in (((closure,), {}), ((), {"closure": closure})):
        with pytest.raises(RuntimeError, match="closure"):
            loop.scaler.step(loop.optimizer, *arguments, **named)
        assert loop.values == [1.0] * 3 + [8.0]
    go(loop.scaler, loop.optimizer)
    assert loop.values == [0.0] * 3 + [16.0]


def test_arguments_of_step_are_never_dropped() -> None:
    """GradScaler forwards them, and SGD knows none of this name."""
    with pytest.raises((TypeError, ValueError, RuntimeError), match="times"):
        Loop().scaler.step(Loop().optimizer, times=2)


@pytest.mark.parametrize("kind", SGDS)
def test_hooks_and_schedules_see_the_steps_that_were_applied(kind: type[torch.optim.Optimizer]) -> None:
    loop, calls = Loop(kind), []
    loop.optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    loop.optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    schedule = torch.optim.lr_scheduler.StepLR(loop.optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(loop.scaler, loop.optimizer)
        schedule.step()
    assert calls == ["pre", "post"] and loop.values == [0.0] * 3 + [16.0]


# ---- gradients of every kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SGDS)
@pytest.mark.parametrize("unscale", [False, True])
def test_fp16_gradients_may_be_unscaled(kind: type[torch.optim.Optimizer], unscale: bool) -> None:
    for last, expected in ((128.0, [0.5, 0.0, -1.0]), (INF, [1.0] * 3), (NAN, [1.0] * 3)):
        p = Parameter(torch.ones(3, dtype=torch.float16))
        optimizer, scaler = kind([p], lr=1.0), LossScaler(init_scale=64.0)  # type: ignore[call-arg]
        p.grad = torch.tensor([32.0, 64.0, last], dtype=torch.float16)
        go(scaler, optimizer, unscale=unscale)
        assert p.tolist() == expected and scaler.get_scale() == (64.0 if last == 128.0 else 32.0)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sparse_gradients_with_repeated_rows(dtype: torch.dtype, unscale: bool) -> None:
    """Rows that overflow fp16 only when they are added are found too."""
    rows, large = torch.tensor([[0, 0]]), ([40000.0, 40000.0] if dtype == torch.float16 else [INF, -INF])
    for values, expected in (([8.0, 8.0], [-1.0, 1.0]), ([8.0, INF], [1.0, 1.0]), (large, [1.0, 1.0])):
        p, added = Parameter(torch.ones(2, 1, dtype=dtype)), torch.tensor(values, dtype=dtype).view(2, 1)
        p.grad = torch.sparse_coo_tensor(rows, added, (2, 1), check_invariants=True)
        optimizer = torch.optim.SGD([p], lr=1.0)
        go(LossScaler(init_scale=8.0), optimizer, unscale=unscale)
        assert p.flatten().tolist() == expected


@pytest.mark.parametrize("unscale", [False, True])
def test_complex_gradients_step_whether_or_not_they_can_be_unscaled_first(unscale: bool) -> None:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=torch.complex64))]
    optimizer, scaler = torch.optim.SGD(params, lr=1.0), LossScaler(init_scale=8.0)
    params[0].grad, params[1].grad = torch.full((2,), 8.0), torch.full((2,), 8.0 + 16.0j)
    if unscale:
        try:
            scaler.unscale_(optimizer)
        except (RuntimeError, NotImplementedError):
            assert scaler.state_dict()["scale"] == 8.0  # what was refused has opened no step
    scaler.step(optimizer)
    assert params[0].tolist() == [0.0, 0.0] and params[1].tolist() == [-2.0j, -2.0j]


@pytest.mark.parametrize("kind", SGDS)
def test_large_fp64_gradients_are_no_overflow(kind: type[torch.optim.Optimizer]) -> None:
    p = Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e300)
    LossScaler(init_scale=4.0).step(kind([p], lr=1.0))  # type: ignore[call-arg]
    assert p.tolist() == [-2.5e299] * 2


# ---- a skip leaves nothing behind ------------------------------------------------------------------------------------

PATHS = [pytest.param(None, id="kernels"), pytest.param(False, id="torch path")]
MATRIX = list(itertools.product((False, True), (INF, -INF, NAN, 8.0), (0.0, 1.0, 2.0)))


def check_skips(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    """Whatever its stage, gradient and the other devices' flag: a step is the plain one, or has not been."""
    params, twins = make_params(torch.float32, [(7,), (2, 3), ()]), make_params(torch.float32, [(7,), (2, 3), ()])
    a, b, scaler = make(params), make(twins), LossScaler("static", init_scale=8.0)
    for step, (unscale, value, found_inf) in enumerate(MATRIX):
        for p, q, g in zip(params, twins, gradients(params, step), strict=True):
            p.grad, q.grad = g * 8.0, g
        params[1].grad[1, 2] = value  # type: ignore[index]
        twins[1].grad[1, 2] = 1.0  # type: ignore[index]
        before = everything(a)
        if unscale:
            scaler.unscale_(a)
        stage = scaler.stage(a)
        stage.found_inf = torch.tensor(found_inf) + (0.0 if stage.found_inf is None else stage.found_inf)
        scaler.step(a)
        scaler.update()
        if math.isfinite(value) and not found_inf:
            b.step()
            assert same(everything(a), everything(b))
        else:
            assert same(everything(a), before)


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_step_is_whole_or_nothing(name: str, options: dict[str, Any], fused: bool | None) -> None:
    check_skips(lambda params: ours(name, params, fused=fused, **options))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_torchs_optimizers_is_whole_or_nothing(kind: type[torch.optim.Optimizer], options: Any) -> None:
    check_skips(lambda params: kind(params, lr=0.01, **options))  # type: ignore[call-arg]


# ---- scales near zero ------------------------------------------------------------------------------------------------

ADAMS = [torch.optim.SGD, torch.optim.AdamW, pytrain.optim.SGD, pytrain.optim.AdamW]


@pytest.mark.parametrize("kind", ADAMS, ids=lambda kind: f"{kind.__module__.split('.')[0]}.{kind.__name__}")
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("exponent", [-128, -130, -149, None])
def test_a_scale_near_or_at_zero_makes_nothing_nan(
    kind: type[torch.optim.Optimizer], unscale: bool, exponent: int | None
) -> None:
    """What has no finite inverse in the gradients' dtype skips the step, or is unscaled without it."""
    scale = 0.0 if exponent is None else 2.0**exponent
    for unscaled in (0.0, 0.5):
        p = Parameter(torch.ones(2))
        optimizer, scaler = kind([p], lr=0.5), LossScaler()  # type: ignore[call-arg]
        scaler.load_state_dict(LossScaler().state_dict() | {"scale": scale})
        p.grad = torch.full((2,), unscaled) * scale
        before = everything(optimizer)
        go(scaler, optimizer, unscale=unscale)
        if exponent is None:
            assert same(everything(optimizer), before) and scaler.get_scale() == 0.0
        assert all(x.isfinite().all() for x in everything(optimizer))


def test_torchs_policy_halves_down_to_zero_as_torch_does() -> None:
    loop, torchs = Loop(max_skipped_in_a_row=1000), torch.amp.GradScaler("cpu", init_scale=8.0)
    torchs.scale(loop.param)
    for _ in range(160):
        loop.set(INF)
        for scaler in (loop.scaler, torchs):
            go(scaler, loop.optimizer)
        assert loop.scaler.get_scale() == torchs.get_scale()
    assert loop.values == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", ADAMS, ids=lambda kind: f"{kind.__module__.split('.')[0]}.{kind.__name__}")
@pytest.mark.parametrize("unscale", [False, True])
def test_fp16_gradients_that_overflow_by_unscaling_make_no_inf(
    kind: type[torch.optim.Optimizer], unscale: bool
) -> None:
    p = Parameter(torch.ones(2, dtype=torch.float16))
    optimizer, scaler = kind([p], lr=2.0**-8), LossScaler(init_scale=0.0625)  # type: ignore[call-arg]
    p.grad = torch.full((2,), 30000.0, dtype=torch.float16)
    go(scaler, optimizer, unscale=unscale)
    assert p.isfinite().all()
