"""Random states of one process: captured as plain types and tensors, restored bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pytrain.launch import Team


def seed_all(seed: int) -> None:
    """Seed torch (all devices), python's random and, where it is loaded, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def seed_everything(seed: int, workers: bool = False) -> int:
    """Seed torch (all devices), python's random and numpy; return the seed.

    Args:
        seed: 0 to 2**32 - 1.
        workers: taken for Lightning's sake; torch seeds a DataLoader's workers from its own generator in any case.

    Raises:
        ValueError: the seed is out of its range.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything: seed must be an int from 0 to 2**32 - 1, got {seed!r}")
    seed_all(seed)
    return seed


def order_seed(loader: Iterable[Any], seed: int | None) -> int:
    """Return the seed of an order that ranks share: that of the loader's own generator, else `seed`, else 0."""
    generators = _loader_generators(loader)
    return generators[0].initial_seed() % 2**63 if generators else seed or 0


def capture_rng(device: torch.device, loader: Iterable[Any]) -> dict[str, Any]:
    """Return the state of every generator that training draws from: global ones, and the loader's own."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "loader": [generator.get_state() for generator in _loader_generators(loader)],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = {
            "kind": str(kind),
            "keys": torch.tensor(keys.tolist()),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        }
    return state


def restore_rng(state: dict[str, Any], loader: Iterable[Any]) -> None:
    """Put back what capture_rng returned.

    Raises:
        ValueError: the loader has another number of generators than at capture.
    """
    generators = _loader_generators(loader)
    if len(generators) != len(state["loader"]):
        raise ValueError(
            f"the data loader has {len(generators)} random generators of its own, the saved state has "
            f"{len(state['loader'])}; give the loader that the state was saved with"
        )
    torch.set_rng_state(state["torch"])
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    for generator, saved in zip(generators, state["loader"], strict=True):
        generator.set_state(saved)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        saved = state["numpy"]
        keys = numpy.array(saved["keys"].tolist(), dtype="uint32")
        numpy.random.set_state((saved["kind"], keys, saved["position"], saved["has_gauss"], saved["cached"]))


def restore_ranks_rng(
    saved: dict[str, Any], team: Team, loader: Iterable[Any]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Put back this rank's random states of a checkpoint, or seed them anew where it was taken on fewer ranks.

    Returns:
        These states, and those of the epoch's start; None where the checkpoint has none.
    """
    count, states = len(saved["rng"]), saved["rng"]
    if count != team.size:
        new = f"; the random states of ranks {count} to {team.size - 1} are seeded anew" if count < team.size else ""
        team.say(f"the checkpoint was taken on {count} ranks, this run has {team.size}{new}")
    if team.rank >= count:
        seed_all(team.seed_of(saved["data_seed"], saved["global_step"]))
        return None, None
    restore_rng(states[team.rank], loader)
    return states[team.rank], saved["epoch_rng"][team.rank]


@contextmanager
def preserved_rng(device: torch.device, loader: Iterable[Any]) -> Iterator[None]:
    """Run a block that leaves all random states as they were: validation must not change the training."""
    state = capture_rng(device, loader)
    try:
        yield
    finally:
        restore_rng(state, loader)


def _loader_generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its samplers own, each once."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(item): item for item in found if isinstance(item, torch.Generator)}.values())
