"""Batches: their length, their device and their size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def loader_length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches in an epoch, or None where the loader does not know it."""
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:  # a DataLoader over an IterableDataset without a length has __len__, but it raises
        return None


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it (in dicts, lists, tuples, named tuples) on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def start_epoch(loader: Iterable[Any], epoch: int, device: torch.device) -> Iterator[Any]:
    """Start an epoch's batches, moved to `device` as they are drawn; a sampler with `set_epoch` is told the epoch."""
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    return iter(loader) if device.type == "cpu" else map(partial(to_device, device=device), loader)


def skip_batches(batches: Iterator[Any], count: int) -> None:
    """Draw and drop `count` batches.

    Raises:
        ValueError: there are fewer.
    """
    given = sum(1 for _ in islice(batches, count))
    if given < count:
        raise ValueError(
            f"the checkpoint was taken after batch {count} of its epoch, but train_dataloader gives only {given} "
            "batches; resume with the loader of the saved run"
        )


def no_batch_message(argument: str, loader: Iterable[Any]) -> str:
    """Return the words of an error for a loader that gave nothing."""
    if isinstance(loader, Iterator):
        return (
            f"{argument} gave no batch: it is an iterator ({type(loader).__name__}), which can be read only once; "
            "give an object that starts anew at each iter(), such as a DataLoader or a list"
        )
    return f"{argument} gave no batch: expected at least one, the {type(loader).__name__} is empty"


def batch_size(batch: Any) -> int:
    """Return the first dimension of the first tensor in the batch that has one; 1 where there is none."""
    found = _first_dimension(batch)
    return 1 if found is None else found


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() > 0 else None
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(_first_dimension, items) if size is not None), None)
