"""What all strategies share: the same model on all ranks, gradients in buckets, one small all-reduce a step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from pytrain import backend
from pytrain.amp import LossScaler
from pytrain.grads import ALIGN_BYTES, Bucket, GradBuckets, Unused, Work
from pytrain.parallel.collectives import Collectives
from pytrain.parallel.ranks import Ranks, describe, pack_flags, unpack_flags
from pytrain.steps import StepInfo

REDUCE_DTYPES = (torch.float32, torch.bfloat16)
T = TypeVar("T")


class Share(NamedTuple):
    """A parameter of a rank's optimizer: elements `begin` to `end` of `owner`, in the order of its memory."""

    param: Tensor
    owner: Tensor
    begin: int
    end: int


class Strategy(ABC):
    """How a model is trained on several ranks; all that a trainer knows of it is this class.

    Args:
        module: the model, the same on all ranks. It is used as it is, unwrapped. Its parameters and buffers are those
            of rank 0 from the start; buffers are each rank's own from there on (see `send_buffers`).
        optimizer: steps some or all of its parameters.
        group: the process group; None: the default one.
        bucket_cap_mb, first_bucket_mb, unused: as in `pytrain.grads.GradBuckets`.
        reduce_dtype: what gradients are summed in: torch.float32 or torch.bfloat16; None: their own dtype.

    Attributes:
        ranks: the process group.
        buckets: the gradients.
        names: those of the optimizer's parameters in the module, a list a param group.
        stop: whether any rank has asked for it in the last step.
        more: whether any rank has a batch left, as of the last step; see `join`.

    Raises:
        RuntimeError: torch.distributed is not initialized, or the ranks' models differ: names the first difference.
        ValueError: an argument is out of its range, or the optimizer has parameters that the module has not.
    """

    name: ClassVar[str]
    weight: ClassVar[str] = "weight"  # the argument of `step`

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float = 25.0,
        first_bucket_mb: float = 1.0,
        unused: Unused = "error",
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        if reduce_dtype is not None and reduce_dtype not in REDUCE_DTYPES:
            raise ValueError(f"reduce_dtype: expected torch.float32, torch.bfloat16 or None, got {reduce_dtype}")
        if backend.has_dtensors(module.parameters()):
            raise ValueError("module: a parameter is a DTensor, sharded already; step it by pytrain.step alone")
        self.ranks, self.module, self.optimizer, self.reduce_dtype = Ranks(group), module, optimizer, reduce_dtype
        self.stop, self.more, self.collectives = False, False, Collectives(self.ranks)
        self._has_more, self._joined = False, 0
        places = {id(p): i for i, each in enumerate(optimizer.param_groups) for p in each["params"]}
        names = {id(p): name for name, p in module.named_parameters()}
        for i, each in enumerate(optimizer.param_groups):
            for k, p in enumerate(each["params"]):
                if id(p) not in names:
                    raise ValueError(f"optimizer: param_groups[{i}]['params'][{k}] is no parameter of the module")
        self.names = [[names[id(p)] for p in each["params"]] for each in optimizer.param_groups]
        self.ranks.check_alike("the model", describe(module, places))
        self.ranks.send_from_first([*module.parameters(), *module.buffers()])
        params = [p for p in module.parameters() if id(p) in places]
        # Sums of fp16 gradients are taken of smaller ones, so that none overflows which the average would not.
        low = any(p.dtype == torch.float16 for p in params) and reduce_dtype is None
        self.divided_before = 2.0 ** math.ceil(math.log2(self.ranks.size)) if low else 1.0
        self.buckets = GradBuckets(
            params,
            self._reduce,
            groups=[places[id(p)] for p in params],
            names=[names[id(p)] for p in params],
            bucket_cap_mb=bucket_cap_mb,
            first_bucket_mb=first_bucket_mb,
            world_size=self.ranks.size,
            align_bytes=self.align_bytes(),
            unused=unused,
        )

    # ---- what a strategy says -----------------------------------------------------------------------------------

    def align_bytes(self) -> int:
        """Where slots and shards start."""
        return ALIGN_BYTES

    def shares(self) -> list[list[Share]]:
        """What this rank's optimizer steps, a list a param group, in its order."""
        return [[Share(p, p, 0, p.numel()) for p in each["params"]] for each in self.optimizer.param_groups]

    def show_gradients(self, show: Callable[[float], float]) -> None:
        """Before each step let `show(divisor)` see the gradients, summed over the ranks; what it returns divides them.

        Raises:
            NotImplementedError: no rank has them whole.
        """
        raise NotImplementedError(f"on_before_optimizer_step: under {self.name} no rank has whole gradients; use ddp")

    def own_part(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's part of an optimizer's whole state. Raises ValueError where it does not fit."""
        return dict(state_dict)

    @abstractmethod
    def _collect(self, flat: Tensor) -> Work | None:
        """Start the sum of a bucket's gradients over the ranks."""

    @abstractmethod
    def _step(self, scaler: LossScaler | None, weight: float, stop: bool, options: dict[str, Any]) -> StepInfo:
        """Step with reduced gradients."""

    # ---- what a trainer calls -----------------------------------------------------------------------------------

    def accumulate(self, *, last: bool) -> AbstractContextManager[None]:
        """A micro-batch's backward. Gradients are summed over the ranks in the last one of a step; see GradBuckets."""
        return self.buckets.accumulate(last=last)

    def step(
        self, scaler: LossScaler | None = None, *, weight: float = 1.0, stop: bool = False, **options: Any
    ) -> StepInfo:
        """As `pytrain.step` of the optimizer, with the gradients of all ranks.

        The gradient that is applied is the sum over micro-batches and ranks, divided by the sum of all weights.

        Args:
            scaler: what scaled the loss.
            weight: of this rank's gradients, >= 0: the number of its micro-batches, or of their tokens where each loss
                is a sum over tokens.
            stop: this rank is to stop; afterwards `self.stop` says whether any of them is.
            options: `max_norm` and the others of `pytrain.step`, but for grad_divisor.

        Raises:
            RankError: another rank has died or left, or does something else.
            RuntimeError: a parameter has no gradient (see `unused`), or there was no backward.
            ValueError: as `pytrain.step`; the weights of all ranks are zero.
        """
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"weight: expected a finite number >= 0, got {weight!r}")
        self.buckets.finish(idle=weight == 0)
        info = self._step(scaler, float(weight), bool(stop), options)
        self._joined += 1
        self.ranks.heart.steps += 1
        return info

    def join(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The batches of this rank, then None as long as other ranks have some: all ranks take as many steps.

            for batch in ranks.join(loader):
                if batch is not None:
                    loss_of(model, batch).backward()
                ranks.step(weight=0 if batch is None else 1)
                optimizer.zero_grad()

        One batch is drawn ahead; that others have some is learned from the step's own all-reduce.

        Raises:
            RuntimeError: the loop's body has not called `step` once for each batch.
        """
        drawn = iter(batches)
        ahead = next(drawn, drawn)  # the iterator itself stands for the end
        self.more = self.ranks.sum([float(ahead is not drawn)])[0] > 0
        while self.more:
            batch, ahead = ahead, drawn if ahead is drawn else next(drawn, drawn)
            self._has_more, self._joined = ahead is not drawn, 0
            yield None if batch is drawn else batch  # type: ignore[misc]
            if self._joined != 1:
                raise RuntimeError(f"join: expected one step() for each batch, got {self._joined}")

    def send_buffers(self) -> None:
        """Have the module's buffers (BatchNorm statistics) be those of rank 0 everywhere."""
        self.ranks.send_from_first(list(self.module.buffers()))

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's whole state, as one process has it, on every rank; all ranks must call this.

        It loads into the same optimizer without a strategy, and into any strategy on any number of ranks.
        """
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take this rank's part of a whole state.

        Raises:
            ValueError: the param groups do not match, or a state's shape is not its parameter's.
        """
        self.optimizer.load_state_dict(self.own_part(state_dict))

    def close(self) -> None:
        """Let the model go: gradients are each rank's own again; all ranks must call this."""
        self.abandon()

    def abandon(self) -> None:
        """As `close` after an error: without the other ranks, and the optimizer stays as it is."""
        self.buckets.close()
        self.collectives.close()

    # ---- for strategies -----------------------------------------------------------------------------------------

    def agree(self, weight: float, stop: bool) -> float:
        """One small all-reduce: the sum of weights, which it returns, who stops, who has more, and what was used."""
        buckets, size = self.buckets, self.ranks.size
        flags = pack_flags(buckets.used, size) if buckets.unused == "agree" else []
        total, stopping, more, *sums = self.ranks.sum([weight, float(stop), float(self._has_more), *flags])
        self.stop, self.more = stopping > 0, more > 0
        if flags:
            buckets.drop_unused(unpack_flags(sums, len(buckets.used), size))
        return check_total(total)

    def _reduce(self, bucket: Bucket) -> Work:
        flat = torch.view_as_real(bucket.flat).view(-1) if bucket.flat.is_complex() else bucket.flat
        if self.divided_before != 1.0:
            flat.mul_(1.0 / self.divided_before)
        own = self.reduce_dtype is None or flat.dtype in (self.reduce_dtype, torch.float64)
        summed = flat if own else flat.to(self.reduce_dtype)
        what = f"the sum of bucket {bucket.index} of {len(self.buckets.buckets)}"
        with self.ranks.at(what):
            return Sum(self._collect(summed), self.ranks, what, summed, flat)


class Sum:
    """A sum over the ranks that was started, of a bucket's gradients or of a copy in another dtype."""

    def __init__(self, work: Work | None, ranks: Ranks, what: str, source: Tensor, target: Tensor) -> None:
        self.work, self.ranks, self.what, self.source, self.target = work, ranks, what, source, target

    def wait(self) -> None:
        """Return when the bucket holds the result."""
        if self.work is not None:
            with self.ranks.at(self.what):
                self.work.wait()
        if self.source is not self.target:
            self.target.copy_(self.source)


def check_total(total: float) -> float:
    """The sum of all weights, if there is something to divide by."""
    if not total > 0:
        raise ValueError("weight: the weights of all ranks are zero")
    return total
