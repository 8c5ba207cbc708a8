"""Validation: one pass over the validation loader that leaves the training as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pytrain.trainer.data import batch_size, no_batch_message, to_device
from pytrain.trainer.module import Module
from pytrain.trainer.ranks import Team
from pytrain.trainer.rng import preserved_rng


def validate(
    module: Module,
    validation_step: Callable[[Any, int], Tensor | None],
    loader: Iterable[Any],
    device: torch.device,
    team: Team,
) -> dict[str, float]:
    """Return the mean of each logged metric over the loader's batches on all ranks, weighted by batch size.

    Runs in eval mode and without gradients; afterwards the mode of every submodule and all random states are what
    they were, so that training goes the same way with validation and without.

    Raises:
        ValueError: the loader gave no batch.
        TypeError: validation_step returned something else than a tensor or None.
    """
    values: dict[str, list[tuple[Tensor | float, int]]] = {}
    modes = [(part, part.training) for part in module.modules()]
    count = 0
    module.take_logged()
    module.eval()
    try:
        with torch.no_grad(), preserved_rng(device, loader):
            for batch in loader:
                output = validation_step(to_device(batch, device), count)
                if output is not None:
                    if not isinstance(output, Tensor):
                        raise TypeError(
                            f"validation_step must return a scalar tensor or None, got {type(output).__name__}"
                        )
                    module.log("val_loss", output)
                size = batch_size(batch)
                for name, value in module.take_logged().items():
                    values.setdefault(name, []).append((value, size))
                count += 1
    finally:
        for part, training in modes:
            part.training = training
        module.take_logged()
    own = {name: [(float(value) * size, size) for value, size in pairs] for name, pairs in values.items()}
    everyone = team.gather((count, own))
    if not any(number for number, _ in everyone):
        raise ValueError(no_batch_message("val_dataloader", loader))
    names = dict.fromkeys(name for _, found in everyone for name in found)
    return {name: _mean([pair for _, found in everyone for pair in found.get(name, ())]) for name in names}


def _mean(pairs: list[tuple[float, int]]) -> float:
    """Return the sum of all products over the sum of all sizes: the same bits in whatever parts they came."""
    products, total = [product for product, _ in pairs], sum(size for _, size in pairs)
    if not all(map(math.isfinite, products)):
        return sum(products) / total  # fsum refuses inf - inf; a plain sum says nan
    return math.fsum(products) / total
