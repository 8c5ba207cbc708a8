"""Gradient release: step each parameter as its gradient arrives in backward, and free the gradient at once.

Lv et al. 2023, Full Parameter Fine-tuning for Large Language Models with Limited Resources (arXiv:2306.09782): the
gradients of a model never stand in memory together. What needs them together cannot be had: see `Release.check_step`.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytrain.control import APPLIED, FOUND_INF, SKIPPED, STATS, WRITE
from pytrain.optim import slow
from pytrain.optim.plan import Settled, settle
from pytrain.optim.states import Plan

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from pytrain.optim.base import FusedOptimizer


class Release:
    """The hooks of one optimizer, and which parameters this backward has stepped."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.hooks: dict[int, RemovableHandle] = {}
        self.stepped: set[int] = set()
        self.rows: dict[int, tuple[Plan, int]] = {}
        self.settled: Settled | None = None
        self.skipped = False
        self.flags: list[Tensor] = []  # of parameters on devices that the host has not asked yet

    def watch(self, params: list[Tensor]) -> None:
        """Step these parameters from now on as soon as they have a gradient."""
        for param in params:
            if param.requires_grad and id(param) not in self.hooks:
                register: Any = param.register_post_accumulate_grad_hook
                self.hooks[id(param)] = register(self.arrived)

    def check_step(self) -> None:
        """Raise RuntimeError where `step` comes from a loss scaler: the scaled gradients have been stepped already."""
        optimizer = self.optimizer()
        if getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "step_in_backward=True: the parameters were stepped in backward, with gradients that were still "
                "scaled; train in bfloat16, or without step_in_backward"
            )

    def finish(self) -> None:
        """The step of this backward is complete."""
        self.stepped.clear()
        self.skipped = False
        self.flags.clear()

    def any_skipped(self) -> bool:
        """Whether this backward has left out a parameter; waits for its device where that has not told yet."""
        return self.skipped or any(bool(flag != 0) for flag in self.flags)

    @torch.no_grad()
    def arrived(self, param: Tensor) -> None:
        """Step a parameter and free its gradient.

        Raises:
            RuntimeError: its gradient came twice without a `step` between.
        """
        optimizer = self.optimizer()
        if optimizer is None or param.grad is None:
            return
        if id(param) in self.stepped:
            raise RuntimeError(
                f"step_in_backward=True: a second gradient of shape {tuple(param.shape)} arrived before step(). "
                "Gradients cannot be accumulated once they are stepped and freed: call optimizer.step() after every "
                "backward, use a larger batch instead of accumulation, and use_reentrant=False in checkpointing"
            )
        if not self.stepped:
            self.begin(optimizer)
        self.stepped.add(id(param))
        self.skipped |= self.step_one(optimizer, param) == SKIPPED
        param.grad = None

    def begin(self, optimizer: FusedOptimizer) -> None:
        """Look, once a backward, whether parameters, state and hyperparameters are what they were."""
        if self.settled is None or not self.settled.is_current(optimizer):
            self.settled = settle(optimizer)
            self.rows = {id(p): (plan, k) for plan in self.settled.plans for k, p in enumerate(plan.params)}
            for plan in self.settled.plans:
                plan.pairs = None
        self.settled.begin(1.0)

    def step_one(self, optimizer: FusedOptimizer, param: Tensor) -> int:
        settled, grad = self.settled, param.grad
        assert settled is not None and grad is not None
        if id(param) in self.rows:
            plan, k = self.rows[id(param)]
            work = plan, [param], [grad], [k]
            if settled.coded:
                settled.begin(1.0)  # each parameter is skipped by itself
                code = settled.call(work, True, STATS)
                if plan.device in settled.remote:
                    self.flags += [settled.remote[plan.device][FOUND_INF].clone()]
                elif code == SKIPPED or settled.block[FOUND_INF]:
                    return SKIPPED
            return settled.call(work, True, WRITE)
        entry = next(other.entry for other in settled.slow if other.entry.param is param)
        slow.check(optimizer, entry)
        if entry.formats.coded and not math.isfinite(slow.sum_squares(grad)):
            return SKIPPED
        slow.step(optimizer, entry, settled.hypers[entry.group], slow.Asked())
        return APPLIED
