"""Validation, test and prediction: one pass over loaders that leaves the training as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pytrain.callbacks.hooks import Hooks
from pytrain.export import evaluating
from pytrain.launch import Team
from pytrain.rng import preserved_rng
from pytrain.shares import several
from pytrain.trainer.config import Limit, take_of
from pytrain.trainer.data import loader_length, no_batch_message, start_epoch
from pytrain.trainer.module import Module

ARGUMENTS = {"val": "val_dataloaders", "test": "test_dataloaders", "predict": "predict_dataloaders"}


def evaluate(
    module: Module,
    step: Callable[..., Any],
    loader: Any,
    device: torch.device,
    team: Team,
    *,
    kind: str = "val",
    dtype: torch.dtype | None = None,
    limit: Limit = None,
    hooks: Hooks | None = None,
) -> dict[str, float]:
    """Return the mean of each logged metric over the loader's batches on all ranks, weighted by batch size.

    Args:
        module: what is evaluated; in eval mode and without gradients. Afterwards the mode of every submodule and all
            random states are what they were, so that training goes the same way with validation and without.
        step: its validation_step or test_step. A tensor that it returns is logged as `{kind}_loss`.
        loader: a loader, or a list of DataLoaders: the step takes a dataloader_idx then, and names end in
            "/dataloader_idx_0" and so on.
        device: of the batches.
        team: the ranks, each with its part.
        kind: "val" or "test".
        dtype: of the batches' floats.
        limit: how many batches of each loader, or which share; None: all.
        hooks: to call at the start and at batches' starts and ends, and the module's own at the end.

    Raises:
        ValueError: the loader gave no batch.
        TypeError: the step returned something else than a tensor or None.
    """
    starts, ends = [() if hooks is None else hooks[f"on_validation_batch_{when}"] for when in ("start", "end")]
    loaders, log = several(loader), module._logged
    found: dict[str, float] = {}
    with eval_mode(module):
        if hooks is not None:
            hooks.call("on_validation_epoch_start")
        for number, one in enumerate(loaders):
            values: dict[str, list[tuple[Tensor | float, int]]] = {}
            index, suffix = ((number,), f"/dataloader_idx_{number}") if len(loaders) > 1 else ((), "")
            count = 0
            with preserved_rng(device, one):
                stop = take_of(f"limit_{kind}_batches", limit, loader_length(one))
                for count, batch in enumerate(islice(start_epoch(one, 0, device, dtype), stop), 1):
                    for hook in starts:
                        hook(batch, count - 1)
                    log.batch = batch
                    output = step(batch, count - 1, *index)
                    if output is not None:
                        if not isinstance(output, Tensor):
                            given = type(output).__name__
                            word = {"val": "validation"}.get(kind, kind)
                            raise TypeError(f"{word}_step must return a scalar tensor or None, got {given}")
                        if f"{kind}_loss" not in log.step:
                            module.log(f"{kind}_loss", output)
                    for name, weighed in log.take_weighed().items():
                        values.setdefault(log.epoch_name(name), []).append(weighed)
                    for hook in ends:
                        hook(output, batch, count - 1)
            own = {name: [(float(value) * size, size) for value, size in pairs] for name, pairs in values.items()}
            everyone = team.gather((count, own))
            if not any(batches for batches, _ in everyone) and stop != 0:
                raise ValueError(no_batch_message(ARGUMENTS[kind], one))
            names = dict.fromkeys(name for _, parts in everyone for name in parts)
            means = {name: _mean([pair for _, parts in everyone for pair in parts.get(name, ())]) for name in names}
            means |= log.close_metrics()
            found |= {name + suffix: value for name, value in means.items()}
        if hooks is not None:
            hooks.call_own("on_validation_epoch_end")
            found |= log.read_step(team) | log.close_metrics()
    return found


def predict(
    module: Module, step: Callable[..., Any], loader: Any, device: torch.device, dtype: torch.dtype | None, limit: Limit
) -> list[Any]:
    """Return what the step gives for every batch, in their order, a list a loader; arguments are `evaluate`'s."""
    loaders, found = several(loader), []
    for number, one in enumerate(loaders):
        index = (number,) if len(loaders) > 1 else ()
        with eval_mode(module), preserved_rng(device, one):
            stop = take_of("limit_predict_batches", limit, loader_length(one))
            batches = islice(start_epoch(one, 0, device, dtype), stop)
            found.append([step(batch, i, *index) for i, batch in enumerate(batches)])
    return found if len(found) > 1 else found[0]


@contextmanager
def eval_mode(module: Module) -> Iterator[None]:
    """Without gradients, in eval mode and with a log of its own; all is as it was again afterwards."""
    log = module._logged
    before = log.step, log.metrics, log.batch, log.training
    log.step, log.metrics, log.batch, log.training = {}, {}, None, False
    try:
        with evaluating(module):
            yield
    finally:
        log.step, log.metrics, log.batch, log.training = before


def _mean(pairs: list[tuple[float, int]]) -> float:
    """Return the sum of all products over the sum of all sizes: the same bits in whatever parts they came."""
    products, total = [product for product, _ in pairs], sum(size for _, size in pairs)
    if not all(map(math.isfinite, products)):
        return sum(products) / total  # fsum refuses inf - inf; a plain sum says nan
    return math.fsum(products) / total
