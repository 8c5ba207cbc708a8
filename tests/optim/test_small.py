"""Many small tensors: pass 1 begins while their gradients are still being read, and nothing else may change by that."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import threads
from step_cases import INF, NAN, copies, everything
from torch import Tensor, nn

import pytrain
from pytrain import backend
from pytrain.amp import LossScaler
from pytrain.ema import EMA
from pytrain.optim import SGD, AdamW, base, plan

pytestmark = pytest.mark.skipif(
    backend.facts is None or backend.simulated, reason="what only the kernels on the CPU do, called past the dispatcher"
)
MANY = 300


def model(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    generator = torch.Generator().manual_seed(0)
    params = nn.ParameterList([nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes])
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    return params


def steps(
    monkeypatch: pytest.MonkeyPatch,
    shapes: list[tuple[int, ...]],
    missing: set[int],
    bad: dict[int, float],
    *,
    op: bool,
) -> tuple[list[Tensor], list[list[Any]]]:
    """What three steps leave and tell; the second meets missing and bad gradients. `op`: by torch's dispatcher."""
    monkeypatch.setattr(backend, "is_profiling", lambda: op)
    params = model(shapes)
    optimizer, scaler, ema = AdamW(params, lr=0.1), LossScaler(init_scale=4.0, growth_interval=2), EMA(params, 0.5)
    told = []
    for number in range(3):
        kept: list[Tensor | None] = [p.grad for p in params]
        if number == 1:
            for i in missing:
                params[i].grad = None
            for i, value in bad.items():
                if i not in missing and params[i].numel():
                    params[i].grad = params[i].grad.clone()  # type: ignore[union-attr]
                    params[i].grad.view(-1)[-1] = value  # type: ignore[union-attr]
        info = pytrain.step(optimizer, scaler, max_norm=0.7, ema=ema)
        told.append([info.applied.item(), repr(info.grad_norm.item()), info.first_bad.item(), scaler.get_scale()])
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
    return [*everything(optimizer), *ema.averages.values()], told


sizes = st.sampled_from([0, 1, 3, 15, 16, 17, 255, 1000, 4095, 4096, 4097])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_the_same_bits_and_facts_as_by_the_ops(data: st.DataObject) -> None:
    few = data.draw(st.lists(sizes, min_size=1, max_size=20))
    shapes = [(n,) for n in few * data.draw(st.sampled_from([1, 4, 20]))]
    if data.draw(st.booleans()):
        shapes.insert(data.draw(st.integers(0, len(shapes))), (300_000,))
    places = st.integers(0, len(shapes) - 1)
    missing = data.draw(st.sets(places, max_size=3)) if len(shapes) > 3 else set()
    bad = data.draw(st.dictionaries(places, st.sampled_from([INF, -INF, NAN]), max_size=2))
    with pytest.MonkeyPatch.context() as patch, threads(data.draw(st.sampled_from([1, 2, 3, 8]))):
        mine, told = steps(patch, shapes, missing, bad, op=False)
    with pytest.MonkeyPatch.context() as patch, threads(1):
        theirs, told_theirs = steps(patch, shapes, missing, bad, op=True)
    assert told == told_theirs
    assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("place", [0, 63, 64, MANY - 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_gradient_that_needs_a_copy_is_found_wherever_it_stands(place: int, count: int) -> None:
    def left(odd: bool) -> list[Tensor]:
        params = model([(4, 6)] * MANY)
        optimizer = AdamW(params, lr=0.1)
        pytrain.step(optimizer, max_norm=1.0)
        if odd:
            grad = params[place].grad
            assert grad is not None
            params[place].grad = grad.t().contiguous().t()
        pytrain.step(optimizer, max_norm=1.0)
        return everything(optimizer)

    with threads(count):
        assert all(a.equal(b) for a, b in zip(left(True), left(False), strict=True))


@pytest.mark.parametrize("place", [0, 100, MANY - 1])
def test_a_state_of_another_shape_is_named_and_nothing_is_written(place: int) -> None:
    params = model([(5,)] * MANY)
    optimizer = AdamW(params)
    pytrain.step(optimizer, max_norm=1.0)
    whole = optimizer.state[params[place]]["exp_avg"].data
    optimizer.state[params[place]]["exp_avg"].data = torch.zeros(4)
    before = copies(everything(optimizer))
    with pytest.raises(ValueError, match=rf"\['params'\]\[{place}\]"):
        pytrain.step(optimizer, max_norm=1.0)
    assert all(a.equal(b) for a, b in zip(before, everything(optimizer), strict=True))
    optimizer.state[params[place]]["exp_avg"].data = whole
    assert pytrain.step(optimizer, max_norm=1.0).applied


def test_memory_that_was_swapped_under_a_state_is_followed() -> None:
    params = model([(5,)] * MANY)
    optimizer = SGD(params, lr=0.0, momentum=0.9)
    pytrain.step(optimizer, max_norm=1.0)
    old = optimizer.state[params[7]]["momentum_buffer"].data
    kept, new = old.clone(), torch.zeros(5)
    optimizer.state[params[7]]["momentum_buffer"].data = new
    pytrain.step(optimizer, max_norm=1.0)
    assert old.equal(kept) and new.any()


@pytest.mark.parametrize("count", [1, MANY])
def test_autograd_hears_of_every_applied_step_once_and_of_no_skipped_one(count: int) -> None:
    params = model([(256,)] * count)
    optimizer, scaler = AdamW(params), LossScaler(init_scale=1.0)
    pytrain.step(optimizer, scaler, max_norm=1.0)
    before = [p._version for p in params]
    pytrain.step(optimizer, scaler, max_norm=1.0)
    assert [p._version for p in params] == [v + 1 for v in before]
    params[-1].grad[0] = INF  # type: ignore[index]
    pytrain.step(optimizer, scaler, max_norm=1.0)
    assert [p._version for p in params] == [v + 1 for v in before]


def test_a_graph_that_holds_the_scale_is_refused_once_the_scale_has_moved() -> None:
    params = model([(3,)])
    optimizer, scaler = AdamW(params), LossScaler(init_scale=8.0, growth_interval=2)
    loss = scaler.scale(torch.ones((), requires_grad=True) * 2)
    pytrain.step(optimizer, scaler)
    loss.backward(retain_graph=True)  # the scale is what it was
    pytrain.step(optimizer, scaler)
    assert scaler.get_scale() == 16.0
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for a page that must not be read")
@pytest.mark.parametrize("kind", ["expanded", "half"])
def test_nothing_is_read_behind_a_gradient_that_is_smaller_than_its_parameter(kind: str) -> None:
    """In a process of its own, which would be killed."""
    code = f"""
import ctypes, torch, pytrain
libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p] + [ctypes.c_size_t] * 5
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
at = libc.mmap(None, 8192, 3, 0x22, 2**64 - 1, 0)
assert libc.mprotect(at + 4096, 4096, 0) == 0
page = (ctypes.c_char * 4096).from_address(at)
p = torch.nn.Parameter(torch.zeros(64))
optimizer = pytrain.optim.AdamW([p])
if {kind!r} == "half":
    p.grad_dtype = None
    grad = torch.frombuffer(page, dtype=torch.float16)[-64:].fill_(1.0)
else:
    grad = torch.frombuffer(page, dtype=torch.float32)[-1:].fill_(1.0).expand(64)
for p.grad in (torch.ones(64), grad):
    assert pytrain.step(optimizer, max_norm=1.0).grad_norm == 8.0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(8))
def test_the_norm_over_several_dtypes_does_not_hang_on_what_was_before(seed: int) -> None:
    """A resumed optimizer finds the same bits, and so does one whose first table has a gradient missing."""

    def make() -> tuple[list[nn.Parameter], AdamW]:
        params = [p for dtype in (torch.float32, torch.bfloat16, torch.float64) for p in model([(50,)] * 20, dtype)]
        return params, AdamW(params, lr=0.1)

    def give(params: list[nn.Parameter], seed: int, without: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == without else grad

    params, optimizer = make()
    for _ in range(2):
        give(params, seed)
        pytrain.step(optimizer, max_norm=1.0)
    others, resumed = make()
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        torch._foreach_copy_(others, params)
    for without in (3, None, 25):
        give(params, seed + 1, without)
        give(others, seed + 1, without)
        norms = [pytrain.step(o, max_norm=1.0).grad_norm for o in (optimizer, resumed)]
        assert norms[0] == norms[1]
    assert all(a.equal(b) for a, b in zip(everything(optimizer), everything(resumed), strict=True))


def test_a_hook_may_roll_the_optimizer_back_in_a_step() -> None:
    params = model([(16,)] * 3)
    optimizer = AdamW(params)
    pytrain.step(optimizer, max_norm=1.0)
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.register_step_post_hook(lambda o, args, kwargs: o.load_state_dict(good))
    assert pytrain.step(optimizer, max_norm=1.0).applied
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_skipped_first_step_keeps_no_state() -> None:
    params = model([(16,)] * 3)
    optimizer = AdamW(params)
    params[0].grad[0] = NAN  # type: ignore[index]
    made: list[weakref.ref[Any]] = []
    settle = plan.settle

    def watched(optimizer: Any) -> Any:
        settled = settle(optimizer)
        made.append(weakref.ref(settled))
        return settled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "settle", watched)
        info = pytrain.step(optimizer, max_norm=1.0)
    assert not info.applied and not optimizer.state and info.first_bad == 0
    assert len(made) == 1 and made[0]() is None


def test_threads_that_step_their_own_models_at_once_do_not_disturb_each_other() -> None:
    def train(left: list[list[Tensor]]) -> None:
        params = model([(256,)] * MANY)
        optimizer = AdamW(params, lr=0.1)
        for _ in range(20):
            pytrain.step(optimizer, max_norm=0.5)
        left.append(everything(optimizer))

    left: list[list[Tensor]] = []
    train(left)
    workers = [threading.Thread(target=train, args=(left,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(left) == 5
    assert all(a.equal(b) for other in left[1:] for a, b in zip(left[0], other, strict=True))


def test_a_profile_shows_the_steps() -> None:
    params = model([(16,)] * 3)
    optimizer = AdamW(params)
    pytrain.step(optimizer, max_norm=1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        pytrain.step(optimizer, max_norm=1.0)
    assert any(event.key == "pytrain::_table_step_pairs" and event.count == 2 for event in seen.key_averages())
