"""Between pass 1 and pass 2 of a step: clip coefficients and the loss scale, by the kernels or else in Python.

The Python here is the reference of csrc/core/scaler.h and csrc/ops/step.cpp, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from pytrain import backend

# The control block, as in csrc/core/control.h: its head, and then a row a param group.
INV_SCALE, FOUND_INF, CLIP_VALUE, GRAD_NORM, FIRST_BAD, CONTROL_HEAD = range(6)
GRAD_SIGN, EMA_WEIGHT, CLIP_COEF, SUMSQ, CONTROL_HYPERS = range(5)
CONTROL_ROW = 18
Record: TypeAlias = "Tensor | bytearray"  # a copy of one: on its device, or its bytes
MAX_SUMS = 2  # csrc/core/segment.h
FIT, STATS, SETTLE, SUMS, WRITE, WRITE_FITTED = range(6)  # of a call of the kernels: Table::Mode in csrc/ops/table.h
ONE = torch.ones((), dtype=torch.float32, device="cpu")  # the scale of a loss that nothing has scaled
NO_SCALE = ONE.data_ptr()
ABSENT = torch.empty(0, dtype=torch.float64, device="cpu")  # instead of numbers that only the device has
# What it says; a number from 0 on is the first parameter that does not fit.
APPLIED, SKIPPED, NOT_ALL = -1, -2, -3


class Moving(Protocol):
    """A loss scaler whose state a step may move: `pytrain.amp.LossScaler`."""

    current: Tensor
    place: int  # the scale's address in the host's memory, or 0
    moved: bool

    def lend(self, between: Between) -> Besides:
        """What pass 1 needs to settle, and to find where the state moves if it does and hangs on that step alone."""


# What follows from pass 1: the loss scaler (None: nothing has scaled), whether that moves next, and `Clip`'s groups and
# norms. And what a call of the kernels is told where the whole step is one plan on a device that launches: with SETTLE
# the loss scale, or a scaler's state that is to move, groups, norms, that scaler's policy; in pass 2 the state alone.
Between = tuple["Moving | None", bool, list[int], list[float]]
Besides = tuple[Tensor | None, list[int], list[float], Sequence[float]]
NOTHING: tuple[()] = ()

# The loss scaler's state, one fp32 each: struct Scaler in csrc/core/scaler.h.
SCALE, GROWTH_TRACKER, HYSTERESIS_LEFT, SKIPPED_IN_A_ROW, BAD_PARAM, BAD_OPTIMIZER, SCALER_SIZE = range(7)

LARGEST = torch.finfo(torch.float32).max
_ones: dict[torch.device, Tensor] = {}


class Policy(NamedTuple):
    """How a loss scale moves; as struct Policy in csrc/core/scaler.h."""

    growth_factor: float
    backoff_factor: float
    growth_interval: float
    hysteresis: float
    min_scale: float
    max_scale: float
    refills: bool  # does every clean step refill the hysteresis, or only growth?
    first_is_free: bool  # does the first clean step after an overflow not count?


def settle(
    controls: Sequence[Tensor], scale: Tensor, scaled: Sequence[int], clip_groups: list[int], max_norms: list[float]
) -> None:
    """Fill in what follows from pass 1: norms, clip coefficients and what unscales.

    Args:
        controls: the control block of each optimizer.
        scale: fp32, one element; the loss scale of the gradients of those that are `scaled`.
        clip_groups: for each param group of all optimizers, which of `max_norms` limits the common norm of all with
            the same number; -1 for none.
    """
    if backend.facts is None:
        return settle_in_python(controls, scale, scaled, clip_groups, max_norms)
    op = torch.ops.pytrain._control.default
    device = controls[0].device
    for control in controls:
        if control.device != device:
            break
    else:
        scale = scale if scale.device == device else _on(scale, device)
        if backend.is_here(device):
            places = [(control.data_ptr(), (len(control) - CONTROL_HEAD) // CONTROL_ROW) for control in controls]
            backend.facts.settle(places, scale.data_ptr(), scaled, clip_groups, max_norms)
        else:
            op(controls, scale, scaled, clip_groups, max_norms)
        return
    here = [control.cpu() for control in controls]
    op(here, scale.cpu(), scaled, clip_groups, max_norms)
    for control, settled in zip(controls, here, strict=True):
        control.copy_(settled)


def _on(scale: Tensor, device: torch.device) -> Tensor:
    """The scale on the control blocks' device, without a wait for a device; that of no scaler is made there once."""
    if scale is not ONE:
        return scale.to(device, non_blocking=device.type != "cpu")
    one = _ones.get(device)
    if one is None:
        one = torch.ones((), dtype=torch.float32, device=device)
        if not backend.is_capturing(device):  # else only the graph writes it, when it is replayed
            _ones[device] = one
    return one


def settle_in_python(
    controls: Sequence[Tensor], scale: Tensor, scaled: Sequence[int], clip_groups: list[int], max_norms: list[float]
) -> None:
    """The reference of `settle`."""
    squares, bad = [0.0] * len(max_norms), [0.0] * len(max_norms)
    places = []
    for control, has_scale in zip(controls, scaled, strict=True):
        head, rows = control[:CONTROL_HEAD], control[CONTROL_HEAD:].view(-1, CONTROL_ROW)
        if has_scale:
            factor = float(scale)
            head[INV_SCALE] = float(head[INV_SCALE]) / factor if factor else math.inf
            head[FOUND_INF] += not head[INV_SCALE] <= LARGEST
        total = 0.0
        for squares_of_row in rows[:, SUMSQ].tolist():
            total += squares_of_row
        head[GRAD_NORM] = math.nan if head[FIRST_BAD] >= 0 else math.sqrt(total) * float(head[INV_SCALE])
        if head[FOUND_INF] == 0 and head[INV_SCALE] > 1 and not head[GRAD_NORM] <= LARGEST:
            head[FOUND_INF] = 1.0
        places += [(head, row) for row in rows]
    for (head, row), group in zip(places, clip_groups, strict=True):
        if group >= 0:
            squares[group] += float(row[SUMSQ]) * float(head[INV_SCALE]) * float(head[INV_SCALE])
            bad[group] += float(head[FOUND_INF])
    for (head, row), group in zip(places, clip_groups, strict=True):
        row[CLIP_COEF] = 1.0
        if group >= 0:
            if not math.isnan(squares[group]):
                row[CLIP_COEF] = min(1.0, max_norms[group] / (math.sqrt(squares[group]) + 1e-6))
            if bad[group] and not head[FOUND_INF]:
                head[FOUND_INF] = bad[group]


def update_scaler(state: Tensor, controls: Sequence[Tensor], policy: Policy) -> None:
    """Move the loss scale after a step by what its optimizers' control blocks found."""
    if backend.facts is None:
        return update_scaler_in_python(state, controls, policy)
    op = torch.ops.pytrain._scaler_update.default
    for control in controls:
        if control.device != state.device:
            break
    else:
        moved = True
        if backend.is_here(state.device):
            places = [control.data_ptr() for control in controls]
            moved = backend.facts.update_scaler(state.data_ptr(), policy, places)
        else:
            op(state, controls, policy)
        if moved:  # graphs that hold the scale of before are refused
            torch.autograd.graph.increment_version(state)
        return
    here = state.cpu()
    op(here, [control.cpu() for control in controls], policy)
    state.copy_(here)


def update_scaler_in_python(state: Tensor, controls: Sequence[Tensor], policy: Policy) -> None:
    """The reference of `update_scaler`."""
    found = [(i, float(control[FIRST_BAD])) for i, control in enumerate(controls) if control[FOUND_INF] != 0]
    values = state.tolist()
    if found:
        if values[SKIPPED_IN_A_ROW] == 0:
            values[BAD_OPTIMIZER], values[BAD_PARAM] = found[0]
        values[SKIPPED_IN_A_ROW] += 1
        values[GROWTH_TRACKER] = 0.0
        values[HYSTERESIS_LEFT] = max(values[HYSTERESIS_LEFT] - 1, 0.0)
        if values[HYSTERESIS_LEFT] == 0:
            lower = _fp32(values[SCALE] * policy.backoff_factor)
            values[SCALE] = max(lower, min(values[SCALE], _fp32(policy.min_scale)))
    else:
        values[SKIPPED_IN_A_ROW] = 0.0
        if policy.refills:
            values[HYSTERESIS_LEFT] = policy.hysteresis
        values[GROWTH_TRACKER] += 1
        if values[GROWTH_TRACKER] >= policy.growth_interval + policy.first_is_free:
            values[GROWTH_TRACKER] = float(policy.first_is_free)
            values[HYSTERESIS_LEFT] = policy.hysteresis
            higher = _fp32(values[SCALE] * policy.growth_factor)
            limited = min(higher, max(values[SCALE], _fp32(policy.max_scale)))
            values[SCALE] = limited if math.isfinite(limited) else values[SCALE]
    state.copy_(torch.tensor(values, dtype=torch.float32))


def _fp32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
