"""Zero1 and Zero2 on two to four ranks over Gloo: the same as one process with the whole state."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import torch
from jobs import KINDS, NAMES
from pool import Pool

ZEROS = ["Zero1", "Zero2"]
OFFLOADED = ["Zero1, cpu", "Zero2, cpu"]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    keys = [{number: sorted(s) for number, s in one["state"].items()} for one in (a, b)]
    return keys[0] == keys[1] and all(
        torch.equal(value, b["state"][number][name]) and value.dtype == b["state"][number][name].dtype
        for number, state in a["state"].items()
        for name, value in state.items()
    )


@pytest.mark.parametrize("strategy", ZEROS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [{}, {"max_norm": 0.1}, {"clip_value": 0.01}])
def test_ranks_do_what_one_process_does_on_all_data(pool: Pool, strategy: str, size: int, step: dict[str, Any]) -> None:
    alone, seen, scale = jobs.train_alone(size, torch.float64, step)
    found = pool.run(size, jobs.train, torch.float64, {}, step, "AdamW", strategy)
    for params, their_seen, their_scale in found:
        assert equal(params, found[0][0]) and their_scale == scale
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
        for (norm, applied), (expected, _) in zip(their_seen, seen, strict=True):
            assert norm == pytest.approx(expected, rel=1e-12) and applied


@pytest.mark.parametrize(
    ("strategy", "name", "options", "dtype"),
    [(zero, *kind) for zero in ZEROS for kind in KINDS] + [(OFFLOADED[i % 2], *KINDS[i]) for i in (2, 5, 6, 7)],
    ids=[f"{zero}-{name}" for zero in ZEROS for name in NAMES]
    + [f"{OFFLOADED[i % 2]}-{NAMES[i]}" for i in (2, 5, 6, 7)],
)
def test_shards_change_no_bit(
    pool: Pool, strategy: str, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Nor does saving on two ranks and going on on one or two, under any strategy. Four add three times, and round."""
    (params, saved, _, end), *_ = pool.run(1, jobs.alike, "DDP", name, options, dtype)
    found = pool.run(2, jobs.alike, strategy, name, options, dtype)
    for sharded, state, _, last in found:
        assert equal(sharded, params) and same_state(saved, state) and equal(last, end)
    for size, other in ((1, "DDP"), (2, "DDP"), (2, "Zero1"), (1, "Zero2")):
        resumed = pool.run(size, jobs.resume, other, name, options, dtype, params, found[0][1])
        assert all(equal(one, end) for one in resumed)
    resumed = pool.run(4, jobs.resume, strategy, name, options, dtype, params, found[0][1])
    for p, q in zip(resumed[0], end, strict=True):  # in units of a step
        assert equal(resumed[0], resumed[3]) and (p - q).abs().max() < 0.01


@pytest.mark.parametrize("strategy", ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bucket_sizes_change_no_bit_between_two_ranks(pool: Pool, dtype: torch.dtype, strategy: str) -> None:
    """From a bucket a gradient to one for all; and they are the bits of DDP."""
    alike = pool.run(2, jobs.train, dtype, {}, {}, "AdamW", "DDP")[0][0]
    for cap in (1e-6, 1e-3, float("inf")):
        options = {"bucket_cap_mb": cap, "first_bucket_mb": cap}
        for params, _, _ in pool.run(2, jobs.train, dtype, options, {}, "AdamW", strategy):
            assert equal(params, alike)


def test_each_rank_has_its_share_of_the_state(pool: Pool) -> None:
    ((_, _, whole, _),) = pool.run(1, jobs.alike, "DDP", "AdamW", {}, torch.float32)
    own = [bytes_ for _, _, bytes_, _ in pool.run(4, jobs.alike, "Zero1", "AdamW", {}, torch.float32)]
    assert sum(own) == whole and max(own) < 1.15 * whole / 4


def test_buckets_give_their_memory_back(pool: Pool) -> None:
    assert all(kept == 0 and full > 0 for kept, full in pool.run(2, jobs.memory))


@pytest.mark.parametrize("strategy", ZEROS)
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_inf_on_one_rank_skips_the_step_on_all(pool: Pool, strategy: str, bad_rank: int) -> None:
    found = pool.run(2, jobs.overflow_on_one, bad_rank, strategy)
    assert found == [(True, True, False, True, 4.0)] * 2


@pytest.mark.parametrize("strategy", ZEROS)
def test_a_parameter_that_nobody_has_used(pool: Pool, strategy: str) -> None:
    expected = {"zero": [0.0, -0.5, 0.5], "agree": [0.0, -0.5, 1.0]}
    for unused, values in expected.items():
        assert pool.run(2, jobs.branches, unused, [[0, 1], [1]], strategy) == [values] * 2
    for text in pool.run(2, jobs.branches, "error", [[0, 1], [0, 1]], strategy):
        assert text.startswith("no gradient came for 2 of shape (2,)")


@pytest.mark.parametrize("strategy", ["DDP", *ZEROS, "Zero1, cpu"])
def test_averages_and_a_closed_strategy(pool: Pool, strategy: str) -> None:
    ((averages, params),) = pool.run(1, jobs.averaged, "DDP")
    for their_averages, their_params in pool.run(2, jobs.averaged, strategy):
        assert equal(averages, their_averages) and equal(params, their_params)


@pytest.mark.parametrize("strategy", [*ZEROS, *OFFLOADED])
def test_parameters_that_somebody_else_has_written_are_stepped(pool: Pool, strategy: str) -> None:
    expected = pool.run(1, jobs.written_by_others, "DDP")[0][0]
    for params, devices in pool.run(2, jobs.written_by_others, strategy):
        assert equal(params, expected) and set(devices) == {"cpu"}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("torch", "optimizer: expected one of pytrain.optim, got AdamW; with torch's own use DDP"),
        ("Adafactor", "optimizer: Adafactor needs rows and columns of whole tensors, and shards cut them; use DDP"),
        ("Muon", "optimizer: Muon needs rows and columns of whole tensors, and shards cut them; use DDP"),
        ("release", "optimizer: step_in_backward=True steps before gradients are reduced; leave it out"),
    ],
)
def test_what_cannot_be_cut_is_refused(pool: Pool, what: str, message: str) -> None:
    assert pool.run(2, jobs.refused, what) == [message] * 2
