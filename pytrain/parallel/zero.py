"""Sharded data parallel training: each rank keeps, and steps, the optimizer's state of its own part of every bucket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer

from pytrain.amp import LossScaler
from pytrain.control import CONTROL_HEAD, CONTROL_ROW, FOUND_INF, INV_SCALE, MAX_SUMS, SUMSQ
from pytrain.grads import ALIGN_BYTES, Bucket, Work
from pytrain.optim.base import FusedOptimizer
from pytrain.optim.storage import CODE_BLOCK, RANDOM_TILE, SCALE, Cut, elementwise
from pytrain.parallel.base import Share, Strategy, check_total
from pytrain.steps import StepInfo
from pytrain.steps import step as pytrain_step

AHEAD = 2  # buckets that Zero2 has in flight at a time


@dataclass
class Piece:
    """What a rank owns of one parameter: elements `begin` to `end` of it in the order of its memory.

    Attributes:
        param: these elements, as a parameter of their own.
        owner: the parameter.
        number: the owner's place among all parameters of the optimizer, `group` its param group, and `trained` its
            place among those of the buckets.
        at: where `begin` lies in the shard of bucket `bucket`.
    """

    param: Parameter
    owner: Tensor
    number: int
    group: int
    trained: int
    begin: int
    end: int
    bucket: int
    at: int


class Zero1(Strategy):
    """As `DDP`, but each rank keeps only its share of the optimizer's state, steps that, and gathers the parameters.

        ranks = pytrain.parallel.Zero1(model, optimizer)

    From now on the optimizer's param groups hold this rank's pieces, so that schedules and changes of hyperparameters
    work as ever; state that there is already is cut into pieces. `state_dict` gives, and `load_state_dict` takes, the
    whole of it, as one process has it. Each bucket's parameters lie in one block of memory. Gradients are gone after a
    step.

    Args:
        offload: "cpu": each rank's pieces, and with them the optimizer's state and its step, are in the CPU's memory;
            None: they are where the parameters are. Gradients and parameters are copied once a step. Parameters that
            others write are noticed, but not writes through `p.data`.
        options: those of `Strategy`.

    Raises:
        TypeError: the optimizer is none of pytrain's.
        ValueError: it needs whole tensors (their rows and columns, as Adafactor and Muon do), or steps in backward.

    Source: Rajbhandari et al. 2020, ZeRO, section 5.1 (arXiv:1910.02054); Ren et al. 2021, ZeRO-Offload
    (arXiv:2101.06840).
    """

    name = "zero1"

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, *, offload: Literal["cpu"] | None = None, **options: Any
    ) -> None:
        if offload not in (None, "cpu"):
            raise ValueError(f'offload: expected "cpu" or None, got {offload!r}')
        self._optimizer = _check_optimizer(optimizer)
        super().__init__(module, optimizer, **options)
        state = optimizer.state_dict() if optimizer.state else None
        self._whole = [list(group["params"]) for group in optimizer.param_groups]
        self.flats: list[Tensor] = []  # the parameters, a block a bucket
        self.pieces: list[Piece] = []
        self._hosts: list[Host] = []  # a rank's own part of each block, where that is elsewhere
        self._lay_out(offload == "cpu")
        self._own = (0.0, 0.0, 0.0)  # this rank's weight, whether it is to stop, and whether it has more batches
        if state is not None:
            self.load_state_dict(state)

    def align_bytes(self) -> int:
        """So that no block of 8-bit codes, and no tile of random numbers, is cut, where there are any."""
        storage = self._optimizer.storage
        elements = RANDOM_TILE if storage.stochastic else CODE_BLOCK if storage.state == "8bit" else 0
        return max(ALIGN_BYTES, elements * 4)

    @torch.no_grad()
    def _lay_out(self, offload: bool) -> None:
        """Move the parameters into blocks of the buckets' layout; the optimizer takes this rank's pieces."""
        flat_params = [(p, index) for index, params in enumerate(self._whole) for p in params]
        places = {id(p): (number, index) for number, (p, index) in enumerate(flat_params)}
        for bucket in self.buckets.buckets:
            flat = torch.zeros_like(bucket.flat)
            size = flat.numel() // self.ranks.size
            low = size * self.ranks.rank
            own = flat[low : low + size]
            if offload:
                self._hosts.append(Host(own, bucket.params))
                own = self._hosts[-1].params
            for slot, param, view in zip(bucket.plan.slots, bucket.params, bucket.views, strict=True):
                home = flat.as_strided(view.shape, view.stride(), slot.offset)
                home.copy_(param)
                param.data = home
                first, last = max(low, slot.offset), min(low + size, slot.offset + slot.numel)
                if first < last:
                    piece = Parameter(own[first - low : last - low])
                    (number, index), begin, end = places[id(param)], first - slot.offset, last - slot.offset
                    piece.cut = Cut(number, begin, slot.numel)  # type: ignore[attr-defined]
                    self.pieces += [
                        Piece(piece, param, number, index, slot.param, begin, end, bucket.index, first - low)
                    ]
            self.flats.append(flat)
        for host in self._hosts:
            host.follow()
        self.pieces.sort(key=lambda piece: piece.number)
        for index, group in enumerate(self.optimizer.param_groups):
            group["params"] = [piece.param for piece in self.pieces if piece.group == index]
        self.optimizer.state.clear()
        if any(rule.sums for rule in self._optimizer.rules):
            self._optimizer.join_sums = self._join_sums

    # ---- the step -------------------------------------------------------------------------------------------------

    def _collect(self, flat: Tensor) -> Work | None:
        return self.collectives.reduce_scatter(flat)

    def _reduced(self, bucket: Bucket) -> Tensor:
        """This rank's shard of the reduced gradients."""
        return self.collectives.shard(bucket.flat)

    def _step(self, scaler: LossScaler | None, weight: float, stop: bool, options: dict[str, Any]) -> StepInfo:
        if self.buckets.unused == "agree":  # which pieces take no part must be known before gradients are looked at
            weight = self.agree(weight, stop) / self.ranks.size
            stop, self._has_more = self.stop, self.more
        self._own = (weight, float(stop), float(self._has_more))
        shards = [self._reduced(bucket) for bucket in self.buckets.buckets]
        if self._hosts:
            for host in self._hosts:
                host.follow()
            shards = [host.take(shard) for host, shard in zip(self._hosts, shards, strict=True)]
            if shards and self.ranks.device.type != "cpu":
                torch.cuda.synchronize()  # what was copied is read by the CPU now
        for piece in self.pieces:
            if self.buckets.present[piece.trained]:
                piece.param.grad = shards[piece.bucket][piece.at : piece.at + piece.end - piece.begin]
        for params in self._whole:
            for p in params:
                p.grad = None
        try:
            return pytrain_step(self.optimizer, scaler, grad_divisor=1.0 / self.divided_before, shards=self, **options)
        finally:
            for piece in self.pieces:
                piece.param.grad = None

    def agree_on(self, controls: Sequence[Tensor]) -> None:
        """AGREE of a step: one small all-reduce of the flag, the sums of squares, the weights and who stops."""
        control = controls[0]
        rows = control[CONTROL_HEAD:].view(-1, CONTROL_ROW)
        own = torch.tensor(self._own, dtype=torch.float64, device="cpu").to(control.device)
        message = torch.cat([own, control[FOUND_INF : FOUND_INF + 1], rows[:, SUMSQ]]).to(self.ranks.device)
        with self.ranks.at("the agreement on a step"):
            dist.all_reduce(message, group=self.ranks.group)
            message = message.to(control.device)
        total, stopping, more, found = message[:4]
        self.stop, self.more = bool(stopping > 0), bool(more > 0)
        control[INV_SCALE] /= check_total(float(total))
        control[FOUND_INF] = found
        rows[:, SUMSQ] = torch.where(found > 0, torch.nan, message[4:])  # no norm, as where one rank has it all

    def _join_sums(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Between the passes, for rules with norms: one all-reduce of what they sum over each parameter."""
        count = sum(map(len, self._whole))
        totals = torch.zeros(count, MAX_SUMS, dtype=torch.float64, device=self.ranks.device)
        places = [numbers.to(totals.device) for numbers, _ in parts]
        for place, (_, sums) in zip(places, parts, strict=True):
            totals[place] = sums.to(totals.device)
        with self.ranks.at("the agreement on norms"):
            dist.all_reduce(totals, group=self.ranks.group)
        for place, (_, sums) in zip(places, parts, strict=True):
            sums.copy_(totals[place])

    def publish(self) -> None:
        """After pass 2: every rank gets the parameters that the others have stepped."""
        for host in self._hosts:
            host.home.copy_(host.params, non_blocking=True)
        with self.ranks.at("the gathering of parameters"):
            for work in [self.collectives.all_gather(flat) for flat in self.flats]:
                if work is not None:
                    work.wait()

    def shares(self) -> list[list[Share]]:
        """The pieces."""
        each: list[list[Share]] = [[] for _ in self._whole]
        for piece in self.pieces:
            each[piece.group].append(Share(piece.param, piece.owner, piece.begin, piece.end))
        return each

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As `Strategy.state_dict`: the pieces of all ranks, joined."""
        own = [(piece.number, piece.begin, self.optimizer.state.get(piece.param, {})) for piece in self.pieces]
        everyone = self.ranks.gather(own, "the gathering of the state")
        parts: dict[int, list[tuple[int, dict[str, Tensor]]]] = {}
        for number, begin, state in (part for one in everyone for part in one):
            parts.setdefault(number, []).append((begin, state))
        saved = self.optimizer.state_dict()
        params = [p for group in self._whole for p in group]
        saved["state"] = {
            number: _join(params[number], sorted(parts[number], key=lambda part: part[0]))
            for number in sorted(parts)
            if parts[number][0][1]
        }
        first = 0
        for group, whole in zip(saved["param_groups"], self._whole, strict=True):
            group["params"] = list(range(first, first + len(whole)))
            first += len(whole)
        return saved

    def own_part(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The state of this rank's pieces."""
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(whole) for whole in self._whole]:
            raise ValueError(
                f"load_state_dict: the state has groups of {sizes} parameters, the optimizer of "
                f"{[len(whole) for whole in self._whole]}"
            )
        numbers = [number for group in groups for number in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        per_element = elementwise(self._optimizer)
        cut_groups: list[dict[str, Any]] = []
        for index, group in enumerate(groups):
            own = [piece for piece in self.pieces if piece.group == index]
            first = sum(len(one["params"]) for one in cut_groups)
            cut_groups.append({**group, "params": list(range(first, first + len(own)))})
            for k, piece in enumerate(own):
                whole = state_dict["state"].get(numbers[piece.number])
                if whole:
                    state[first + k] = _cut(piece, whole, per_element)
        return {"state": state, "param_groups": cut_groups}

    def close(self) -> None:
        """Let the model and the optimizer go, which has its whole state again; all ranks must call this."""
        state = self.state_dict()
        super().close()
        for group, whole in zip(self.optimizer.param_groups, self._whole, strict=True):
            group["params"] = whole
        self.optimizer.state.clear()
        self._optimizer.join_sums = None
        self.optimizer.load_state_dict(state)


class Host:
    """The CPU's copy of what a rank owns of a block of parameters, and of its gradients.

    Attributes:
        home: the parameters' own memory.
        params: their copy, which is stepped.
    """

    def __init__(self, home: Tensor, owners: list[Tensor]) -> None:
        pinned = home.device.type == "cuda"
        self.home, self._owners, self._versions = home, owners, [-1]
        self.params = torch.empty(home.shape, dtype=home.dtype, device="cpu", pin_memory=pinned)
        self.grads = torch.empty_like(self.params, pin_memory=pinned)

    def follow(self) -> None:
        """Copy the parameters, where somebody else has written them (loading a state does)."""
        versions = [p._version for p in self._owners]
        if versions != self._versions:
            self.params.copy_(self.home)
            self._versions = versions

    def take(self, shard: Tensor) -> Tensor:
        """Copy gradients; returns the copy."""
        return self.grads.copy_(shard, non_blocking=True)


class Zero2(Zero1):
    """As `Zero1`, and each rank keeps only its shard of the gradients: a reduced bucket's memory is given back.

    While micro-batches are accumulated (`accumulate(last=False)`), gradients are whole on every rank.

    Source: Rajbhandari et al. 2020, ZeRO, section 5.2 (arXiv:1910.02054).
    """

    name = "zero2"

    def __init__(self, module: nn.Module, optimizer: Optimizer, **options: Any) -> None:
        super().__init__(module, optimizer, **options)
        self._kept = [torch.zeros_like(self.collectives.shard(bucket.flat)) for bucket in self.buckets.buckets]
        self._flying: list[Early] = []
        for bucket in self.buckets.buckets:
            bucket.give_memory_back()

    def _reduce(self, bucket: Bucket) -> Work:
        for p in bucket.params:
            p.grad = None  # a view of what is given back
        work = Early(super()._reduce(bucket), bucket, self)
        self._flying = [one for one in self._flying if not one.done]
        if len(self._flying) >= AHEAD:
            self._flying.pop(0).wait()
        self._flying.append(work)
        return work

    def _reduced(self, bucket: Bucket) -> Tensor:
        return self._kept[bucket.index]

    def keep(self, bucket: Bucket) -> None:
        """Take this rank's shard out of a reduced bucket, and give its memory back."""
        self._kept[bucket.index].copy_(self.collectives.shard(bucket.flat))
        bucket.give_memory_back()


class Early:
    """A reduction after which only this rank's shard is kept."""

    def __init__(self, work: Work, bucket: Bucket, strategy: Zero2) -> None:
        self.work, self.bucket, self.strategy, self.done = work, bucket, strategy, False

    def wait(self) -> None:
        """Return when the shard is there; once."""
        if not self.done:
            self.done = True
            self.work.wait()
            self.strategy.keep(self.bucket)


def _check_optimizer(optimizer: Optimizer) -> FusedOptimizer:
    name = type(optimizer).__name__
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer: expected one of pytrain.optim, got {name}; with torch's own use DDP")
    if not optimizer.takes_control:
        raise ValueError(f"optimizer: {name} needs rows and columns of whole tensors, and shards cut them; use DDP")
    if optimizer.storage.in_backward:
        raise ValueError("optimizer: step_in_backward=True steps before gradients are reduced; leave it out")
    return optimizer


def code_blocks(begin: int, end: int) -> tuple[int, int]:
    """Which blocks of 8-bit codes elements `begin` to `end` are."""
    if begin % CODE_BLOCK:
        raise ValueError("the state has 8-bit codes, and the optimizer was made without state_dtype='8bit'")
    return begin // CODE_BLOCK, -(-end // CODE_BLOCK)


def is_scales(name: str, state: Mapping[str, Any]) -> bool:
    """Whether a state is the scales of another's 8-bit codes."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in state


def _join(param: Tensor, parts: Sequence[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """A parameter's whole state from that of its pieces, in order."""
    layout = torch.empty_like(param, device="meta")
    joined = {}
    for name, value in parts[0][1].items():
        if value.dim() == 0:  # counts and the like, the same in all pieces
            joined[name] = value
            continue
        flat = torch.cat([state[name] for _, state in parts])
        whole = flat if is_scales(name, parts[0][1]) else flat.as_strided(layout.shape, layout.stride())
        joined[name] = whole if whole.device.type == "cpu" else whole.to(param.device)
    return joined


def _cut(piece: Piece, whole: Mapping[str, Any], elementwise: set[str]) -> dict[str, Any]:
    """A piece's part of a parameter's whole state, of which `elementwise` has a number an element."""
    layout, own = torch.empty_like(piece.owner, device="meta"), {}
    for name, value in whole.items():
        if not isinstance(value, Tensor) or (value.dim() == 0 and name not in elementwise):
            own[name] = value
        elif is_scales(name, whole):
            own[name] = value[slice(*code_blocks(piece.begin, piece.end))].clone()
        elif value.shape != piece.owner.shape:
            raise ValueError(
                f"load_state_dict: state {name!r} of parameter {piece.number} has shape {tuple(value.shape)}, expected "
                f"{tuple(piece.owner.shape)}"
            )
        else:
            flat = torch.empty(piece.owner.numel(), dtype=value.dtype, device=value.device)
            flat.as_strided(layout.shape, layout.stride()).copy_(value)
            own[name] = flat[piece.begin : piece.end].clone()
    return own
