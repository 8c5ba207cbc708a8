"""The watch over an optimizer's objects sees every exchange of one, and nothing else counts as one."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytrain import backend

pytestmark = pytest.mark.skipif(backend.facts is None, reason="without the kernels there is nothing to watch for")

SAME, HYPERS, OBJECTS = range(3)
Groups, States = list[dict[str, Any]], dict[Any, Any]


class Watch:
    """What `backend.facts` has for it."""

    def __init__(self, groups: Groups, state: States) -> None:
        self.watch = backend.facts.watch(groups, state)

    def check(self, groups: Groups, state: States) -> int:
        """SAME, HYPERS or OBJECTS."""
        found: int = backend.facts.check(self.watch, groups, state)
        return found


def watched(n: int = 3) -> tuple[Groups, States, Any]:
    """Groups and states as torch's optimizers have them, and a watch over them."""
    params = [torch.zeros(1) for _ in range(n)]
    groups = [{"params": params, "lr": 0.1, "betas": (0.9, 0.99)}]
    state: States = defaultdict(dict)
    for param in params:
        state[param].update(step=torch.zeros(()), exp_avg=torch.zeros(1))
    return groups, state, Watch(groups, state)


def set_inner(groups: Groups, state: States) -> None:
    state[groups[0]["params"][-1]]["exp_avg"] = torch.zeros(1)


def add_inner(groups: Groups, state: States) -> None:
    state[groups[0]["params"][-1]]["more"] = torch.zeros(1)


def drop_inner(groups: Groups, state: States) -> None:
    del state[groups[0]["params"][-1]]["step"]


def clear_inner(groups: Groups, state: States) -> None:
    state[groups[0]["params"][0]].clear()


def set_outer(groups: Groups, state: States) -> None:
    param = groups[0]["params"][0]
    state[param] = dict(state[param])


def add_outer(groups: Groups, state: States) -> None:
    state[torch.zeros(1)] = {}


def pop_outer(groups: Groups, state: States) -> None:
    state.pop(groups[0]["params"][1])


def set_param(groups: Groups, state: States) -> None:
    groups[0]["params"][1] = torch.zeros(1)


def add_group(groups: Groups, state: States) -> None:
    groups.append({"params": [], "lr": 0.1})


CHANGES = [set_inner, add_inner, drop_inner, clear_inner, set_outer, add_outer, pop_outer, set_param, add_group]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("checks", [0, 1, 3])
def test_an_exchanged_object_is_seen(change: Callable[[Groups, States], None], checks: int) -> None:
    groups, state, watch = watched()
    for _ in range(checks):
        assert watch.check(groups, state) == SAME
    change(groups, state)
    assert watch.check(groups, state) == OBJECTS
    assert watch.check(groups, state) == OBJECTS  # until somebody makes another watch
    assert Watch(groups, state).check(groups, state) == SAME


def test_another_dict_with_the_same_states_is_as_good() -> None:
    groups, state, watch = watched()
    assert watch.check(groups, state) == SAME
    for _ in range(20):  # often where the one before was
        state = defaultdict(dict, state)
        assert watch.check(groups, state) == SAME
    param = groups[0]["params"][0]
    for _ in range(20):
        other = defaultdict(dict, state)
        other[param] = dict(other[param])
        assert Watch(groups, state).check(groups, other) == OBJECTS


def test_what_is_put_back_counts_as_the_same() -> None:
    groups, state, watch = watched()
    inner = state[groups[0]["params"][0]]
    kept = inner["exp_avg"]
    inner["exp_avg"] = torch.ones(1)
    inner["exp_avg"] = kept
    kept.add_(1.0)
    assert [watch.check(groups, state) for _ in range(2)] == [SAME, SAME]
    inner["exp_avg"] = torch.ones(1)
    assert watch.check(groups, state) == OBJECTS


def test_hyperparameters_are_told_from_objects() -> None:
    groups, state, watch = watched()
    groups[0]["lr"] = 0.2
    assert [watch.check(groups, state) for _ in range(2)] == [HYPERS, SAME]
    groups[0]["lr"] = torch.tensor(0.1)  # which may change in place
    assert [watch.check(groups, state) for _ in range(2)] == [HYPERS, HYPERS]
    set_inner(groups, state)
    assert watch.check(groups, state) == OBJECTS


def test_attributes_of_an_object_may_be_the_states() -> None:
    """CPython 3.13 tells no watcher of their changes."""

    class States:
        pass

    groups, state, _ = watched()
    states, param = States(), groups[0]["params"][0]
    states.exp_avg = torch.zeros(1)  # type: ignore[attr-defined]
    state[param] = vars(states)
    watch = Watch(groups, state)
    assert [watch.check(groups, state) for _ in range(2)] == [SAME, SAME]
    states.exp_avg = torch.zeros(1)  # type: ignore[attr-defined]
    assert watch.check(groups, state) == OBJECTS


def test_after_an_exchange_a_watch_is_of_no_more_use() -> None:
    groups, state, watch = watched()
    groups[0]["extra"] = state  # which takes a remembered object's place
    assert watch.check(groups, {}) == OBJECTS
    del groups[0]["extra"]
    assert watch.check(groups, state) == OBJECTS


def test_a_watch_keeps_no_cycle_alive() -> None:
    class State(defaultdict):  # type: ignore[type-arg]
        pass

    groups, _, _ = watched()
    state = State(dict)
    state[groups[0]["params"][0]]["exp_avg"] = torch.zeros(1)
    state.watch = Watch(groups, state)  # type: ignore[attr-defined]
    gone = weakref.ref(state)
    del state
    gc.collect()
    assert gone() is None


def test_other_arguments_are_refused() -> None:
    groups, state, watch = watched()
    facts = backend.facts
    for wrong in ((tuple(groups), state), (groups, list(state))):
        with pytest.raises(TypeError, match="expected a"):
            facts.watch(*wrong)
        with pytest.raises(TypeError, match="expected a"):
            facts.check(watch.watch, *wrong)
    with pytest.raises(TypeError, match="expected 3 arguments, got 2"):
        facts.check(groups, state)
    with pytest.raises(ValueError, match="PyCapsule"):
        facts.check(groups, groups, state)


@pytest.mark.parametrize("states", [True, False])
def test_a_hyperparameter_more_or_less_takes_the_place_of_no_other_object(states: bool) -> None:
    groups, state, watch = watched()
    if not states:
        state.clear()
        watch = Watch(groups, state)
    groups[0]["more"] = 1.0
    assert watch.check(groups, state) == OBJECTS
    watch = Watch(groups, state)
    del groups[0]["more"]
    assert watch.check(groups, state) == OBJECTS


def test_two_watches_over_the_same_states_both_see_a_change() -> None:
    groups, state, first = watched()
    second = Watch(groups, state)
    set_inner(groups, state)
    assert [watch.check(groups, state) for watch in (first, second)] == [OBJECTS, OBJECTS]


def test_states_that_go_with_their_watch_trouble_no_other() -> None:
    groups, state, watch = watched()
    watched()
    gc.collect()
    assert watch.check(groups, state) == SAME


def test_states_that_are_no_dicts_are_compared_as_they_are() -> None:
    groups, state, _ = watched()
    state["notes"] = ["anything"]
    watch = Watch(groups, state)
    assert watch.check(groups, state) == SAME
    state["notes"] = ["anything"]
    assert watch.check(groups, state) == OBJECTS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["step", "exp_avg", "more"]), st.integers(0, 3))))
def test_any_sequence_of_changes_is_seen_as_a_comparison_of_all_objects_sees_it(
    changes: list[tuple[int, str, int]],
) -> None:
    groups, state, watch = watched()
    pool = [torch.zeros(1) for _ in range(3)]

    def all_objects() -> list[Any]:
        return [one for param, inner in state.items() for one in (param, inner, *inner.keys(), *inner.values())]

    before = all_objects()
    for which, key, what in changes:
        inner = state[groups[0]["params"][which]]
        if what < 3:
            inner[key] = pool[what]
        else:
            inner.pop(key, None)
        now = all_objects()
        same = len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
        assert watch.check(groups, state) == (SAME if same else OBJECTS)
        if not same:
            before, watch = now, Watch(groups, state)
