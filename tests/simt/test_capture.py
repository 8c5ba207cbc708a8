"""Steps that a graph has captured, shown on the CPU: launches of a capture are recorded with their arguments, and run
when it is replayed. This file runs itself where the host sees no control block."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from test_remote import KERNELS, NoReads, everything, here, problem, run_remote
from torch import Tensor
from torch.nn import Parameter

import pytrain
from pytrain import amp, backend, control
from pytrain.optim import REGISTRY, AdamW, FusedOptimizer

CASES: list[tuple[str, dict[str, Any], int]] = [(name, {}, 1) for name in KERNELS]
CASES += [("adamw", {}, 5), ("lamb", {}, 5), ("adamw", {"state_dtype": "8bit"}, 1), ("adamw", {"ema_decay": 0.9}, 1)]


def test_in_a_process_of_its_own() -> None:
    """All others of this file."""
    run_remote(__file__)


def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(backend._FOLDER / "_kernels_simt.so"))
    for name in (found.pytrain_simt_capture, found.pytrain_simt_replay):
        name.argtypes = [ctypes.c_ulonglong]
    found.pytrain_simt_launches.restype = found.pytrain_simt_replay.restype = ctypes.c_longlong
    found.pytrain_simt_fail.argtypes = [ctypes.c_longlong]
    return found


@contextmanager
def capture(graph: int) -> Iterator[None]:
    library().pytrain_simt_capture(graph)
    try:
        yield
    finally:
        library().pytrain_simt_capture(0)


def replay(graph: int) -> int:
    """How many launches that were."""
    return int(library().pytrain_simt_replay(graph))


NUMBERS = count(1)


@pytest.fixture
def graphs() -> list[int]:
    """Two new graphs."""
    return [next(NUMBERS), next(NUMBERS)]


def bits(optimizer: FusedOptimizer) -> list[Tensor]:
    return [x.clone() for x in everything(optimizer)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Run:
    """An optimizer, and gradients in several places."""

    def __init__(self, name: str, options: dict[str, Any], groups: int = 1) -> None:
        self.params = [*problem(), Parameter(torch.ones(140_000 if groups > 1 else 5000))]
        split = [{"params": self.params[i::groups]} for i in range(groups)]
        self.optimizer = REGISTRY[name](split, lr=0.01, **options)  # type: ignore[call-arg, arg-type]
        self.places = [[torch.empty_like(p) for p in self.params] for _ in range(3)]

    def fill(self, place: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for g in self.places[place]:
            g.copy_(torch.randn(g.shape, generator=generator))

    def use(self, place: int, which: slice = slice(None)) -> None:
        for p in self.params:
            p.grad = None
        for p, g in zip(self.params[which], self.places[place][which], strict=True):
            p.grad = g

    def step(self, place: int, seed: int, which: slice = slice(None)) -> None:
        self.fill(place, seed)
        self.use(place, which)
        self.optimizer.step()


@here
@pytest.mark.parametrize(("name", "options", "groups"), CASES, ids=str)
def test_a_graph_keeps_its_table_whatever_steps_do_between(
    name: str, options: dict[str, Any], groups: int, graphs: list[int]
) -> None:
    ours, eager = Run(name, options, groups), Run(name, options, groups)
    for run in (ours, eager):
        run.step(0, 0)
    before = bits(ours.optimizer)
    for graph, place in zip(graphs, (1, 2), strict=True):
        ours.use(place)
        with capture(graph):
            ours.optimizer.step()
    assert same(bits(ours.optimizer), before)
    # A step where a graph's gradients lie, then replays and steps in turn: (None or a graph, gradients, seed).
    for graph, place, seed in [(None, 1, 1), (0, 1, 2), (None, 0, 3), (1, 2, 4), (0, 1, 5), (0, 1, 6), (None, 2, 7)]:
        eager.step(place, seed)
        if graph is None:
            ours.step(place, seed)
        else:
            ours.fill(place, seed)
            assert replay(graphs[graph]) >= 2
        assert same(bits(ours.optimizer), bits(eager.optimizer)), (graph, place, seed)


@here
def test_a_graph_keeps_its_table_when_steps_take_another_size_or_cut(graphs: list[int]) -> None:
    ours, eager = Run("adamw", {}), Run("adamw", {})
    some, others = slice(0, 2), slice(1, 4)
    for run in (ours, eager):
        run.step(0, 0)
        run.step(0, 1, some)
    ours.use(1, others)
    with capture(graphs[0]):
        ours.optimizer.step()
    for seed, which in enumerate((others, some, slice(None), others), 2):
        ours.step(0, seed, which)
        eager.step(0, seed, which)
        ours.fill(1, 10 + seed)
        replay(graphs[0])
        eager.step(1, 10 + seed, others)
        assert same(bits(ours.optimizer), bits(eager.optimizer)), which


@here
def test_a_cut_that_only_a_graph_has_does_not_count_as_written(graphs: list[int]) -> None:
    """Two lists of parameters whose tables have the same size, but other chunks."""
    results = []
    for captures in (False, True):
        params = [Parameter(torch.ones(n)) for n in (5000, 300, 5000)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = AdamW(params)
        optimizer.step()
        params[2].grad = None
        optimizer.step()
        params[0].grad, params[2].grad = None, torch.ones_like(params[2])
        if captures:
            with capture(graphs[0]):
                optimizer.step()
        optimizer.step()
        assert all((p == p[0]).all() for p in params)
        results.append(bits(optimizer))
    assert same(*results)


@here
@pytest.mark.parametrize(("options", "passes"), [({}, 1), ({"state_dtype": "8bit"}, 2)])
def test_a_graph_writes_its_table_once_and_steps_between_write_none(
    options: dict[str, Any], passes: int, graphs: list[int]
) -> None:
    params = [Parameter(torch.ones(5000))]
    params[0].grad = torch.ones(5000)
    optimizer = AdamW(params, **options)
    for _ in range(2):
        optimizer.step()
    with capture(graphs[0]):
        for _ in range(3):
            optimizer.step()
    assert replay(graphs[0]) == 1 + 3 * passes
    before = library().pytrain_simt_launches()
    optimizer.step()
    assert library().pytrain_simt_launches() - before == passes


@here
def test_numbers_of_many_param_groups_are_a_graph_s_own(graphs: list[int]) -> None:
    """They lie in the control block, which steps between replays write too."""
    results = []
    for captures in (False, True):
        params = [Parameter(torch.ones(3)) for _ in range(40)]
        for p in params:
            p.grad = torch.ones(3)
        optimizer = REGISTRY["sgd"]([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(params)])  # type: ignore
        optimizer.step()
        if captures:
            with capture(graphs[0]):
                optimizer.step()
        for lr in (0.5, 0.25):
            kept = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            for group, before in zip(optimizer.param_groups, kept, strict=True):
                group["lr"] = before
            if captures:
                replay(graphs[0])
            else:
                optimizer.step()
        results.append(bits(optimizer))
    assert same(*results)


@here
@pytest.mark.parametrize("launch", [0, 1])
def test_an_upload_that_failed_is_made_again(launch: int) -> None:
    params, twins = ([Parameter(torch.ones(3)) for _ in range(40)] for _ in range(2))
    ours, theirs = AdamW(params), AdamW(twins)
    kept = []  # so that the second gradients lie elsewhere
    for value in (1.0, -2.0):
        for p in params + twins:
            kept.append(p.grad)
            p.grad = torch.full_like(p, value)
        theirs.step()
        library().pytrain_simt_fail(launch)
        with pytest.raises(RuntimeError, match="simt was told"):
            ours.step()
        ours.step()
        assert same(bits(ours), bits(theirs))


@here
def test_a_capture_before_the_first_step_says_what_to_do(graphs: list[int]) -> None:
    params = problem()
    optimizer = AdamW(params)
    with capture(graphs[0]), pytest.raises(RuntimeError, match="AdamW: a graph is being captured .* step once before"):
        optimizer.step()
    assert not optimizer.state and replay(graphs[0]) == 0
    optimizer.step()
    late = Parameter(torch.ones(3))
    late.grad = torch.ones(3)
    optimizer.add_param_group({"params": [late]})
    with capture(graphs[0]), pytest.raises(RuntimeError, match="step once before the capture"):
        pytrain.step(optimizer)
    assert late not in optimizer.state and late.tolist() == [1.0] * 3


@here
def test_what_a_graph_uses_stays_as_long_as_its_optimizer(graphs: list[int]) -> None:
    ours, eager = Run("adamw", {}), Run("adamw", {})
    for run in (ours, eager):
        run.step(0, 0)
    ours.use(1)
    with capture(graphs[0]):
        ours.optimizer.step()
    settled = ours.optimizer._settled
    assert settled is not None
    (table,), block = [plan.table for plan in settled.plans], weakref.ref(settled.control)
    del settled
    for run in (ours, eager):  # other tables from here on
        run.optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
        run.step(0, 1)
    gc.collect()
    assert block() is not None and torch.ops.pytrain._table_captured(table)
    ours.fill(1, 2)
    replay(graphs[0])
    eager.step(1, 2)
    assert same(bits(ours.optimizer), bits(eager.optimizer))
    del ours
    gc.collect()
    assert block() is None
    with pytest.raises(RuntimeError, match="there is no table"):
        torch.ops.pytrain._table_captured(table)


@here
def test_tables_without_a_graph_go_with_what_they_were_made_of() -> None:
    run = Run("adamw", {})
    run.step(0, 0)
    assert run.optimizer._settled is not None
    table = run.optimizer._settled.plans[0].table
    run.optimizer._settled = None
    gc.collect()
    with pytest.raises(RuntimeError, match="there is no table"):
        torch.ops.pytrain._table_captured(table)


@here
def test_a_scale_of_no_scaler_that_only_a_graph_writes_is_not_kept(
    graphs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_ones", {})
    device = torch.device("cpu")
    with capture(graphs[0]):
        control._on(control.ONE, device)
    assert not control._ones
    assert control._on(control.ONE, device) is control._on(control.ONE, device)


@here
def test_a_captured_step_never_looks_at_the_scale(graphs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amp, "READ_EVERY", 1)
    params = problem()
    optimizer, scaler = AdamW(params), amp.LossScaler(init_scale=4.0)
    pytrain.step(optimizer, scaler, max_norm=1.0)
    with capture(graphs[0]), NoReads() as seen:
        pytrain.step(optimizer, scaler, max_norm=1.0)
    assert seen.reads == []
    with NoReads() as seen:
        pytrain.step(optimizer, scaler, max_norm=1.0)
    assert seen.reads != []
