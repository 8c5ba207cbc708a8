"""Callbacks on two ranks over Gloo: both decide alike, also by a metric that is another on each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

if sys.platform != "linux" or not dist.is_available():
    pytest.skip("the ranks' processes are tested on Linux", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import callback_ranks
from pool import Pool


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    ranks = Pool(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_both_ranks_decide_alike(two: Pool, strategy: str, tmp_path: Path) -> None:
    first, second = two.run(2, callback_ranks.fit, tmp_path, strategy)
    states, files, epochs, params = first
    assert second[:3] == (states, files, epochs)
    assert all(torch.equal(a, b) for a, b in zip(params, second[3], strict=True))
    assert epochs == 3  # the first look sets the best, and two do not better it
    assert files == [
        "best/step=10-own=-9.0.ckpt",
        "best/step=12-own=-11.0.ckpt",
        "last/epoch=2-step=12.ckpt",
        "last/last.ckpt",
    ]
    assert [path.name for path in tmp_path.rglob("metrics.csv")] == ["metrics.csv"]
