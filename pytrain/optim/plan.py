"""How an optimizer's parameters are stepped: tables for the kernels, a list for the torch path; cached between steps.

A cache is only used after it was checked: `backend.facts.Watch` compares the objects in param_groups and state with
the remembered ones, and every tensor's address, sizes and strides are read anew each step. Gradients are never kept.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytrain import backend

if TYPE_CHECKING:
    from pytrain.optim.base import FusedOptimizer, Rule

CONTROL_HEAD, CONTROL_ROW, CONTROL_HYPERS = 2, 16, 2  # csrc/core/control.h
SMALL, BLOCK_BYTES = 16384, 2**20  # states of up to so many elements share blocks of up to so many bytes
LOW_PRECISION = (torch.bfloat16, torch.float16)


class UnfitError(ValueError):
    """A parameter, gradient or state that cannot be stepped; nothing was written."""


@dataclass
class Plan:
    """The parameters of one rule and dtype, and the number of their table in the kernel library."""

    rule: Rule
    params: list[Tensor] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)  # what shares its autograd version with the states
    touched: list[Tensor] = field(default_factory=list)  # params and bases
    pairs: Tensor | None = None  # memory for what `backend.reader` finds, or None to pass lists of tensors
    address: int = 0  # of that memory
    table: int = 0

    def finish(self) -> None:
        """Hand the states over to the kernel library."""
        flat = [state for row in self.states for state in row]
        bases = [state if state._base is None else state._base for state in (*flat, *self.steps)]
        self.bases = list({id(base): base for base in bases}.values())
        self.touched = self.params + self.bases
        self.table = torch.ops.pytrain._table(self.rule.name, flat, self.steps, self.groups)
        if backend.facts and backend.reader:
            self.pairs = torch.empty(len(self.params) * backend.facts.pair_words, dtype=torch.int64, device="cpu")
            self.address = self.pairs.data_ptr()


@dataclass(frozen=True)
class Slow:
    """A parameter on the torch path."""

    param: Tensor
    group: int
    rule: Rule
    where: str
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
            plan.finish()
        if plans:
            weakref.finalize(self, _free, [plan.table for plan in plans]).atexit = False
        groups = optimizer.param_groups
        self.rules = [optimizer.rule(group) for group in groups]
        self.fused = [group.get("fused") for group in groups]
        self.hypers: list[tuple[float, ...]] = [() for _ in groups]
        self.control = torch.zeros(CONTROL_HEAD + CONTROL_ROW * len(groups), dtype=torch.float64, device="cpu")
        self.block = self.control.numpy()
        self.rows = self.block[CONTROL_HEAD:].reshape(len(groups), CONTROL_ROW)
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

    def run(self, optimizer: FusedOptimizer, inv_scale: float, *, last_try: bool = False) -> bool:
        """Step everything; False, with nothing written, where a tensor does not fit what was settled.

        Raises:
            UnfitError: the same on the last try, with the parameter's place and the reason.
        """
        facts = backend.facts
        if facts is not None and self.waiting and facts.collect(self.waiting, "grad")[0]:
            return False
        work: list[Work] = []
        for plan in self.plans:
            assert facts is not None
            if plan.pairs is None:
                grads, rows = facts.collect(plan.params, "grad")
            else:
                grads, rows = backend.reader.gather(plan.params, plan.address)
            if grads:
                work.append((plan, [plan.params[k] for k in rows] if rows else plan.params, grads, rows))
        for slow in self.slow:
            _check_slow(optimizer, slow)
        if len(work) + bool(self.slow) > 1 and not all(self.call(w, last_try, write=False) for w in work):
            return False
        self.block[0] = inv_scale
        for one in work:
            if not self.call(one, last_try, write=True):
                return False
        for slow in self.slow:
            self.run_slow(optimizer, slow, inv_scale)
        return True

    def call(self, work: Work, last_try: bool, *, write: bool) -> bool:
        """Check (and, with `write`, step) one plan by the kernels."""
        plan, params, grads, rows = work
        unfit = 0
        if plan.pairs is not None:
            op = torch.ops.pytrain._table_step_pairs.default
            unfit = op(plan.table, plan.pairs, len(grads), rows, self.control, write)
            if unfit >= 0:  # something needs a copy first, or does not fit: from now on pass the tensors
                plan.pairs = None
        if plan.pairs is None:
            unfit = self.call_with_lists(work, last_try, write)
        if unfit >= 0:
            return False
        if write:
            torch.autograd.graph.increment_version(params + plan.bases if rows else plan.touched)
        return True

    @torch.no_grad()
    def call_with_lists(self, work: Work, last_try: bool, write: bool) -> int:
        """The same by lists of tensors: slower, but it copies what lies unlike its parameter, and explains a misfit."""
        plan, params, grads, rows = work
        op = torch.ops.pytrain._table_step.default
        unfit: int = op(plan.table, params, grads, rows, self.control, write, False)
        if unfit >= 0 and last_try:
            where = plan.where[rows[unfit] if rows else unfit]
            try:
                op(plan.table, params, grads, rows, self.control, write, True)
            except RuntimeError as error:
                reason = str(error).splitlines()[0].partition(f"{plan.rule.name}_: ")[2]
                raise UnfitError(f"{where}: {reason}") from None
        return unfit

    @torch.no_grad()
    def run_slow(self, optimizer: FusedOptimizer, slow: Slow, inv_scale: float) -> None:
        """Step one parameter by the rule's reference: low precision in fp32, complex numbers as pairs of reals."""
        param, rule, grad = slow.param, slow.rule, slow.param.grad
        if grad is None:
            return
        sign, *values = self.hypers[slow.group]
        hypers = dict(zip(rule.hypers, values, strict=True))
        if grad.layout != torch.strided:
            if not rule.states and not hypers["weight_decay"]:
                param.add_(grad, alpha=-sign * inv_scale * hypers["lr"])
                return
            grad = grad.to_dense()
        state = optimizer.state.get(param, {})
        first = any(state.get(name) is None for name in rule.states)
        if first or optimizer.steps_in_state:
            optimizer.init_state(param, rule)
            state = optimizer.state[param]
        t = 1.0 if first else 2.0
        if optimizer.steps_in_state:
            state["step"] += 1
            t = float(state["step"])
        wide = torch.float32 if param.dtype in LOW_PRECISION else param.dtype
        stored = [param, *(state[name] for name in rule.states)]
        reals = [torch.view_as_real(s) if s.is_complex() else s for s in stored]
        copies = [r if s.is_complex() else r.to(wide) for r, s in zip(reals, stored, strict=True)]
        g = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad.to(wide)
        u = rule.reference(copies[0], g * (sign * inv_scale), *copies[1:], t=t, **hypers)
        for real, copy in zip(reals[1:], copies[1:], strict=True):
            if copy is not real:
                real.copy_(copy)
        reals[0].copy_(copies[0] - u)


@torch.no_grad()
def settle(optimizer: FusedOptimizer) -> Settled:
    """Decide the backend of every parameter, make its state complete and well laid out, and build the tables.

    Raises:
        BackendError: the kernels were demanded and cannot take a parameter.
        UnfitError: a state has a shape or a device unlike its parameter's.
    """
    plans: dict[tuple[str, torch.dtype], Plan] = {}
    slow: list[Slow] = []
    waiting: list[Tensor] = []
    wanted: list[tuple[Tensor, Rule]] = []
    fresh: list[Tensor] = []
    listed: set[int] = set()
    seen: set[int] = set()
    for index, group in enumerate(optimizer.param_groups):
        rule = optimizer.rule(group)
        for i, param in enumerate(group["params"]):
            if id(param) in listed:  # torch warned of it; a parameter is stepped once
                continue
            listed.add(id(param))
            where = f"{type(optimizer).__name__}: param_groups[{index}]['params'][{i}]"
            state = optimizer.state.get(param, {})
            needed = (*rule.states, "step") if optimizer.steps_in_state else rule.states
            complete = all(state.get(name) is not None for name in needed)
            if param.grad is None and not (complete and param.requires_grad):
                waiting.append(param)
                continue
            _check_states(state, param, rule, where)
            reason = _why_slow(param, state, rule, group)
            if reason:
                optimizer.warn_once(reason)
            if reason is not None:
                _check_disjoint(param, where)
                slow.append(Slow(param, index, rule, where, reason or backend.select(param, fused=False).reason))
                continue
            if needed and not complete:
                wanted.append((param, rule))
            if not state:
                fresh.append(param)
            plan = plans.setdefault((rule.name, param.dtype), Plan(rule))
            plan.params.append(param)
            plan.groups.append(index)
            plan.where.append(where)
            if rule.counts and not optimizer.steps_in_state:  # only the first step differs, and it finds no state
                plan.steps.append(torch.tensor(1.0 if complete else 0.0, dtype=torch.float32, device="cpu"))
    _make_states(optimizer, wanted)
    for plan in plans.values():
        for param in plan.params:
            state = optimizer.state.get(param, {})
            plan.states.append(_fit_states(state, param, plan.rule, seen))
            if plan.rule.counts and optimizer.steps_in_state:
                plan.steps.append(_fit_step(state, seen))
    return Settled(optimizer, list(plans.values()), slow, waiting, fresh)


def _make_states(optimizer: FusedOptimizer, wanted: list[tuple[Tensor, Rule]]) -> None:
    """Give parameters the state that they lack; small ones from common blocks, which are quick to make and to walk."""
    small: dict[torch.dtype, list[tuple[Tensor, str]]] = {}
    for param, rule in wanted:
        if param.numel() > SMALL or not param.is_contiguous():
            optimizer.init_state(param, rule)
            continue
        state = optimizer.state[param]
        for name in rule.states:
            if state.get(name) is None:
                small.setdefault(param.dtype, []).append((param, name))
        if optimizer.steps_in_state and state.get("step") is None:
            small.setdefault(torch.float32, []).append((param, "step"))
    for dtype, needs in small.items():
        per_line = 64 // dtype.itemsize  # each tensor starts a cache line, but for the step counts
        sizes = [1 if name == "step" else -(-param.numel() // per_line) * per_line for param, name in needs]
        at = 0
        while at < len(needs):
            end, total = at, 0
            while end < len(needs) and (end == at or (total + sizes[end]) * dtype.itemsize <= BLOCK_BYTES):
                total += sizes[end]
                end += 1
            block, offset = torch.zeros(total, dtype=dtype, device="cpu"), 0
            for (param, name), size in zip(needs[at:end], sizes[at:end], strict=True):
                shape = () if name == "step" else param.shape
                optimizer.state[param][name] = block[offset : offset + math.prod(shape)].view(shape)
                offset += size
            at = end


def _why_slow(param: Tensor, state: dict[str, Tensor], rule: Rule, group: dict[str, object]) -> str | None:
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
    for name in rule.states:
        value = state.get(name)
        if value is not None and value.dtype != param.dtype:
            return f"there are no kernels for {param.dtype} parameters with {value.dtype} {name}"
    return None


def _check_states(state: dict[str, Tensor], param: Tensor, rule: Rule, where: str) -> None:
    for name in rule.states:
        value = state.get(name)
        if value is not None and (value.shape != param.shape or value.device != param.device):
            raise UnfitError(
                f"{where}: its state {name!r} has shape {tuple(value.shape)} on {value.device}, "
                f"expected {tuple(param.shape)} on {param.device}"
            )


def _check_disjoint(param: Tensor, where: str) -> None:
    """As the kernels do: an element that is another one too would be stepped twice."""
    if param.layout != torch.strided or not param.numel():
        return
    reach = 0  # the largest offset that the dimensions so far can add up to
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise UnfitError(
                f"{where}: it has elements that share memory (for instance from expand()); pass a contiguous tensor"
            )
        reach += stride * (size - 1)


def _fit_states(state: dict[str, Tensor], param: Tensor, rule: Rule, seen: set[int]) -> list[Tensor]:
    """The rule's states of a parameter, each replaced by a copy where it lies in memory unlike the parameter."""
    layout = param if param.is_contiguous() else torch.empty_like(param, device="meta")
    for name in rule.states:
        value = state[name]
        if value.stride() != layout.stride() or id(value) in seen:
            state[name] = torch.empty_like(param).copy_(value)
        seen.add(id(state[name]))
    return [state[name] for name in rule.states]


def _fit_step(state: dict[str, Tensor], seen: set[int]) -> Tensor:
    """The step count as one float32 on the CPU, whatever an older checkpoint holds; no two parameters share one."""
    step: Tensor | float = state["step"]
    good = isinstance(step, Tensor) and step.dtype == torch.float32 and step.device.type == "cpu" and step.numel() == 1
    if not good or id(step) in seen:
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    seen.add(id(state["step"]))
    return state["step"]


def _check_slow(optimizer: FusedOptimizer, slow: Slow) -> None:
    grad = slow.param.grad
    if grad is None:
        return
    if grad.shape != slow.param.shape:
        raise UnfitError(
            f"{slow.where}: its gradient has shape {tuple(grad.shape)}, expected {tuple(slow.param.shape)}"
        )
    if grad.layout != torch.strided and not optimizer.takes_sparse:
        raise UnfitError(
            f"{slow.where}: its gradient has layout {grad.layout}, which this optimizer does not take; "
            "use torch.optim.SparseAdam or pytrain.optim.SGD"
        )


def _free(tables: list[int]) -> None:
    for table in tables:
        torch.ops.pytrain._table_free(table)
