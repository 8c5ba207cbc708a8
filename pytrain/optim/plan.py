"""How an optimizer's parameters are stepped: tables for the kernels, a list for the torch path; cached between steps.

A cache is only used after it was checked: `backend.facts.watch` compares the objects in param_groups and state with
the remembered ones, and every tensor's address, sizes and strides are read anew each step. Gradients are never kept.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytrain import backend
from pytrain.control import (
    ABSENT,
    APPLIED,
    CLIP_COEF,
    CLIP_VALUE,
    CONTROL_HEAD,
    CONTROL_HYPERS,
    CONTROL_ROW,
    EMA_WEIGHT,
    FIRST_BAD,
    FIT,
    FOUND_INF,
    GRAD_SIGN,
    INV_SCALE,
    NO_SCALE,
    NOT_ALL,
    NOTHING,
    SETTLE,
    SKIPPED,
    STATS,
    SUMS,
    SUMSQ,
    WRITE,
    WRITE_FITTED,
    Besides,
    Between,
    Moving,
    Record,
)
from pytrain.optim import slow
from pytrain.optim.states import (
    Entry,
    Formats,
    Plan,
    UnfitError,
    check_states,
    conform,
    formats_of,
    lay_out,
    make_all,
    needed,
    one_number,
)

if TYPE_CHECKING:
    from pytrain.optim.base import FusedOptimizer

Work = tuple[Plan, list[Tensor], list[Tensor], list[int]]  # a plan, and its params, grads and rows in this step


class Settled:
    """All plans of an optimizer, and what they were made of."""

    def __init__(
        self,
        optimizer: FusedOptimizer,
        plans: list[Plan],
        slow: list[slow.Slow],
        waiting: list[Tensor],
        fresh: list[Tensor],
    ) -> None:
        self.plans, self.slow, self.waiting, self.fresh = plans, slow, waiting, fresh
        for plan in plans:
            plan.finish(optimizer)
        blocks: list[Tensor] = []
        if plans:
            tables, owner = [plan.table for plan in plans], weakref.ref(optimizer)
            weakref.finalize(self, _free, tables, blocks, owner).atexit = False
        self.coded = any(plan.formats.coded for plan in plans) or any(one.entry.formats.coded for one in slow)
        groups = optimizer.param_groups
        self.rules = [optimizer.rule(group) for group in groups]
        self.fused = [group.get("fused") for group in groups]
        self.hypers: list[tuple[float, ...]] = [() for _ in groups]
        self.given = torch.zeros(CONTROL_HEAD + CONTROL_ROW * len(groups), dtype=torch.float64, device="cpu")
        self.block, self.address = self.given.numpy(), self.given.data_ptr()
        self.seen, self.numbers, self.n_rows = self.block.data, len(self.block), len(groups)
        devices = {plan.device for plan in plans}
        # Control blocks that the host cannot look into; `given` is what it has written to them.
        self.remote = {device: self.given.to(device, copy=True) for device in devices if backend.is_remote(device)}
        blocks += self.remote.values()
        self.unbegun: set[torch.device] = set()  # whose control block does not know of this step yet
        self.merges = bool(self.remote) and (len(devices) > 1 or bool(slow))  # all are read into `given` after pass 1
        self.merged = False
        # Does the host need to know each number itself, for the torch path or the CPU's kernels?
        self.here = all(map(backend.is_here, devices)) and backend.facts is not None  # what settles is in host memory
        self.reads = bool(slow) or len(self.remote) < len(devices)
        self.placed: list[tuple[int, Tensor]] = []  # numbers that only a device knows, and their places in the block
        # Where one launch a pass may be all of a step, and whether pass 1 has settled the control block in its own.
        self.home = next(iter(devices)) if len(devices) == 1 and not slow and backend.launches(*devices) else None
        self.settled = False
        self.moving: Tensor | None = None  # the scaler's state, where pass 1 has found where that is to move
        self.control = self.given if self.merges or not self.remote else next(iter(self.remote.values()))
        self.rows = self.block[CONTROL_HEAD:].reshape(len(groups), CONTROL_ROW)
        self.own_weight = 0.0 if optimizer.storage.ema_decay is None else 1.0 - optimizer.storage.ema_decay
        self.work: list[Work] = []
        self.averaged: frozenset[int] = frozenset()
        self.read_hypers(optimizer)
        self.watch = backend.facts.watch(groups, optimizer.state) if backend.facts else None

    def forget(self, optimizer: FusedOptimizer) -> None:
        """Take back the state that was made for a step that then could not be done."""
        for param in self.fresh:
            optimizer.state.pop(param, None)

    def is_current(self, optimizer: FusedOptimizer) -> bool:
        """Whether parameters and state are still the same objects; takes over changed hyperparameters."""
        if self.watch is None:
            return False
        found: int = backend.facts.check(self.watch, optimizer.param_groups, optimizer.state)
        return found == 0 or (found == 1 and self.read_hypers(optimizer))

    def read_hypers(self, optimizer: FusedOptimizer) -> bool:
        """Write changed hyperparameters into the control block; False if a group now takes another rule or backend.

        Raises:
            ValueError: a tensor on a device is not one real number.
        """
        placed: list[tuple[int, Tensor]] = []
        for i, group in enumerate(optimizer.param_groups):
            if optimizer.rule(group) is not self.rules[i] or group.get("fused") != self.fused[i]:
                return False
            row = CONTROL_HEAD + CONTROL_ROW * i + CONTROL_HYPERS
            numbers = []
            for k, value in enumerate(optimizer.hyper(group)):
                if isinstance(value, Tensor) and not self.reads and backend.is_remote(value.device):
                    placed.append((row + k, one_number(value, optimizer, i, self.rules[i].hypers[k])))
                    value = 0.0  # until the device has its own
                numbers.append(float(value))
            hyper = (-1.0 if group["maximize"] else 1.0, *numbers)
            if hyper != self.hypers[i]:
                self.hypers[i] = hyper
                self.rows[i, GRAD_SIGN] = hyper[0]
                self.rows[i, CONTROL_HYPERS : CONTROL_HYPERS + len(hyper) - 1] = hyper[1:]
        self.placed = placed
        return True

    def begin(self, grad_coef: float, clip_value: float = 0.0, ema_weight: float = 0.0) -> None:
        """Set the control block for a step whose gradients were not looked at yet."""
        weight = self.own_weight or ema_weight
        if backend.facts is not None:
            backend.facts.begin(self.address, self.n_rows, grad_coef, clip_value, weight)
        else:
            self.block[:CONTROL_HEAD] = (grad_coef, 0.0, clip_value, 0.0, -1.0)
            self.rows[:, EMA_WEIGHT : SUMSQ + 1] = (weight, 1.0, 0.0)
        self.unbegun, self.merged = set(self.remote), False
        if self.placed:
            self.upload(self.remote)

    def upload(self, devices: Iterable[torch.device]) -> None:
        """Have the control blocks of devices be `given`, and numbers that only a device knows in their places there.

        Nothing waits, and a graph that captures this takes those numbers as they are when it is replayed.
        """
        for device in devices:
            block = self.remote[device]
            torch.ops.pytrain._upload.default(block, self.given)
            for place, value in self.placed:
                block[place].copy_(value, non_blocking=True)
        self.unbegun = self.unbegun.difference(devices)

    def gather(self, optimizer: FusedOptimizer, first: int = WRITE) -> bool:
        """Find the gradients of this step; False where a parameter has one for the first time.

        Args:
            first: what they are wanted for next. FIT and STATS may be done while they are found; `Plan.found` then has
                what came of it.
        """
        facts = backend.facts
        if facts is not None and self.waiting and facts.collect(self.waiting, "grad")[0]:
            return False
        work: list[Work] = []
        if self.merges:
            first = WRITE  # a device takes the control block over before there are sums in it
        for plan in self.plans:
            assert facts is not None
            plan.found = NOT_ALL
            if plan.pairs is None:
                grads, rows = facts.collect(plan.params, "grad")
            elif first < WRITE and plan.here and not backend.is_profiling():
                grads, rows, plan.found = backend.facts.gather(
                    backend.reader, plan.params, plan.table, plan.address, self.address, self.numbers, first
                )
            else:
                grads, rows = backend.reader.gather(plan.params, plan.address)
            if grads and plan.found not in (APPLIED, SKIPPED):
                first = WRITE  # sums are added in the order of the plans
            if grads:
                work += [(plan, [plan.params[k] for k in rows] if rows else plan.params, grads, rows)]
        for other in self.slow:
            slow.check(optimizer, other.entry)
        self.work = work
        return True

    def run(
        self,
        optimizer: FusedOptimizer,
        grad_coef: float,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        *,
        last_try: bool = False,
    ) -> int:
        """Step everything: APPLIED; SKIPPED where an inf or nan would enter 8-bit state; or, where a tensor does not
        fit what was settled, a number from 0 on. In the last two cases nothing was written.

        Raises:
            UnfitError: a tensor does not fit on the last try; with the parameter's place and the reason.
        """
        self.begin(grad_coef)
        if not self.gather(optimizer, STATS if self.coded else FIT):
            return 0
        fitted = all(one[0].found in (APPLIED, SKIPPED) for one in self.work)
        if self.coded:
            code = self.stats(last_try)
            if code != APPLIED:
                return code
        elif len(self.work) + bool(self.slow) > 1 and any(self.call(one, last_try, FIT) >= 0 for one in self.work):
            return 0
        if found_inf is not None or grad_scale is not None:
            self.take_flags(found_inf, grad_scale)
        return self.write(optimizer, last_try, WRITE_FITTED if fitted else WRITE)

    def take_flags(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Have a torch GradScaler's flag and scale in the control blocks; no wait where there is one device."""
        if self.remote and not self.merged:
            self.read_remote()
        blocks = [self.given] if self.merges or not self.remote else list(self.remote.values())
        for block in blocks:
            if grad_scale is not None:
                block[INV_SCALE] /= _beside(block, grad_scale)
            if found_inf is not None:
                block[FOUND_INF] += _beside(block, found_inf)

    def stats(self, last_try: bool, between: Between | None = None) -> int:
        """Pass 1, over gathered gradients: into the control block; APPLIED, SKIPPED or a number as `run` gives it.

        Args:
            between: what may follow from it in the same launch; see `settled`.
        """
        misfit = self.settled = False
        mode: int = STATS
        besides: Besides | tuple[()] = NOTHING
        if between is not None and self.home is not None and self.work and self.work[0] is self.work[-1]:
            scaler, _, groups, norms = between
            if scaler is None:
                mode, besides = SETTLE, (None, groups, norms, NOTHING)
            elif scaler.current.device == self.home:
                mode, besides = SETTLE, scaler.lend(between)
        for one in sorted(self.work, key=lambda one: one[0].here) if self.merges else self.work:
            misfit |= self.call(one, last_try, mode, besides) >= 0
        if misfit:
            return 0
        self.settled = mode == SETTLE
        self.moving = besides[0] if besides and besides[3] else None
        if self.remote:
            self.read_remote()
        for other in self.slow:
            entry = other.entry
            sum_squares = slow.sum_squares(entry.param.grad)
            if math.isnan(sum_squares):
                first = self.block[FIRST_BAD]
                self.block[FOUND_INF] = 1.0
                self.block[FIRST_BAD] = entry.cut.number if first < 0 else min(first, entry.cut.number)
            else:
                self.rows[entry.group, SUMSQ] += sum_squares
        if between is not None and self.here:
            scaler, _, groups, norms = between
            scale = NO_SCALE if scaler is None else scaler.place
            if scale:
                backend.facts.settle([(self.address, self.n_rows)], scale, (scaler is not None,), groups, norms)
                self.settled = True
        return SKIPPED if self.seen[FOUND_INF] else APPLIED

    def read_remote(self) -> None:
        """Have what pass 1 has found where `control` is; a device without gradients has found nothing."""
        if not self.merges:
            self.upload(self.unbegun)
            return
        for device in self.remote.keys() - self.unbegun:
            found = self.remote[device].cpu().numpy()
            self.block[FOUND_INF] = max(self.block[FOUND_INF], found[FOUND_INF])
            if found[FIRST_BAD] >= 0:
                first = self.block[FIRST_BAD]
                self.block[FIRST_BAD] = found[FIRST_BAD] if first < 0 else min(first, found[FIRST_BAD])
            self.rows[:, SUMSQ] += found[CONTROL_HEAD:].reshape(self.rows.shape)[:, SUMSQ]
        self.merged = True

    def write(self, optimizer: FusedOptimizer, last_try: bool, mode: int = WRITE, scaler: Moving | None = None) -> int:
        """Pass 2, over gathered gradients, as the control block says; lets go of them.

        Args:
            scaler: what moves in the same launch, where pass 1 has settled the control block.
        """
        if self.seen[FOUND_INF]:
            self.work = []
            return SKIPPED
        if self.merged:
            self.upload(self.remote)
        besides: Besides | tuple[()] = NOTHING
        if scaler is not None and self.settled and self.moving is not None:
            besides = (self.moving, [], [], NOTHING)
        if optimizer.join_sums is not None:
            summing = [one for one in self.work if one[0].sums]
            if any(self.call(one, last_try, SUMS) >= 0 for one in summing):
                return 0
            optimizer.join_sums([one[0].sums_of(one[3]) for one in summing])
        for one in self.work:
            if self.call(one, last_try, mode, besides) >= 0:
                return 0
        if besides and scaler is not None:
            scaler.moved = True
        head = self.block
        for other in self.slow:
            entry, row = other.entry, self.rows[other.entry.group]
            coef = float(head[INV_SCALE] * row[CLIP_COEF])
            slow.step(optimizer, entry, self.hypers[entry.group], slow.Asked(coef, head[CLIP_VALUE], row[EMA_WEIGHT]))
        if optimizer.averages:
            self.note_averaged()
        if self.fresh:
            self.fresh.clear()
        self.work = []
        return APPLIED

    def record(self) -> Record:
        """A copy of the control block, in the host's memory where that has it."""
        return self.control.clone() if self.remote and not self.merges else bytearray(self.seen)

    def note_averaged(self) -> None:
        """Remember whose lent averages this step has moved: in the same object while it is the same parameters."""
        ids: frozenset[int] = frozenset()
        for plan, params, _, rows in self.work:
            if plan.averaged:
                moved = plan.averaged if not rows else frozenset(map(id, params))
                ids = ids | moved if ids else moved
        if self.slow:
            entries = [other.entry for other in self.slow if other.entry.formats.ema == "lent"]
            ids |= {id(entry.param) for entry in entries if entry.param.grad is not None}
        if ids is not self.averaged and ids != self.averaged:
            self.averaged = ids

    def call(self, work: Work, last_try: bool, mode: int, besides: Besides | tuple[()] = NOTHING) -> int:
        """Call the kernels over one plan."""
        plan, params, grads, rows = work
        if mode < SUMS and plan.found in (APPLIED, SKIPPED):  # done already
            code, plan.found = plan.found, NOT_ALL
            return code
        written: list[Tensor] | None = None  # what autograd has been told of
        if plan.pairs is not None:
            if plan.here and not backend.is_profiling():
                written = plan.written(params, rows) if mode == WRITE_FITTED else None  # which is sure to write
                place, numbers = self.address, self.numbers
                code = backend.facts.step(plan.table, plan.address, len(grads), rows, place, numbers, mode, written)
            else:
                code = self.call_op(work, mode, besides)
            if code >= 0:  # something needs a copy first, or does not fit: from now on pass the tensors
                plan.pairs = written = None
        if plan.pairs is None:
            code = self.call_with_lists(work, last_try, mode, besides)
        if self.unbegun and mode in (STATS, SETTLE) and code < 0:
            self.unbegun.discard(plan.device)
        if code == APPLIED and mode >= WRITE and written is None:
            torch.autograd.graph.increment_version(plan.written(params, rows))
        return code

    def call_op(self, work: Work, mode: int, besides: Besides | tuple[()]) -> int:
        """The same by an op, which launches on a device, and shows in a profile."""
        plan, _, grads, rows = work
        ops = torch.ops.pytrain
        op = ops._table_launch_pairs.default if besides else ops._table_step_pairs.default
        control = self.remote.get(plan.device, self.given) if self.remote else self.given
        fresh = bool(self.unbegun) and plan.device in self.unbegun
        given = ABSENT if self.placed else self.given
        code: int = op(plan.table, plan.pairs, len(grads), rows, control, given, fresh, mode, *besides)
        return code

    @torch.no_grad()
    def call_with_lists(self, work: Work, last_try: bool, mode: int, besides: Besides | tuple[()] = NOTHING) -> int:
        """The same by lists of tensors: slower, but it copies what lies unlike its parameter, and explains a misfit."""
        plan, params, grads, rows = work
        ops = torch.ops.pytrain
        op = ops._table_launch.default if besides else ops._table_step.default
        mode = min(mode, WRITE)
        control, fresh = self.remote.get(plan.device, self.given), plan.device in self.unbegun
        given = ABSENT if self.placed else self.given
        code: int = op(plan.table, params, grads, rows, control, given, fresh, mode, False, *besides)
        if code >= 0 and last_try:
            where = plan.entries[rows[code] if rows else code].where
            try:
                op(plan.table, params, grads, rows, control, given, fresh, mode, True, *besides)
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
    plans: dict[tuple[str, torch.dtype, torch.device, Formats], Plan] = {}
    slow_ones: list[slow.Slow] = []
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
            reason = backend.why_slow(param, group)
            if reason:
                optimizer.warn_once(reason)
            if reason is not None:
                slow.check_param(optimizer, entry)
                slow_ones.append(slow.Slow(entry, reason or backend.select(param, fused=False).reason))
                continue
            if not state:
                fresh.append(param)
            plan = plans.setdefault((rule.name, param.dtype, param.device, formats), Plan(rule, formats))
            plan.entries.append(entry)
            if rule.counts and not optimizer.counts_steps:  # only the first step differs, and it finds no state
                begin = torch.tensor(1.0 if complete else 0.0, dtype=torch.float32)
                plan.steps.append(begin.to(backend.home_of_numbers(param)))
    for _, _, device, _ in plans:
        if backend.is_capturing(device):
            raise RuntimeError(
                f"{type(optimizer).__name__}: a graph is being captured on device {device}, but the state or the "
                "tables of the parameters that have gradients now are not there yet; step once before the capture, "
                "with gradients for the same parameters"
            )
    entries = [entry for plan in plans.values() for entry in plan.entries]
    for entry in entries:
        conform(optimizer, entry)
    make_all(optimizer, entries)
    seen: set[int] = set()
    for entry in entries:
        lay_out(optimizer, entry, seen)
    return Settled(optimizer, list(plans.values()), slow_ones, waiting, fresh)


def _beside(block: Tensor, value: Tensor) -> Tensor:
    return (value if value.device == block.device else value.to(block.device)).view(())


def _free(tables: list[int], blocks: list[Tensor], owner: weakref.ref[FusedOptimizer]) -> None:
    """Let go of tables and control blocks; with their optimizer where a graph may still read and write them."""
    optimizer = owner()
    if optimizer is not None and any(torch.ops.pytrain._table_captured(table) for table in tables):
        weakref.finalize(optimizer, _free, tables, blocks, owner).atexit = False
        return
    for table in tables:
        torch.ops.pytrain._table_free(table)
