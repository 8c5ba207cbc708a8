"""Truncated back-propagation through time: batches cut into parts, and the hidden state that goes from part to part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class TimePart:
    """A part of a batch in time, and whether the hidden state starts anew with it."""

    batch: Any
    batch_idx: int
    first: bool


def in_parts(batches: Iterator[Any], split: Callable[[Any, int], list[Any]], steps: int) -> Iterator[TimePart]:
    """Cut every batch into parts of `steps` time steps."""
    for batch_idx, batch in enumerate(batches):
        for i, part in enumerate(split(batch, steps)):
            yield TimePart(part, batch_idx, i == 0)


class InTime:
    """The hidden state between the parts of a batch.

    Attributes:
        hiddens: what the last part has returned, detached.
    """

    def __init__(self, hiddens: Any = None) -> None:
        self.hiddens = hiddens

    def over(self, step: Callable[[Any, int, Any], Any]) -> Callable[[TimePart, int], Any]:
        """Return a training step of parts.

        Args:
            step: takes a part's batch, the number of its batch, and the hidden state (None: it starts anew); returns
                a dict with "loss" and "hiddens".
        """

        def of_part(part: TimePart, _: int) -> Any:
            output = step(part.batch, part.batch_idx, None if part.first else self.hiddens)
            if not isinstance(output, dict) or "hiddens" not in output:
                raise TypeError('training_step must return {"loss": ..., "hiddens": ...}, as tbptt_steps is set')
            self.hiddens = _detached(output["hiddens"])
            return output

        return of_part


def for_parts(hooks: Sequence[Callable[..., Any]]) -> tuple[Callable[..., Any], ...]:
    """Hooks of batches, to be called with parts: they get a part's batch and the number of the whole batch."""

    def of(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: hook(*args[:-2], args[-2].batch, args[-2].batch_idx)

    return tuple(map(of, hooks))


def split_time(batch: Any, steps: int) -> list[Any]:
    """Cut every tensor of two or more dimensions in a batch along dimension 1; all else goes with each part."""
    if isinstance(batch, Tensor):
        return list(torch.split(batch, steps, dim=1)) if batch.dim() > 1 else [batch]
    if isinstance(batch, dict):
        parts = [split_time(value, steps) for value in batch.values()]
        return [dict(zip(batch, each, strict=True)) for each in _together(parts)]
    if isinstance(batch, (list, tuple)):
        return [_like(batch, each) for each in _together([split_time(value, steps) for value in batch])]
    return [batch]


def _together(parts: list[list[Any]]) -> list[tuple[Any, ...]]:
    """The first of all, the second of all, ...; what was not cut goes with each."""
    count = max(map(len, parts), default=0)
    uneven = sorted({len(each) for each in parts} - {1, count})
    if uneven:
        raise ValueError(
            f"tbptt_steps: the batch's tensors have different numbers of time steps: {uneven} and {count} parts"
        )
    return list(zip(*(each * count if len(each) == 1 else each for each in parts), strict=True))


def _detached(hiddens: Any) -> Any:
    if isinstance(hiddens, Tensor):
        return hiddens.detach()
    if isinstance(hiddens, dict):
        return {key: _detached(value) for key, value in hiddens.items()}
    if isinstance(hiddens, (list, tuple)):
        return _like(hiddens, map(_detached, hiddens))
    return hiddens


def _like(given: Any, values: Iterable[Any]) -> Any:
    """The values in a list, tuple or named tuple as the one given."""
    return type(given)(*values) if hasattr(given, "_fields") else type(given)(values)
