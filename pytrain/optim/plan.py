"""How an optimizer's parameters are stepped: tables for the kernels, a list for the torch path; cached between steps.

A cache is only used after it was checked: `backend.facts.Watch` compares the objects in param_groups and state with
the remembered ones, and every tensor's address, sizes and strides are read anew each step. Gradients are never kept.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytrain import backend
from pytrain.optim import slow
from pytrain.optim.states import (
    Entry,
    Formats,
    UnfitError,
    check_states,
    conform,
    formats_of,
    lay_out,
    make_all,
    needed,
)
from pytrain.optim.storage import CODES, FORMAT_OF, FORMATS, KEEPS, SCALE

if TYPE_CHECKING:
    from pytrain.optim.base import FusedOptimizer, Rule

CONTROL_HEAD, CONTROL_ROW, CONTROL_HYPERS = 2, 16, 2  # csrc/core/control.h
MAX_STATES = 4  # csrc/core/segment.h
FIT, FINITE, WRITE = 0, 1, 2  # what a call of the kernels is to do: Table::Mode in csrc/ops/table.h
APPLIED, SKIPPED = -1, -2  # what it says; a number from 0 on is the first parameter that does not fit


@dataclass
class Plan:
    """The parameters of one rule, dtype and storage format, and the number of their table in the kernel library."""

    rule: Rule
    formats: Formats
    entries: list[Entry] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # counts of a rule whose state has none
    params: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)  # what shares its autograd version with the states
    touched: list[Tensor] = field(default_factory=list)  # params and bases
    pairs: Tensor | None = None  # memory for what `backend.reader` finds, or None to pass lists of tensors
    address: int = 0  # of that memory
    table: int = 0

    def finish(self, optimizer: FusedOptimizer) -> None:
        """Hand the states over to the kernel library."""
        rule, formats, storage = self.rule, self.formats, optimizer.storage
        held = [optimizer.state.get(entry.param, {}) for entry in self.entries]
        kinds = list(zip(rule.states, formats.states, strict=True))
        states = [state[name] for state in held for name in rule.states]
        scales = [state[name + SCALE] for state in held for name, kind in kinds if kind in CODES]
        kept = [state[formats.keep] for state in held] if formats.keep else []
        emas = [state["ema"] for state in held] if formats.ema else []
        scalars = [state[name] for state in held for name in rule.scalars]
        if optimizer.counts_steps:
            self.steps = [state["step"] for state in held]
        everything = (*states, *scales, *kept, *emas, *scalars, *self.steps)
        self.params = [entry.param for entry in self.entries]
        self.bases = list({id(base): base for base in (s if s._base is None else s._base for s in everything)}.values())
        self.touched = self.params + self.bases
        words = [FORMATS.index(FORMAT_OF[self.params[0].dtype])]
        words += [FORMATS.index(kind) for kind in formats.states] + [words[0]] * (MAX_STATES - len(formats.states))
        words += [KEEPS.index(formats.keep), formats.ema, storage.zero_grad, storage.stochastic, storage.seed]
        groups = [entry.group for entry in self.entries]
        numbers = [entry.number for entry in self.entries]
        self.table = torch.ops.pytrain._table(
            rule.name, states, scales, kept, emas, scalars, self.steps, groups, numbers, words
        )
        if backend.facts and backend.reader:
            self.pairs = torch.empty(len(self.params) * backend.facts.pair_words, dtype=torch.int64, device="cpu")
            self.address = self.pairs.data_ptr()


@dataclass(frozen=True)
class Slow:
    """A parameter on the torch path, and why."""

    entry: Entry
    reason: str


Work = tuple[Plan, list[Tensor], list[Tensor], list[int]]  # a plan, and its params, grads and rows in this step


class Settled:
    """All plans of an optimizer, and what they were made of."""

    def __init__(
        self,
        optimizer: FusedOptimizer,
        plans: list[Plan],
        slow: list[Slow],
        waiting: list[Tensor],
        fresh: list[Tensor],
    ) -> None:
        self.plans, self.slow, self.waiting, self.fresh = plans, slow, waiting, fresh
        for plan in plans:
            plan.finish(optimizer)
        if plans:
            weakref.finalize(self, _free, [plan.table for plan in plans]).atexit = False
        self.coded = any(plan.formats.coded for plan in plans) or any(one.entry.formats.coded for one in slow)
        groups = optimizer.param_groups
        self.rules = [optimizer.rule(group) for group in groups]
        self.fused = [group.get("fused") for group in groups]
        self.hypers: list[tuple[float, ...]] = [() for _ in groups]
        self.control = torch.zeros(CONTROL_HEAD + CONTROL_ROW * len(groups), dtype=torch.float64, device="cpu")
        self.block = self.control.numpy()
        self.rows = self.block[CONTROL_HEAD:].reshape(len(groups), CONTROL_ROW)
        self.rows[:, 1] = 1.0 - (optimizer.storage.ema_decay or 0.0)
        self.read_hypers(optimizer)
        self.watch = backend.facts.Watch(groups, optimizer.state) if backend.facts else None

    def forget(self, optimizer: FusedOptimizer) -> None:
        """Take back the state that was made for a step that then could not be done."""
        for param in self.fresh:
            optimizer.state.pop(param, None)

    def is_current(self, optimizer: FusedOptimizer) -> bool:
        """Whether parameters and state are still the same objects; takes over changed hyperparameters."""
        if self.watch is None:
            return False
        found: int = self.watch.check(optimizer.param_groups, optimizer.state)
        return found == 0 or (found == 1 and self.read_hypers(optimizer))

    def read_hypers(self, optimizer: FusedOptimizer) -> bool:
        """Write changed hyperparameters into the control block; False if a group now takes another rule or backend."""
        for i, group in enumerate(optimizer.param_groups):
            if optimizer.rule(group) is not self.rules[i] or group.get("fused") != self.fused[i]:
                return False
            hyper = (-1.0 if group["maximize"] else 1.0, *map(float, optimizer.hyper(group)))
            if hyper != self.hypers[i]:
                self.hypers[i] = hyper
                self.rows[i, 0] = hyper[0]
                self.rows[i, CONTROL_HYPERS : CONTROL_HYPERS + len(hyper) - 1] = hyper[1:]
        return True

    def run(self, optimizer: FusedOptimizer, inv_scale: float, *, last_try: bool = False) -> int:
        """Step everything: APPLIED; SKIPPED where an inf or nan would enter 8-bit state; or, where a tensor does not
        fit what was settled, a number from 0 on. In the last two cases nothing was written.

        Raises:
            UnfitError: a tensor does not fit on the last try; with the parameter's place and the reason.
        """
        facts = backend.facts
        if facts is not None and self.waiting and facts.collect(self.waiting, "grad")[0]:
            return 0
        work: list[Work] = []
        for plan in self.plans:
            assert facts is not None
            if plan.pairs is None:
                grads, rows = facts.collect(plan.params, "grad")
            else:
                grads, rows = backend.reader.gather(plan.params, plan.address)
            if grads:
                work.append((plan, [plan.params[k] for k in rows] if rows else plan.params, grads, rows))
        for other in self.slow:
            slow.check(optimizer, other.entry)
        self.block[0] = inv_scale
        if self.coded or len(work) + bool(self.slow) > 1:
            found = [self.call(one, last_try, FINITE if self.coded else FIT) for one in work]
            if any(code >= 0 for code in found):
                return 0
            if self.coded and (SKIPPED in found or not all(slow.is_finite(other.entry) for other in self.slow)):
                return SKIPPED
        for one in work:
            if self.call(one, last_try, WRITE) >= 0:
                return 0
        for other in self.slow:
            slow.step(optimizer, other.entry, self.hypers[other.entry.group], inv_scale)
        return APPLIED

    def call(self, work: Work, last_try: bool, mode: int) -> int:
        """Call the kernels over one plan."""
        plan, params, grads, rows = work
        code = 0
        if plan.pairs is not None:
            op = torch.ops.pytrain._table_step_pairs.default
            code = op(plan.table, plan.pairs, len(grads), rows, self.control, mode)
            if code >= 0:  # something needs a copy first, or does not fit: from now on pass the tensors
                plan.pairs = None
        if plan.pairs is None:
            code = self.call_with_lists(work, last_try, mode)
        if code == APPLIED and mode == WRITE:
            torch.autograd.graph.increment_version(params + plan.bases if rows else plan.touched)
        return code

    @torch.no_grad()
    def call_with_lists(self, work: Work, last_try: bool, mode: int) -> int:
        """The same by lists of tensors: slower, but it copies what lies unlike its parameter, and explains a misfit."""
        plan, params, grads, rows = work
        op = torch.ops.pytrain._table_step.default
        code: int = op(plan.table, params, grads, rows, self.control, mode, False)
        if code >= 0 and last_try:
            where = plan.entries[rows[code] if rows else code].where
            try:
                op(plan.table, params, grads, rows, self.control, mode, True)
            except RuntimeError as error:
                reason = str(error).splitlines()[0].partition(f"{plan.rule.name}_: ")[2]
                raise UnfitError(f"{where}: {reason}") from None
        return code


@torch.no_grad()
def settle(optimizer: FusedOptimizer) -> Settled:
    """Decide the backend of every parameter, make its state complete and well laid out, and build the tables.

    Raises:
        BackendError: the kernels were demanded and cannot take a parameter.
        UnfitError: a state has a shape or a device unlike its parameter's.
    """
    plans: dict[tuple[str, torch.dtype, Formats], Plan] = {}
    slow_ones: list[Slow] = []
    waiting: list[Tensor] = []
    fresh: list[Tensor] = []
    listed: set[int] = set()
    number = -1
    for index, group in enumerate(optimizer.param_groups):
        rule = optimizer.rule(group)
        for i, param in enumerate(group["params"]):
            number += 1
            if id(param) in listed:  # torch warned of it; a parameter is stepped once
                continue
            listed.add(id(param))
            where = f"{type(optimizer).__name__}: param_groups[{index}]['params'][{i}]"
            optimizer.storage.check_param(param, where)
            state = optimizer.state.get(param, {})
            formats = formats_of(optimizer, rule, param)
            entry = Entry(param, index, group, number, where, rule, formats)
            keys = needed(optimizer, rule, formats)
            complete = all(state.get(name) is not None for name in keys)
            expected = param.requires_grad and (complete or optimizer.storage.in_backward)
            if param.grad is None and not expected:
                waiting.append(param)
                continue
            check_states(state, param, rule, where)
            reason = _why_slow(param, group)
            if reason:
                optimizer.warn_once(reason)
            if reason is not None:
                slow.check_disjoint(param, where)
                slow_ones.append(Slow(entry, reason or backend.select(param, fused=False).reason))
                continue
            if not state:
                fresh.append(param)
            plan = plans.setdefault((rule.name, param.dtype, formats), Plan(rule, formats))
            plan.entries.append(entry)
            if rule.counts and not optimizer.counts_steps:  # only the first step differs, and it finds no state
                plan.steps.append(torch.tensor(1.0 if complete else 0.0, dtype=torch.float32, device="cpu"))
    entries = [entry for plan in plans.values() for entry in plan.entries]
    for entry in entries:
        conform(optimizer, entry)
    make_all(optimizer, entries)
    seen: set[int] = set()
    for entry in entries:
        lay_out(optimizer, entry, seen)
    return Settled(optimizer, list(plans.values()), slow_ones, waiting, fresh)


def _why_slow(param: Tensor, group: dict[str, object]) -> str | None:
    """None for the kernels; "" for the torch path because it was asked for; else the reason for the torch path."""
    fused = group.get("fused")
    choice = backend.select(param, fused=None if fused is None else bool(fused))
    if choice.backend == "torch":
        return "" if choice.reason in backend.ASKED_FOR else choice.reason
    grad = param.grad
    if grad is not None and grad.layout != torch.strided:
        if backend.wanted() == "native" or fused:
            raise backend.BackendError(f"the kernels do not take gradients of layout {grad.layout}; leave fused unset")
        return f"there are no kernels for gradients of layout {grad.layout}"
    return None


def _free(tables: list[int]) -> None:
    for table in tables:
        torch.ops.pytrain._table_free(table)
