"""Random states of one process: captured as plain types and tensors, restored bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def seed_all(seed: int) -> None:
    """Seed torch (all devices), python's random and, where it is loaded, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


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
