"""Two ranks for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))


@pytest.fixture(scope="session")
def two() -> Iterator[Any]:
    """Ranks that wait for work; see `pool.Pool`."""
    if sys.platform != "linux" or not dist.is_available():
        pytest.skip("the ranks' processes are tested on Linux")
    from pool import Pool

    ranks = Pool(2)
    yield ranks
    ranks.close()
