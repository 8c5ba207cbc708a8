"""Rules with norms and means of whole parameters (LAMB, LARS, ...) under Zero1 and Zero2, whose shards cut these."""

from __future__ import annotations

from typing import Any

import jobs
import pytest
import torch
from pool import Pool
from torch import Tensor

from pytrain.optim import REGISTRY

RULES = sorted(cls.__name__ for cls in REGISTRY.values() if any(rule.sums for rule in cls.rules))
ZEROS = ["Zero1", "Zero2"]
SIZES = [2, 3]


def rms(params: list[Tensor], exact: list[Tensor]) -> float:
    """How far parameters are from others."""
    errors = torch.cat([(p.double() - q.double()).flatten() for p, q in zip(params, exact, strict=True)])
    return errors.square().mean().sqrt().item()


def close(params: list[Tensor], exact: list[Tensor]) -> bool:
    """Whether fp64 parameters agree to 1e-12."""
    for p, q in zip(params, exact, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
    return True


@pytest.mark.parametrize("strategy", ZEROS)
@pytest.mark.parametrize("size", SIZES)
def test_one_parameter_spans_all_ranks_and_one_lies_on_one(pool: Pool, strategy: str, size: int) -> None:
    """Else the tests below show nothing."""
    owners = pool.run(size, jobs.whose, strategy)[0]
    assert list(range(size)) in owners and any(len(ranks) == 1 for ranks in owners)


@pytest.mark.parametrize("strategy", [*ZEROS, "Zero1, cpu"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RULES)
def test_norms_are_those_of_whole_parameters(pool: Pool, strategy: str, size: int, name: str) -> None:
    step: dict[str, Any] = {"max_norm": 0.1} if size == 2 else {}
    alone, seen, scale = jobs.train_alone(size, torch.float64, step, name)
    for params, their_seen, their_scale in pool.run(size, jobs.train, torch.float64, {}, step, name, strategy):
        assert close(params, alone) and their_scale == scale
        assert [applied for _, applied in their_seen] == [applied for _, applied in seen]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RULES)
def test_fp32_is_as_near_to_the_truth_as_one_process(pool: Pool, size: int, name: str) -> None:
    exact = jobs.train_alone(size, torch.float64, {}, name)[0]
    alone = jobs.train_alone(size, torch.float32, {}, name)[0]
    found = pool.run(size, jobs.train, torch.float32, {}, {}, name, "Zero1")
    assert all(torch.equal(p, q) for other, *_ in found for p, q in zip(other, found[0][0], strict=True))
    assert rms(found[0][0], exact) <= 2 * rms(alone, exact)


@pytest.mark.parametrize("name", RULES)
def test_state_goes_from_each_strategy_into_each_other(pool: Pool, name: str) -> None:
    """Also what a rule keeps of a whole parameter (NovoGrad's average): the same in all pieces."""
    dtype = torch.float64
    (params, _, _, end), *_ = pool.run(1, jobs.alike, "DDP", name, {}, dtype)
    for strategy, size in (("Zero1", 2), ("Zero2", 3)):
        between, saved, _, last = pool.run(size, jobs.alike, strategy, name, {}, dtype)[0]
        assert close(between, params) and close(last, end)
        for other, others in (("DDP", 1), ("Zero1", 3), ("Zero2", 2)):
            for one in pool.run(others, jobs.resume, other, name, {}, dtype, between, saved):
                assert close(one, end)


@pytest.mark.parametrize("strategy", ZEROS)
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"master_weights": True, "state_dtype": "bf16"}, torch.bfloat16),
        ({"state_dtype": "8bit"}, torch.float32),
        ({"ema_decay": 0.5}, torch.float32),
        ({"rounding": "stochastic"}, torch.bfloat16),
    ],
)
def test_every_storage_format_does_what_one_process_does(
    pool: Pool, strategy: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """In units of its last place: norms whose sums were added in another order may round elsewhere."""
    ((params, _, _, _),) = pool.run(1, jobs.alike, "DDP", "LAMB", options, dtype, 1)
    found = pool.run(2, jobs.alike, strategy, "LAMB", options, dtype, 1)
    for sharded, *_ in found:
        for p, q in zip(sharded, params, strict=True):
            torch.testing.assert_close(p, q, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("strategy", ZEROS)
@pytest.mark.parametrize("name", RULES)
def test_an_inf_on_one_rank_skips_the_step_on_all(pool: Pool, strategy: str, name: str) -> None:
    assert pool.run(2, jobs.overflow_on_one, 1, strategy, name) == [(True, True, False, True, 4.0)] * 2


@pytest.mark.parametrize("strategy", ZEROS)
def test_norms_take_one_small_all_reduce_more(pool: Pool, strategy: str) -> None:
    assert pool.run(2, jobs.collectives_of, strategy, "AdamW") == [["the agreement on a step"]] * 2
    both = ["the agreement on a step", "the agreement on norms"]
    assert pool.run(2, jobs.collectives_of, strategy, "LAMB") == [both] * 2


@pytest.mark.parametrize("strategy", ZEROS)
def test_a_rank_without_a_part_takes_part(pool: Pool, strategy: str) -> None:
    ((*expected,),) = pool.run(1, jobs.lonely, "DDP", "LAMB")
    for found in pool.run(3, jobs.lonely, strategy, "LAMB"):
        assert found == pytest.approx(expected, rel=1e-12)
