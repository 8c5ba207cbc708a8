"""One pool of ranks for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Ranks that wait for work."""
    ranks = Pool()
    yield ranks
    ranks.close()
