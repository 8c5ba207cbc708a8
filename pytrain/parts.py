"""What takes part in a step: pytrain's optimizers have both passes themselves; here is what steps any other one.

A part has `measure` (pass 1, which returns the control block), `finish` (pass 2, which returns a copy of it), `abandon`
(take pass 1 back), `skipped` (whether pass 2 did nothing) and `done` (the parameters whose averages it has moved).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from pytrain import backend
from pytrain.control import (
    CLIP_COEF,
    CONTROL_HEAD,
    CONTROL_ROW,
    FIRST_BAD,
    FOUND_INF,
    INV_SCALE,
    SUMSQ,
    Between,
    Moving,
    Record,
)
from pytrain.optim.base import FusedOptimizer
from pytrain.optim.slow import sum_squares

if TYPE_CHECKING:
    from pytrain.optim.dtensors import Spread

NOBODY: frozenset[int] = frozenset()


class Shards(Protocol):
    """Other ranks, which hold what this one has not of the parameters that are stepped."""

    def agree_on(self, controls: list[Tensor]) -> None:
        """Have every rank's control blocks tell of all gradients."""

    def publish(self) -> None:
        """Have every rank's parameters be whole."""


class Part(Protocol):
    """An optimizer in a step."""

    settles: bool  # has pass 1 settled the control block too?
    spread: Spread | None  # how DTensors among its parameters lie on the ranks

    def measure(
        self,
        grad_coef: float,
        clip_value: float,
        averages: dict[int, Tensor],
        ema_weight: float,
        between: Between | None,
    ) -> Tensor:
        """Pass 1; it may settle the control block where `between` says how."""

    def finish(self, *, alone: bool, scaler: Moving | None) -> Record:
        """Pass 2; `alone` where nothing has run since pass 1 that could have moved a tensor; it may move the scaler.

        Returns the control block, which no later step changes.
        """

    def abandon(self) -> None:
        """Forget pass 1, if pass 2 has not come."""

    def skipped(self) -> bool | Tensor:
        """Whether pass 2 did nothing; the control block where only its device knows."""

    def done(self) -> frozenset[int]:
        """The ids of the parameters whose averages pass 2 has moved, unless it did nothing."""


def part_of(optimizer: Optimizer, place: int = 0) -> Part:
    """What steps this optimizer, which stands at a place of a list.

    Raises:
        TypeError: it is none.
    """
    if isinstance(optimizer, FusedOptimizer):
        if optimizer.storage.in_backward:
            return Released(optimizer)
        if optimizer.takes_control:
            return optimizer
    elif not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizers[{place}]: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return Foreign(optimizer)


def agreement(parts: Sequence[Part], optimizers: Sequence[Optimizer], shards: Shards | None) -> Shards | None:
    """Who holds the rest of what is stepped: `shards`, or the ranks of the mesh on which DTensors lie.

    Raises:
        ValueError: it would be both, or the meshes have other ranks.
    """
    for part in parts:
        if part.spread is not None:
            from pytrain.optim.dtensors import Meshes

            return Meshes([one.spread for one in parts], optimizers, shards)
    return shards


def blank_control(groups: int, grad_coef: float = 1.0) -> Tensor:
    """The control block of a step in which nothing was found yet."""
    control = torch.zeros(CONTROL_HEAD + CONTROL_ROW * groups, dtype=torch.float64, device="cpu")
    control[INV_SCALE], control[FIRST_BAD] = grad_coef, -1.0
    control[CONTROL_HEAD:].view(-1, CONTROL_ROW)[:, CLIP_COEF] = 1.0
    return control


class Foreign:
    """An optimizer without kernels for the two passes: torch's operations unscale and clip its gradients in place.

    The flag and the norms are read by the host: one wait for the device a step.
    """

    settles = False
    spread: Spread | None = None

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.control = blank_control(len(optimizer.param_groups))
        self.clip_value = 0.0
        if backend.has_dtensors(p for group in optimizer.param_groups for p in group["params"]):
            from pytrain.optim.dtensors import Spread

            self.spread = Spread(optimizer)

    @torch.no_grad()
    def measure(
        self,
        grad_coef: float,
        clip_value: float,
        averages: dict[int, Tensor],
        ema_weight: float,
        between: Between | None = None,
    ) -> Tensor:
        """Pass 1, a tensor at a time."""
        self.clip_value, self.control[INV_SCALE] = clip_value, grad_coef
        number = 0
        for row, group in enumerate(self.optimizer.param_groups):
            total = 0.0
            for param in group["params"]:
                squares = sum_squares(None if param.grad is None else backend.local(param.grad))
                if not math.isnan(squares):
                    total += squares
                elif not self.control[FOUND_INF]:
                    self.control[FOUND_INF], self.control[FIRST_BAD] = 1.0, number
                number += 1
            self.control[CONTROL_HEAD + row * CONTROL_ROW + SUMSQ] = total
        return self.control

    def finish(self, *, alone: bool, scaler: Moving | None = None) -> Tensor:
        """Pass 2: nothing where an inf or nan was found."""
        optimizer, fused = self.optimizer, isinstance(self.optimizer, FusedOptimizer)
        if self.control[FOUND_INF] != 0:
            if fused:
                optimizer.skip()  # type: ignore[attr-defined]
            return self.control
        rows = self.control[CONTROL_HEAD:].view(-1, CONTROL_ROW)
        with torch.no_grad():
            for row, group in zip(rows, optimizer.param_groups, strict=True):
                coef = float(self.control[INV_SCALE] * row[CLIP_COEF])
                self._prepare([param for param in group["params"] if param.grad is not None], coef)
        if self.control[INV_SCALE] > 1.0:  # what the unscaling has made larger may have left fp16
            self.measure(1.0, self.clip_value, {}, 0.0)
            if self.spread is not None:
                agreement([self], [optimizer], None).agree_on([self.control])  # type: ignore[union-attr]
            if self.control[FOUND_INF] != 0:
                return self.finish(alone=alone)
        optimizer.step()
        return self.control

    def _prepare(self, params: list[Tensor], coef: float) -> None:
        """Multiply and clamp gradients in place."""
        if not params or (coef == 1.0 and not self.clip_value):
            return
        values = []
        for param in params:
            grad = param.grad
            assert grad is not None
            if grad.layout == torch.strided and 0 in grad.stride():  # expanded: torch does not write into it
                param.grad = grad = grad.clone(memory_format=torch.contiguous_format)
            if grad.layout == torch.sparse_coo:
                if self.clip_value or grad.dtype == torch.float16:  # whose rows may overflow only when they are summed
                    param.grad = grad = grad.coalesce()
                grad = grad._values()
            values.append(backend.local(grad))
        if coef != 1.0:
            torch._foreach_mul_(values, coef)
        if self.clip_value:
            torch._foreach_clamp_min_(values, -self.clip_value)
            torch._foreach_clamp_max_(values, self.clip_value)

    def abandon(self) -> None:
        """Nothing was begun."""

    def skipped(self) -> bool:
        """As pass 1, or the optimizer, has found."""
        return bool(self.control[FOUND_INF] != 0)

    def done(self) -> frozenset[int]:
        """None."""
        return NOBODY


class Released:
    """An optimizer that steps in backward: its gradients are gone, and what was bad was skipped one by one."""

    settles = False
    spread: Spread | None = None

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        self.control = blank_control(len(optimizer.param_groups))

    def measure(
        self,
        grad_coef: float,
        clip_value: float,
        averages: dict[int, Tensor],
        ema_weight: float,
        between: Between | None = None,
    ) -> Tensor:
        """No pass 1; the norm is unknown.

        Raises:
            ValueError: the step needs all gradients together.
        """
        if grad_coef != 1.0 or clip_value:
            raise ValueError(
                "step_in_backward=True: the gradients were stepped and freed in backward; grad_divisor and clip_value "
                "came too late: leave one of the two out"
            )
        self.control[CONTROL_HEAD:].view(-1, CONTROL_ROW)[:, SUMSQ] = math.nan
        return self.control

    def finish(self, *, alone: bool, scaler: Moving | None = None) -> Tensor:
        """Close the step."""
        self.optimizer.step()
        self.control[FOUND_INF] = float(self.optimizer.step_was_skipped)
        return self.control

    def abandon(self) -> None:
        """Nothing was begun."""

    def skipped(self) -> bool:
        """As pass 1, or the optimizer, has found."""
        return bool(self.control[FOUND_INF] != 0)

    def done(self) -> frozenset[int]:
        """None."""
        return NOBODY
