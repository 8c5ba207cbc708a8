"""Gradients in flat buckets, which leave for the other ranks while backward still runs.

Nothing here knows a rank: `GradBuckets` calls a function for each full bucket, in the same order on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

ALIGN_BYTES = 128  # where a slot may start
AT_ONCE_BYTES = 1 << 16  # from which a gradient is copied when it comes: its memory then serves for the next one
Unused = Literal["error", "zero", "agree"]
UNUSED = ("error", "zero", "agree")


class BucketState(Enum):
    """How far a bucket is in the step under way."""

    EMPTY = "empty"  # no gradient of the last micro-batch is there
    FILLING = "filling"
    READY = "ready"  # all are there; it waits for the buckets before it
    IN_FLIGHT = "in flight"
    REDUCED = "reduced"


@dataclass(frozen=True)
class Slot:
    """The place of one gradient: which parameter's, its first element in the bucket, and how many it has."""

    param: int
    offset: int
    numel: int


@dataclass(frozen=True)
class BucketPlan:
    """What lies in a bucket; `numel` counts the gaps between slots and the padding at its end."""

    key: Hashable
    slots: tuple[Slot, ...]
    numel: int


def plan_buckets(
    numels: Sequence[int],
    keys: Sequence[Hashable],
    itemsizes: Sequence[int],
    *,
    order: Sequence[int] | None = None,
    cap_bytes: float = 25 * 2**20,
    first_cap_bytes: float | None = None,
    world_size: int = 1,
    align_bytes: int = ALIGN_BYTES,
) -> list[BucketPlan]:
    """Cut gradients into buckets.

    Args:
        numels: elements of each gradient.
        keys: what may share a bucket: one a (device, dtype, param group).
        itemsizes: bytes of an element of each.
        order: in which they are expected in backward; None: the last parameter first.
        cap_bytes: a bucket takes no more once it has so many bytes; one gradient of more has a bucket of its own.
        first_cap_bytes: the same for the first bucket of each key, so that the first reduction starts early.
        world_size: ranks among which each bucket may be cut into equal shards.
        align_bytes: slots and shards start at multiples of it.

    Returns:
        the buckets, in the order in which their last gradients are expected: that in which they are to leave.
    """
    if not len(numels) == len(keys) == len(itemsizes):
        raise ValueError(f"plan_buckets: got {len(numels)} numels, {len(keys)} keys and {len(itemsizes)} itemsizes")
    order = range(len(numels) - 1, -1, -1) if order is None else order
    if sorted(order) != list(range(len(numels))):
        raise ValueError(f"order: expected each of 0 to {len(numels) - 1} once")
    done: list[tuple[int, BucketPlan]] = []  # with the place of its last gradient in the order
    open_slots: dict[Hashable, list[Slot]] = {}
    ends: dict[Hashable, tuple[int, int]] = {}  # elements so far, and the place of the last gradient
    caps: dict[Hashable, float] = {}

    def close(key: Hashable, per_align: int) -> None:
        end, last = ends.pop(key)
        done.append((last, BucketPlan(key, tuple(open_slots.pop(key)), _up(end, world_size * per_align))))
        caps[key] = cap_bytes

    for place, i in enumerate(order):
        key, size, per_align = keys[i], itemsizes[i], max(1, align_bytes // itemsizes[i])
        cap = caps.setdefault(key, cap_bytes if first_cap_bytes is None else first_cap_bytes)
        begin = _up(ends[key][0], per_align) if key in ends else 0
        if key in ends and (begin + numels[i]) * size > cap:
            close(key, per_align)
            begin = 0
        open_slots.setdefault(key, []).append(Slot(i, begin, numels[i]))
        ends[key] = (begin + numels[i], place)
    for key in list(ends):
        close(key, max(1, align_bytes // itemsizes[open_slots[key][0].param]))
    return [plan for _, plan in sorted(done, key=lambda one: one[0])]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


class Work(Protocol):
    """A reduction under way."""

    def wait(self) -> Any:
        """Return when the bucket holds the result."""


@dataclass
class Bucket:
    """Gradients that are reduced together.

    Attributes:
        index: its place in the order in which buckets leave.
        flat: its memory, 1-D; gaps and padding are zero.
        views: each slot in the shape and strides of its parameter.
    """

    index: int
    plan: BucketPlan
    params: list[Tensor]
    flat: Tensor
    views: list[Tensor]
    state: BucketState = BucketState.EMPTY
    missing: int = 0
    work: Work | None = None
    arrived: list[bool] = field(default_factory=list)

    def give_memory_back(self) -> None:
        """Have no memory until gradients come again; views of it must not be used meanwhile."""
        self.flat.untyped_storage().resize_(0)

    def take_memory(self) -> None:
        """Have memory, if it was given back."""
        if not self.flat.untyped_storage().nbytes():
            self.flat.untyped_storage().resize_(self.flat.numel() * self.flat.element_size())

    def expect_all(self) -> None:
        """Begin a micro-batch."""
        self.state, self.missing, self.work = BucketState.EMPTY, len(self.params), None
        self.arrived = [False] * len(self.params)


class GradBuckets:
    """Flat memory for the gradients of parameters, filled by autograd and reduced bucket by bucket.

    In the first micro-batch gradients are copied into their bucket, large ones as they come and the others of a full
    bucket by one call, and each `p.grad` becomes a view of it; later ones are accumulated in place. A gradient that is
    all of a bucket is not copied: its own memory is the bucket's. When the last micro-batch's gradients are all there,
    `reduce` is called, for bucket after bucket in the same order on all ranks, while backward goes on. `finish` waits.

        buckets = GradBuckets(model.parameters(), reduce)
        with buckets.accumulate(last=False):
            loss_of(first).backward()
        with buckets.accumulate(last=True):
            loss_of(second).backward()
        buckets.finish()
        optimizer.step(); optimizer.zero_grad()

    Attributes:
        buckets: in the order in which they leave.
        trained: which of params are trained now, by number; the lists below are in its order.
        used: which had a gradient when `finish` was called.
        present: which have one after it.

    Args:
        params: parameters that are trained; tied ones count once, frozen ones are left out until they are unfrozen.
        reduce: starts the reduction of a bucket in place; returns what to wait for, or None if that is done.
        groups: a number for each of params, such as that of its param group: only equal ones share a bucket.
        bucket_cap_mb: the size from which a bucket is full, in MiB, > 0; inf: one bucket a (device, dtype, group).
        first_bucket_mb: the same for the first one.
        world_size: ranks among which each bucket may be cut into equal shards.
        align_bytes: where slots and shards may start.
        unused: what a parameter without a gradient is, when all is finished: an "error"; "zero": its slot is reduced as
            zeros; "agree": as "zero", and `used` says which ones had a gradient, for the ranks to agree on.

    Raises:
        ValueError: an argument is out of its range, or there is nothing to train.
        RuntimeError: in backward: a gradient is sparse, or comes after its bucket has left; in `finish`: see `unused`.

    Source: Li et al. 2020, PyTorch Distributed (arXiv:2006.15704), sections 3.2 and 4.2.
    """

    def __init__(
        self,
        params: Sequence[Tensor] | Iterator[Tensor],
        reduce: Callable[[Bucket], Work | None],
        *,
        groups: Sequence[int] | None = None,
        bucket_cap_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
        world_size: int = 1,
        align_bytes: int = ALIGN_BYTES,
        unused: Unused = "error",
        names: Sequence[str] | None = None,
    ) -> None:
        listed = list(params)
        groups = [0] * len(listed) if groups is None else list(groups)
        names = [f"params[{i}]" for i in range(len(listed))] if names is None else list(names)
        for what, values in (("groups", groups), ("names", names)):
            if len(values) != len(listed):
                raise ValueError(f"{what}: expected one for each of {len(listed)} params, got {len(values)}")
        for what, value in (("bucket_cap_mb", bucket_cap_mb), ("first_bucket_mb", first_bucket_mb)):
            if not value > 0:
                raise ValueError(f"{what}: expected a number > 0, got {value!r}")
        if unused not in UNUSED:
            raise ValueError(f"unused: expected one of {', '.join(map(repr, UNUSED))}, got {unused!r}")
        firsts = {id(p): i for i, p in reversed(list(enumerate(listed)))}
        self._all = [listed[i] for i in sorted(firsts.values())]
        self._groups = [groups[i] for i in sorted(firsts.values())]
        self._names = [names[i] for i in sorted(firsts.values())]
        for name, p in zip(self._names, self._all, strict=True):
            if p.layout != torch.strided or not (p.is_floating_point() or p.is_complex()):
                raise ValueError(
                    f"{name}: expected a dense floating-point or complex tensor, got {p.dtype}, {p.layout}"
                )
        self.reduce, self.unused, self.world_size = reduce, unused, world_size
        self._caps = (bucket_cap_mb * 2**20, min(first_bucket_mb, bucket_cap_mb) * 2**20, align_bytes)
        self._hooks: dict[int, torch.utils.hooks.RemovableHandle] = {}
        self._last, self._inside, self._next = True, False, 0
        self._seen: dict[int, None] | None = {}  # the order of the first step's last backward, while that is noted
        self._observed: list[int] | None = None
        self.buckets: list[Bucket] = []
        self._build(None)

    # ---- layout -----------------------------------------------------------------------------------------------------

    def _build(self, order: Sequence[int] | None) -> None:
        """Lay out buckets for all trainable parameters, in an order of their numbers."""
        self.trained = [i for i, p in enumerate(self._all) if p.requires_grad]
        if not self.trained:
            raise ValueError("params: none of them requires a gradient")
        params = [self._all[i] for i in self.trained]
        self.used, self.present = [False] * len(params), [False] * len(params)
        cap, first, align = self._caps
        plans = plan_buckets(
            [p.numel() for p in params],
            [(p.device, p.dtype, self._groups[i]) for i, p in zip(self.trained, params, strict=True)],
            [p.element_size() for p in params],
            order=order,
            cap_bytes=cap,
            first_cap_bytes=first,
            world_size=self.world_size,
            align_bytes=align,
        )
        self.buckets = []
        self._place: dict[int, tuple[Bucket, int, bool]] = {}  # of each parameter, by its id; whether it is large
        for index, plan in enumerate(plans):
            own = [params[slot.param] for slot in plan.slots]
            flat = torch.zeros(plan.numel, dtype=own[0].dtype, device=own[0].device)
            views = [_like(flat, slot, p) for slot, p in zip(plan.slots, own, strict=True)]
            bucket = Bucket(index, plan, own, flat, views)
            bucket.expect_all()
            self.buckets.append(bucket)
            self._place.update((id(p), (bucket, k, p.nbytes >= AT_ONCE_BYTES)) for k, p in enumerate(own))
        for i, p in zip(self.trained, params, strict=True):
            if i not in self._hooks:
                self._hooks[i] = p.register_post_accumulate_grad_hook(self._arrive)  # type: ignore[no-untyped-call]
        self._next = 0

    def observed_order(self) -> list[int] | None:
        """The order in which the gradients of the first step came, until `follow` has taken it (or another).

        Numbers of `trained`; those without a gradient come last.
        """
        return self._observed

    def follow(self, order: Sequence[int]) -> None:
        """Lay the buckets out anew for this order, between two steps and the same on all ranks. Drops the gradients."""
        self._check_between("follow")
        for p in self._all:
            if id(p) in self._place:
                p.grad = None
        self._build(order)
        self._observed = None

    def close(self) -> None:
        """Let the parameters go: their gradients are autograd's own again."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    # ---- backward ---------------------------------------------------------------------------------------------------

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """A micro-batch's backward: gradients are added up; buckets leave in the last one. Without it each is the last.

        Raises:
            RuntimeError: the step's buckets have left already, and `finish` was not called.
        """
        if self._inside:
            raise RuntimeError("accumulate: a micro-batch is under way already; leave that context first")
        self._begin()
        self._inside, self._last = True, last
        try:
            yield
        finally:
            self._inside, self._last = False, True
            if not last:
                for bucket in self.buckets:
                    self._gather(bucket)
                    bucket.expect_all()

    def _begin(self) -> None:
        """Make ready for the gradients of a micro-batch."""
        if all(bucket.state is BucketState.REDUCED for bucket in self.buckets):
            self._reset()
        left = [b.index for b in self.buckets if b.state in (BucketState.IN_FLIGHT, BucketState.REDUCED)]
        if left:
            raise RuntimeError(f"accumulate: bucket {left[0]} of this step has left already; call finish() first")
        self._reset()

    def _reset(self) -> None:
        self._next = 0
        for bucket in self.buckets:
            bucket.expect_all()

    def abandon(self) -> None:
        """An error has ended the step: wait for what has left, and begin anew. Gradients stay as they are."""
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
        self._reset()

    def _arrive(self, param: Tensor) -> None:
        """A parameter's gradient was accumulated. This runs for each of them: little is done here."""
        bucket, k, large = self._place[id(param)]
        if bucket.state is BucketState.IN_FLIGHT or bucket.state is BucketState.REDUCED:
            self._again(bucket, k)
        if bucket.arrived[k]:
            return
        bucket.arrived[k] = True
        bucket.missing -= 1
        bucket.state = BucketState.FILLING
        if self._seen is not None and self._last:
            self._seen[bucket.plan.slots[k].param] = None
        if large:
            self._take(bucket, k)
        if not bucket.missing:
            self._gather(bucket)
            if self._last:
                bucket.state = BucketState.READY
                self._launch()

    def _again(self, bucket: Bucket, k: int) -> None:
        """A gradient came whose bucket has left: for a new step, or for none."""
        if all(b.state is BucketState.REDUCED for b in self.buckets):
            self._reset()  # a new step, without a context
            return
        raise RuntimeError(
            f"a gradient of {self.name_of(bucket, k)} came after its bucket {bucket.index} had left: its parameter "
            "took part in two backward passes of one step. Wrap all but the last in accumulate(last=False); with "
            "activation checkpointing, use the kind that is not re-entrant (use_reentrant=False)"
        )

    def _take(self, bucket: Bucket, k: int) -> None:
        """Have one gradient in the bucket: by a copy, or as the bucket's memory where it is all of it."""
        grad, view = bucket.params[k].grad, bucket.views[k]
        if grad is None or grad is view:
            return
        self._check_dense(bucket, k, grad)
        whole = grad.untyped_storage().nbytes() == bucket.flat.nbytes == grad.nbytes
        if whole and grad.stride() == view.stride() and grad.dtype == view.dtype:
            bucket.flat, bucket.views[k] = grad.detach().as_strided((grad.numel(),), (1,), 0), grad
            return
        bucket.take_memory()
        with torch.no_grad():
            view.copy_(grad)
        bucket.params[k].grad = view

    def _gather(self, bucket: Bucket) -> None:
        """Copy what autograd has put elsewhere into the bucket, and let each `p.grad` be its slot."""
        params, views, grads = bucket.params, bucket.views, [p.grad for p in bucket.params]
        new = [k for k, grad in enumerate(grads) if grad is not None and grad is not views[k]]
        if not new:
            return
        sources = [grads[k] for k in new]
        for k, grad in zip(new, sources, strict=True):
            if grad.layout != torch.strided:  # type: ignore[union-attr]
                self._check_dense(bucket, k, grad)  # type: ignore[arg-type]
        bucket.take_memory()
        with torch.no_grad():
            torch._foreach_copy_([views[k] for k in new], sources)  # type: ignore[arg-type]
        for k in new:
            params[k].grad = views[k]

    def _check_dense(self, bucket: Bucket, k: int, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {self.name_of(bucket, k)} is {grad.layout}, and buckets take dense ones; make its "
                "embedding with sparse=False"
            )

    def _launch(self) -> None:
        """Send off the buckets whose turn it is."""
        while self._next < len(self.buckets) and self.buckets[self._next].state is BucketState.READY:
            bucket = self.buckets[self._next]
            self._next += 1
            bucket.state = BucketState.IN_FLIGHT
            bucket.work = self.reduce(bucket)

    # ---- the end of a step ------------------------------------------------------------------------------------------

    def finish(self, *, idle: bool = False) -> None:
        """Send off what is still here, and wait for all: then each `p.grad` is the reduced gradient.

        Args:
            idle: this rank may have no gradient at all: it adds zeros to what the others have, whatever `unused` says.

        Raises:
            RuntimeError: with unused="error": a parameter has no gradient, or one was unfrozen since the last step.
        """
        if self._inside:
            raise RuntimeError("finish: leave the accumulate() context first")
        if all(bucket.state is BucketState.REDUCED for bucket in self.buckets):
            if self.unused == "error" and not idle:
                raise RuntimeError("finish: there was no backward since the last finish()")
            self._reset()  # this rank has nothing to add to what the others have
        idle = idle and all(bucket.state is BucketState.EMPTY for bucket in self.buckets)
        self._check_unfrozen()
        missing = []
        for bucket in self.buckets:
            left = bucket.state is BucketState.IN_FLIGHT
            for k, slot in enumerate(bucket.plan.slots):
                used, wanted = left or bucket.params[k].grad is not None, bucket.params[k].requires_grad
                self.used[slot.param], self.present[slot.param] = used, used or wanted
                if wanted and not used:
                    missing.append(self.name_of(bucket, k))
        if missing and self.unused == "error" and not idle:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise RuntimeError(
                f"no gradient came for {', '.join(missing[:5])}{more}; where a parameter may take no part in a step, "
                'choose unused="zero" (it is stepped with a gradient of zero) or unused="agree" (left alone where no '
                "rank has used it)"
            )
        for bucket in self.buckets:
            if bucket.state in (BucketState.EMPTY, BucketState.FILLING):
                self._fill_up(bucket)
        self._launch()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
            bucket.work, bucket.state = None, BucketState.REDUCED
        if self._seen is not None:  # also where it is empty: all ranks do the same
            rest = set(range(len(self.trained))) - set(self._seen)
            self._observed, self._seen = [*self._seen, *sorted(rest, reverse=True)], None

    def drop_unused(self, used: Sequence[bool]) -> None:
        """Leave without a gradient what no rank has used, after `finish`; `used` is in the order of `trained`."""
        for bucket in self.buckets:
            for slot, param in zip(bucket.plan.slots, bucket.params, strict=True):
                if not used[slot.param]:
                    param.grad, self.present[slot.param] = None, False

    def _fill_up(self, bucket: Bucket) -> None:
        """Zeros where no gradient came."""
        bucket.take_memory()
        self._gather(bucket)
        with torch.no_grad():
            empty = [view for view, p in zip(bucket.views, bucket.params, strict=True) if p.grad is None]
            if empty:
                torch._foreach_zero_(empty)
        for view, p in zip(bucket.views, bucket.params, strict=True):
            if p.grad is None and p.requires_grad:
                p.grad = view
        bucket.state = BucketState.READY

    def _check_unfrozen(self) -> None:
        fresh = [i for i, p in enumerate(self._all) if p.requires_grad and id(p) not in self._place]
        if fresh:
            raise RuntimeError(
                f"{self._names[fresh[0]]} was unfrozen since the buckets were laid out, and its gradient was not "
                "reduced; call refresh() after requires_grad has changed, on all ranks"
            )

    def refresh(self) -> None:
        """Lay the buckets out anew where parameters were frozen or unfrozen, between two steps, on all ranks alike."""
        self._check_between("refresh")
        if [i for i, p in enumerate(self._all) if p.requires_grad] != self.trained:
            for bucket in self.buckets:
                for p in bucket.params:
                    p.grad = None
            self._build(None)
            self._seen, self._observed = {}, None

    def _check_between(self, what: str) -> None:
        if any(bucket.state not in (BucketState.EMPTY, BucketState.REDUCED) for bucket in self.buckets):
            raise RuntimeError(f"{what}: a step is under way; call it after finish()")

    def name_of(self, bucket: Bucket, k: int) -> str:
        """A parameter's name and shape."""
        name = self._names[self.trained[bucket.plan.slots[k].param]]
        return f"{name} of shape {tuple(bucket.params[k].shape)}"


def _like(flat: Tensor, slot: Slot, param: Tensor) -> Tensor:
    """A slot in the shape of its parameter, and in its strides where these leave no gaps."""
    layout = torch.empty_like(param, device="meta")
    return flat.as_strided(layout.shape, layout.stride(), slot.offset)


def padding(plans: Sequence[BucketPlan]) -> float:
    """The share of the buckets' elements that hold no gradient."""
    total = sum(plan.numel for plan in plans)
    return 1.0 - sum(slot.numel for plan in plans for slot in plan.slots) / total if total else math.nan
