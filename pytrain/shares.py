"""What each of several ranks takes of a data loader."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from pytrain.launch import Team


def whole_reason(loader: Iterable[Any]) -> str | None:
    """Return why no sampler can be put into a loader to have each rank take its part; None: it can."""
    if type(loader) is not DataLoader:
        return f"it is a {type(loader).__name__}"
    if isinstance(loader.dataset, IterableDataset):
        return "its dataset is an IterableDataset"
    if loader.batch_size is None and loader.batch_sampler is not None:
        return f"it has a batch_sampler, {type(loader.batch_sampler).__name__}"
    sampler = loader.sampler
    if type(sampler) not in (SequentialSampler, RandomSampler):
        return f"it has a sampler, {type(sampler).__name__}"
    rows: Any = loader.dataset
    if isinstance(sampler, RandomSampler) and (sampler.replacement or len(sampler) != len(rows)):
        return "its RandomSampler draws with replacement, or not all rows once"
    return None


def share_out(team: Team, name: str, loader: Iterable[Any], seed: int | None) -> Iterable[Any]:
    """Return the loader of this rank's part of the rows, all else being as in `loader`; rank 0 says what was done.

    Args:
        team: whose ranks share.
        name: of the loader, for what is said.
        loader: left alone where it is none of torch's with a sampler of torch's; it then gives this rank's part.
        seed: of the order, the same on all ranks, where the loader shuffles. Ranks have equally many rows: where these
            do not divide some come twice, or with drop_last not at all. None: every row once and in order, so that
            ranks may have one more than others: for validation.
    """
    if team.size == 1:
        return loader
    reason = whole_reason(loader)
    if reason is not None or not isinstance(loader, DataLoader):
        team.say(f"{name} is left as it is ({reason}): what it gives on a rank is that rank's part")
        return loader
    dataset: Any = loader.dataset
    sampler: Any = range(team.rank, len(dataset), team.size)
    if seed is not None:
        shuffle = isinstance(loader.sampler, RandomSampler)
        sampler = DistributedSampler(dataset, team.size, team.rank, shuffle, seed, drop_last=loader.drop_last)
    team.say(f"{name}: a {type(sampler).__name__} shares its rows out to {team.size} ranks; batch_size is each rank's")
    names = inspect.signature(DataLoader.__init__).parameters.keys() - {"self", "shuffle", "sampler", "batch_sampler"}
    return DataLoader(**{name: getattr(loader, name) for name in sorted(names)}, sampler=sampler)


def several(loader: Any) -> list[Any]:
    """The loaders of a validation: a list or tuple of DataLoaders is several, anything else is one."""
    many = isinstance(loader, (list, tuple)) and bool(loader) and all(isinstance(one, DataLoader) for one in loader)
    return list(loader) if many else [loader]


def share_val(team: Team, name: str, loader: Any) -> Any:
    """Return this rank's part of one or several loaders whose rows come once each."""
    shared = [share_out(team, name, one, None) for one in several(loader)]
    return shared if len(shared) > 1 else shared[0]
