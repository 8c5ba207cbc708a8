"""Batches: their length and their device; the loaders of a stage, and where a window ends."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from pytrain.hparams import Hyperparameters
from pytrain.launch import Team


def loader_length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches in an epoch, or None where the loader does not know it."""
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:  # a DataLoader over an IterableDataset without a length has __len__, but it raises
        return None


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return the batch with every tensor in it (in dicts, lists, tuples, named tuples) on `device`, floats in `dtype`.

    An object with a `to` of its own, such as transformers' BatchEncoding, is moved by that.
    """
    if isinstance(batch, Tensor):
        # Onto the CPU a copy that does not block would be read too early.
        dtype = dtype if batch.is_floating_point() else None
        return batch.to(device, dtype, non_blocking=device.type != "cpu")
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device, dtype) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device, dtype) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device, dtype) for value in batch)
    return batch


def start_epoch(
    loader: Iterable[Any], epoch: int, device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[Any]:
    """Start an epoch's batches, moved to `device` as they are drawn; a sampler with `set_epoch` is told the epoch."""
    set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    stays = device.type == "cpu" and dtype is None
    return iter(loader) if stays else map(partial(to_device, device=device, dtype=dtype), loader)


class DataModule(Hyperparameters):
    """Data in one place: the loaders of every stage. Override what is used; see `Trainer.fit(datamodule=...)`."""

    def prepare_data(self) -> None:
        """Download and convert; called once a node, by its first rank, while the others wait. Sets nothing on self."""

    def setup(self, stage: str) -> None:
        """Open the data, on every rank; stage is "fit", "validate", "test" or "predict"."""

    def train_dataloader(self) -> Any:
        """Return what `fit` trains on."""

    def val_dataloader(self) -> Any:
        """Return what `fit` and `validate` validate on; None: nothing."""

    def test_dataloader(self) -> Any:
        """Return what `test` runs on."""

    def predict_dataloader(self) -> Any:
        """Return what `predict` runs on."""


def open_data(team: Team, stage: str, owners: Sequence[Any], loaders: Mapping[str, Any]) -> list[Any]:
    """Prepare and set up the data; return each loader that was given, else what the first owner that has one makes.

    Args:
        team: the ranks.
        stage: "fit", "validate", "test" or "predict".
        owners: the data module, if there is one, and the module.
        loaders: those given or None, by the name of the method that makes one.
    """
    for owner in owners:
        if hasattr(owner, "prepare_data"):
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:
                owner.prepare_data()
            team.gather(None)  # the others wait
        if hasattr(owner, "setup"):
            owner.setup(stage)
    made = []
    for name, loader in loaders.items():
        owner = next((owner for owner in owners if hasattr(owner, name)), None)
        made.append(getattr(owner, name)() if loader is None and owner is not None else loader)
    return made


def with_ends(batches: Iterator[Any], accumulate: int) -> Iterator[tuple[Any, bool]]:
    """Yield each batch, and whether it ends its window of up to `accumulate`; looks one ahead, never past a window."""
    for first in batches:
        window = chain((first,), islice(batches, accumulate - 1))
        batch = next(window)
        for following in window:
            yield batch, False
            batch = following
        yield batch, True


def skip_batches(batches: Iterator[Any], count: int) -> None:
    """Draw and drop `count` batches.

    Raises:
        ValueError: there are fewer.
    """
    given = sum(1 for _ in islice(batches, count))
    if given < count:
        raise ValueError(
            f"the checkpoint was taken after batch {count} of its epoch, but train_dataloaders gives only {given} "
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


def check_loader(name: str, loader: Any) -> None:
    """Raise TypeError where a loader gives no batches."""
    if not hasattr(loader, "__iter__"):
        raise TypeError(f"{name} must be an iterable of batches, got {type(loader).__name__}")
