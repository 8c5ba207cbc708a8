"""How a step clips: by the common norm of groups of gradients, or by value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

from torch.optim.optimizer import Optimizer

ClipPer = Literal["optimizer", "group", "all"]
CLIP_PER = ("optimizer", "group", "all")


@dataclass(frozen=True)
class ClipGroup:
    """Param groups, of one optimizer or several, whose gradients are clipped by their common norm.

    Args:
        groups: entries of `optimizer.param_groups`.
        max_norm: limit of the norm, > 0.
    """

    groups: Sequence[dict[str, Any]]
    max_norm: float


class Clip(NamedTuple):
    """For each param group of all optimizers which of `max_norms` holds (-1: none); the limit by value (0: none)."""

    groups: list[int]
    max_norms: list[float]
    value: float = 0.0


def read_clip(
    optimizers: Sequence[Optimizer],
    max_norm: float | Sequence[ClipGroup] | None,
    clip_value: float | None,
    clip_per: str,
) -> Clip:
    """Check the arguments of `pytrain.step` that say how to clip.

    Raises:
        ValueError: one is out of its range, both are given, or a clip group has a param group twice or a foreign one.
    """
    if clip_per not in CLIP_PER:
        raise ValueError(f"clip_per: expected one of {', '.join(map(repr, CLIP_PER))}, got {clip_per!r}")
    if clip_value is not None:
        if max_norm is not None:
            raise ValueError(f"clip_value={clip_value} and max_norm={max_norm} exclude each other; give one of them")
        _check_positive("clip_value", clip_value, finite=True)
    if type(max_norm) is not float and isinstance(max_norm, Sequence):
        return _custom(optimizers, max_norm)
    owners: list[int] = []  # of each param group
    for i, optimizer in enumerate(optimizers):
        owners += [i] * len(getattr(optimizer, "param_groups", ()))  # what is no optimizer is named later
    if max_norm is None:
        return Clip([-1] * len(owners), [], float(clip_value or 0.0))
    _check_positive("max_norm", max_norm)
    if clip_per == "optimizer":
        return Clip(owners, [float(max_norm)] * (owners[-1] + 1 if owners else 0))
    if clip_per == "all":
        return Clip([0] * len(owners), [float(max_norm)])
    return Clip(list(range(len(owners))), [float(max_norm)] * len(owners))


def _custom(optimizers: Sequence[Optimizer], wanted: Sequence[ClipGroup]) -> Clip:
    places = {id(group): -1 for optimizer in optimizers for group in optimizer.param_groups}
    for i, clip_group in enumerate(wanted):
        if not isinstance(clip_group, ClipGroup):
            raise ValueError(f"max_norm[{i}]: expected a pytrain.ClipGroup, got {type(clip_group).__name__}")
        _check_positive(f"max_norm[{i}].max_norm", clip_group.max_norm)
        for k, group in enumerate(clip_group.groups):
            place = places.get(id(group))
            if place is None:
                raise ValueError(
                    f"max_norm[{i}].groups[{k}] is not an entry of the param_groups of one of these optimizers"
                )
            if place >= 0:
                raise ValueError(f"max_norm[{i}].groups[{k}] is in max_norm[{place}].groups too")
            places[id(group)] = i
    return Clip(list(places.values()), [float(clip_group.max_norm) for clip_group in wanted])


def _check_positive(name: str, value: Any, *, finite: bool = False) -> None:
    good = (type(value) in (int, float) or isinstance(value, Real)) and value is not True and value > 0
    if not good or (finite and not math.isfinite(value)):
        raise ValueError(f"{name}: expected a {'finite ' if finite else ''}number > 0, got {value!r}")
