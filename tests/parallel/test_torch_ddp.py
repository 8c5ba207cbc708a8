"""pytrain's optimizers and step under torch's DistributedDataParallel, on real ranks over Gloo."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch_ddp_jobs as jobs
from pool import Pool
from torch import Tensor

CASES: list[tuple[str, dict[str, Any], dict[str, Any], int, int]] = [  # optimizer, its options, DDP's, ranks, micros
    ("AdamW", {}, {}, 2, 1),
    ("AdamW", {}, {"gradient_as_bucket_view": True}, 4, 2),
    ("SGD", {"momentum": 0.9, "zero_grad_in_step": True}, {"gradient_as_bucket_view": True}, 2, 3),
    ("Lion", {}, {"gradient_as_bucket_view": False}, 2, 2),
    ("LAMB", {}, {"gradient_as_bucket_view": True}, 2, 1),
    ("AdamW", {}, {"static_graph": True}, 2, 1),
    ("SGD", {}, {"static_graph": True, "gradient_as_bucket_view": True}, 4, 1),
]


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name, options, ddp, size, micros", CASES)
def test_ranks_do_what_one_process_does_on_all_data(
    pool: Pool, name: str, options: dict[str, Any], ddp: dict[str, Any], size: int, micros: int
) -> None:
    params, averages, seen, scale = jobs.train_alone(size, name, options, micros, torch.float64)
    assert [applied for _, applied in seen] == [True, False, True, True] and scale == 4.0
    found = pool.run(size, jobs.train, name, options, ddp, micros, torch.float64)
    for theirs, their_averages, their_seen, their_scale in found:
        close(theirs, params)
        close(their_averages, averages)
        assert all(torch.equal(p, q) for p, q in zip(theirs, found[0][0], strict=True)) and their_scale == scale
        for (norm, applied), (expected, expected_applied) in zip(their_seen, seen, strict=True):
            assert applied == expected_applied
            assert norm == pytest.approx(expected, rel=1e-12) if applied else math.isnan(norm)


@pytest.mark.parametrize("options", [{"master_weights": True}, {"kahan": True, "state_dtype": "bf16"}])
def test_low_precision_ranks_stay_alike(pool: Pool, options: dict[str, Any]) -> None:
    before = jobs.model(torch.bfloat16)
    for ddp in ({}, {"gradient_as_bucket_view": True}):
        found = pool.run(2, jobs.train, "AdamW", options, ddp, 2, torch.bfloat16)
        for params, _, seen, scale in found:
            assert all(torch.equal(p, q) for p, q in zip(params, found[0][0], strict=True))
            assert not any(torch.equal(p, q) for p, q in zip(params, before.parameters(), strict=True))
            assert [applied for _, applied in seen] == [True, False, True, True] and scale == 4.0


@pytest.mark.parametrize("strategy", ["DDP", "Zero1", "Zero2"])
def test_b7_a_static_model_accumulates_from_the_first_micro_batch_on(pool: Pool, strategy: str) -> None:
    """pytorch#187732: DDP(static_graph=True) whose first backward is under no_sync() ends in an internal assert."""
    expected = jobs.accumulate_alone(2)
    for params in pool.run(2, jobs.accumulate_from_the_start, strategy):
        close(params, expected)
