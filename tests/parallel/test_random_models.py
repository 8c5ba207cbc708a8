"""Random models under every strategy: the same as one process on the joined batch, to the bit where sums are exact."""

from __future__ import annotations

from typing import Any

import pytest
import random_jobs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_cases import LAYOUTS, VARIANTS, same_bits
from pool import Pool
from random_jobs import Case, Tensors

from pytrain.optim import REGISTRY

SETTINGS = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
ANY = [(name, options) for name in VARIANTS for options in VARIANTS[name]]
ELEMENTWISE = [(name, options) for name, options in ANY if not any(rule.sums for rule in REGISTRY[name].rules)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
shapes = st.one_of(
    st.sampled_from([(), (1,), (0,), (3, 0), (4, 3, 2, 2), (700,), (33, 31)]),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
)


@st.composite
def tensors(draw: Any, exact: bool, groups: int) -> Tensors:
    shape = draw(shapes)
    fitting = [
        name
        for name in LAYOUTS
        if len(shape) >= {"channels_last": 4, "transposed": 2, "rows_apart": 2}.get(name, 0)
        and (name != "channels_last" or len(shape) == 4)
    ]
    return Tensors(
        shape,
        draw(st.sampled_from(fitting)),
        draw(st.sampled_from(DTYPES)) if exact else torch.float64,
        draw(st.integers(0, groups - 1)),
        draw(st.sampled_from([False, False, False, True])),
        draw(st.sampled_from([False, False, True])),
    )


@st.composite
def cases(draw: Any) -> Case:
    exact, size = draw(st.booleans()), draw(st.sampled_from([2, 3]))
    params = tuple(draw(st.lists(tensors(exact, draw(st.integers(1, 3))), min_size=1, max_size=9)))
    if all(one.frozen for one in params):
        params = (*params, Tensors((5,)))
    strategy = draw(st.sampled_from(["DDP", "Zero1", "Zero2"]))
    name, options = draw(st.sampled_from(ANY if strategy == "DDP" else ELEMENTWISE))
    if exact and draw(st.booleans()):
        options = {**options, "master_weights": True}
    micros = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size).filter(any))
    unused, used = draw(st.sampled_from(["error", "zero", "agree"])), None
    if unused != "error":
        used = tuple(tuple(draw(st.booleans()) for _ in params) for _ in range(size))
    caps = (draw(st.sampled_from([1e-6, 1e-3, 0.01, float("inf")])), draw(st.sampled_from([1e-6, 1e-3, 1.0])))
    max_norm = draw(st.sampled_from([None, 0.01, 1.0]))
    seed = draw(st.integers(0, 99))
    return Case(params, exact, name, options, strategy, tuple(micros), caps, max_norm, unused, used, seed)


def check(pool: Pool, case: Case) -> None:
    """All ranks have what one process has."""
    params, norms, state = random_jobs.train_alone(case)
    for their_params, their_norms, their_state in pool.run(len(case.micros), random_jobs.train, case):
        assert [sorted(one) for one in their_state.values()] == [sorted(one) for one in state.values()]
        values = [*params, *(state[i][key] for i in state for key in state[i])]
        theirs = [*their_params, *(their_state[i][key] for i in state for key in state[i])]
        assert [(v.dtype, v.shape) for v in theirs] == [(v.dtype, v.shape) for v in values]
        if case.exact:
            assert same_bits(theirs, values) and their_norms == norms
        for a, b in zip(theirs, values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0.0)
        assert their_norms == pytest.approx(norms, rel=1e-12)


@settings(SETTINGS, max_examples=25)
@given(case=cases())
def test_a_random_model_is_trained_as_in_one_process(pool: Pool, case: Case) -> None:
    check(pool, case)


@pytest.mark.slow
@settings(SETTINGS, max_examples=400)
@given(case=cases())
def test_many_random_models_are_trained_as_in_one_process(pool: Pool, case: Case) -> None:
    check(pool, case)
