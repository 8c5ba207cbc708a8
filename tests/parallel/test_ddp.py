"""DDP on two to four ranks over Gloo: the same as one process on the joined batch."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import torch
from pool import Pool

from pytrain.parallel import Ranks
from pytrain.parallel.ranks import pack_flags, unpack_flags


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [{}, {"max_norm": 0.1}, {"clip_value": 0.01}])
def test_ranks_do_what_one_process_does_on_all_data(pool: Pool, size: int, step: dict[str, Any]) -> None:
    alone, seen, scale = jobs.train_alone(size, torch.float64, step)
    found = pool.run(size, jobs.train, torch.float64, {}, step)
    for params, their_seen, their_scale in found:
        assert equal(params, found[0][0]) and their_scale == scale
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
        for (norm, applied), (expected, _) in zip(their_seen, seen, strict=True):
            assert norm == pytest.approx(expected, rel=1e-12) and applied


@pytest.mark.parametrize("strategy", ["DDP", "Zero1", "Zero2"])
@pytest.mark.parametrize("counts", [[3, 1, 0], [0, 2], [2, 2], [0, 0]])
def test_ranks_with_fewer_batches_take_part_until_all_are_done(pool: Pool, counts: list[int], strategy: str) -> None:
    alone = jobs.joined_alone(counts)
    found = pool.run(len(counts), jobs.joined, counts, strategy)
    for (params, seen), count in zip(found, counts, strict=True):
        assert seen == [*range(count), *[None] * (max(counts) - count)] and equal(params, found[0][0])
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)


def test_a_batch_of_a_join_is_one_step(pool: Pool) -> None:
    with pytest.raises(AssertionError, match=r"RuntimeError: join: expected one step\(\) for each batch, got 0"):
        pool.run(1, jobs.joined, [2], "DDP", 0)


@pytest.mark.parametrize("name", ["SGD", "LAMB", "Adafactor", "Muon"])
def test_every_kind_of_optimizer_takes_the_reduced_gradient(pool: Pool, name: str) -> None:
    alone, _, _ = jobs.train_alone(2, torch.float64, {}, name)
    for params, _, _ in pool.run(2, jobs.train, torch.float64, {}, {}, name):
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bucket_sizes_change_no_bit_between_two_ranks(pool: Pool, dtype: torch.dtype) -> None:
    found = [
        pool.run(2, jobs.train, dtype, {"bucket_cap_mb": cap, "first_bucket_mb": cap}, {})
        for cap in (1e-6, 1e-3, float("inf"))
    ]
    first = found[0][0][0]
    assert all(equal(params, first) for each in found for params, _, _ in each)


@pytest.mark.parametrize(("dtype", "reduce_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_gradients_are_summed_in_the_dtype_that_was_asked_for(
    pool: Pool, dtype: torch.dtype, reduce_dtype: torch.dtype
) -> None:
    found = pool.run(3, jobs.train, dtype, {"reduce_dtype": reduce_dtype}, {}, "SGD")
    own = pool.run(3, jobs.train, dtype, {}, {}, "SGD")
    assert equal(found[0][0], found[1][0]) and not equal(found[0][0], own[0][0])
    for p, q in zip(found[0][0], own[0][0], strict=True):
        torch.testing.assert_close(p, q, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_inf_on_one_rank_skips_the_step_on_all(pool: Pool, bad_rank: int) -> None:
    found = pool.run(2, jobs.overflow_on_one, bad_rank)
    assert found == [(True, True, False, True, 4.0)] * 2


def test_a_parameter_that_one_rank_has_not_used(pool: Pool) -> None:
    for text in pool.run(2, jobs.branches, "error", [[0, 1], [1, 2]])[:1]:
        assert text.startswith("no gradient came for 2 of shape (2,)")


@pytest.mark.parametrize(
    ("unused", "expected"),
    [
        ("zero", [1 - 0.5 - 0.5, 1 - 1 - 0.5, 1 - 0.5]),
        ("agree", [1 - 0.5 - 0.5, 1 - 1 - 0.5, 1.0]),  # the third is not even decayed
    ],
)
def test_a_parameter_that_nobody_has_used(pool: Pool, unused: str, expected: list[float]) -> None:
    assert pool.run(2, jobs.branches, unused, [[0, 1], [1]]) == [expected] * 2
    assert pool.run(2, jobs.branches, unused, [[], [0]])[0][1:] == ([0.5, 0.5] if unused == "zero" else [1.0, 1.0])


@pytest.mark.parametrize("strategy", ["DDP", "Zero1", "Zero2"])
@pytest.mark.parametrize("unused", ["zero", "agree"])
def test_a_rank_without_data_takes_part(pool: Pool, unused: str, strategy: str) -> None:
    assert pool.run(2, jobs.idle, unused, strategy) == [[-12.0] * 4] * 2


def test_one_rank_stops_all(pool: Pool) -> None:
    assert pool.run(3, jobs.stop_on, [2]) == [True] * 3
    assert pool.run(3, jobs.stop_on, []) == [False] * 3


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "shape",
            "number 0 is parameter weight (2, 3) torch.float32, in param group 0 on rank 0, parameter weight (4, 3)",
        ),
        ("dtype", "parameter weight (2, 3) torch.float64, in param group 0 on rank 1"),
        ("frozen", "parameter bias (2,) torch.float32, in param group 0, frozen on rank 1"),
        ("more", "parameter 0.weight (2, 3) torch.float32, in param group 0 on rank 1"),
    ],
)
def test_models_that_differ_are_named_on_all_ranks(pool: Pool, what: str, message: str) -> None:
    for text in pool.run(2, jobs.differing, what):
        assert text.startswith("the model differs between ranks: number ") and message in text


def test_sums_of_fp16_gradients_do_not_overflow(pool: Pool) -> None:
    for size in (2, 4):
        assert pool.run(size, jobs.fp16_sum, 60000.0) == [[60000.0] * 4] * size


def test_what_ranks_agree_on(pool: Pool) -> None:
    found = pool.run(3, jobs.numbers, [[1.0, 2.0], [4.0, 8.0], [0.5, 0.25]], [[3, 1], [0, 0], [9, 9]])
    assert found == [([5.5, 10.25], [3, 1])] * 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 512, 1024])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_flags_travel_in_few_numbers(ranks: int, count: int) -> None:
    flags = [i % 3 == 0 for i in range(count)]
    packed = pack_flags(flags, ranks)
    assert len(packed) <= count // 4 + 1
    assert unpack_flags([ranks * x for x in packed], count, ranks) == flags
    assert unpack_flags(packed, count, ranks) == flags
    assert unpack_flags([0.0] * len(packed), count, ranks) == [False] * count


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"^torch\.distributed is not initialized; start with `torchrun`"):
        Ranks()
