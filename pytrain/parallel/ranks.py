"""The ranks of a process group: what all of them must agree on, in as few small collectives as that takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pytrain.heartbeat import RankError, heart, is_of_ranks


class Ranks:
    """A process group of torch.distributed, and the few collectives that a step needs besides those of gradients.

    Args:
        group: the process group; None: the default one.

    Raises:
        RuntimeError: torch.distributed is not there, or was not initialized.

    All of its methods raise `RankError` where another rank has died or left, or does something else.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "torch.distributed is not initialized; start with `torchrun` and call "
                "torch.distributed.init_process_group() first"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.others = [rank for rank in range(self.size) if rank != self.rank]
        self.heart = heart()
        self._everyone = dist.get_process_group_ranks(group)  # by their numbers in the default group
        backend = str(dist.get_backend(group))
        on_device = "nccl" in backend and torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_device else torch.device("cpu")

    @contextmanager
    def at(self, what: str) -> Iterator[None]:
        """A context for an operation of all ranks, which errors are to name: "the checkpoint".

        In it an error of a collective becomes a `RankError` that says which rank has died or left; others pass.
        """
        before, self.heart.now = self.heart.now, what
        try:
            yield
        except RuntimeError as error:
            if self.heart.store is None or not is_of_ranks(error):
                raise
            raise RankError(self.heart.explain(what, self._everyone)) from error
        finally:
            self.heart.now = before

    def sum(self, values: Sequence[float], what: str = "the agreement on a step") -> list[float]:
        """Each value summed over the ranks, in fp64; waits."""
        total = torch.tensor(values, dtype=torch.float64, device="cpu").to(self.device)
        with self.at(what):
            dist.all_reduce(total, group=self.group)
            return list(map(float, total.tolist()))

    def from_first(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of rank 0 of the group, of which all ranks have equally many."""
        shared = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(self.device)
        with self.at("the sending of numbers from the first rank"):
            dist.broadcast(shared, self._global(0), group=self.group)
            return list(map(int, shared.tolist()))

    def send_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Have every rank's tensors hold what they hold on rank 0 of the group."""
        for tensor in tensors:
            dense = tensor.detach() if tensor.is_contiguous() else tensor.detach().contiguous()
            real = torch.view_as_real(dense) if dense.is_complex() else dense
            with self.at("the sending of parameters and buffers from the first rank"):
                dist.broadcast(real, self._global(0), group=self.group)
            if dense.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(dense)

    def send(self, tensor: Tensor, rank: int, tag: int) -> Any:
        """Start to send to another rank; returns what to wait for."""
        return dist.isend(tensor, self._global(rank), group=self.group, tag=tag)

    def receive(self, tensor: Tensor, rank: int, tag: int) -> Any:
        """Start to fill a tensor with what another rank sends; returns what to wait for."""
        return dist.irecv(tensor, self._global(rank), group=self.group, tag=tag)

    def gather(self, value: Any, what: str = "the gathering of values") -> list[Any]:
        """Every rank's value, in their order; values are pickled."""
        everyone: list[Any] = [None] * self.size
        with self.at(what):
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone

    def check_alike(self, what: str, facts: Sequence[str]) -> None:
        """Raise RuntimeError on all ranks where one of them has other facts; names the first difference."""
        digest = hashlib.sha256("\n".join(facts).encode()).digest()
        own = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(self.device)
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        with self.at(f"the check of {what}"):
            dist.all_gather(everyone, own, group=self.group)
        if all(torch.equal(one, everyone[0]) for one in everyone):
            return
        lists = self.gather(list(facts), f"the check of {what}")
        for rank, other in enumerate(lists):
            for i in range(max(len(lists[0]), len(other))):
                a, b = (one[i] if i < len(one) else "nothing" for one in (lists[0], other))
                if a != b:
                    which = f"number {i}" if len(lists[0]) > 1 else "it"
                    raise RuntimeError(f"{what} differs between ranks: {which} is {a} on rank 0, {b} on rank {rank}")

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def pack_flags(flags: Sequence[bool], ranks: int) -> list[float]:
    """Flags as few numbers whose sums over the ranks, exact in fp64, still tell how many ranks set each."""
    base, each = ranks + 1, _flags_a_number(ranks)
    return [
        float(sum(base**k for k, flag in enumerate(flags[i : i + each]) if flag)) for i in range(0, len(flags), each)
    ]


def unpack_flags(sums: Sequence[float], count: int, ranks: int) -> list[bool]:
    """Whether any rank set each of `count` flags."""
    base, each = ranks + 1, _flags_a_number(ranks)
    return [int(sums[i // each]) // base ** (i % each) % base > 0 for i in range(count)]


def _flags_a_number(ranks: int) -> int:
    each = 1
    while (ranks + 1) ** (each + 1) <= 2**53:
        each += 1
    return each


def describe(module: nn.Module, groups: dict[int, int]) -> list[str]:
    """What must be the same on all ranks: each parameter's and buffer's name, shape and dtype, and its param group."""
    facts = []
    for name, p in module.named_parameters():
        kind = f"in param group {groups[id(p)]}" if id(p) in groups else "not optimized"
        trained = "" if p.requires_grad else ", frozen"
        facts.append(f"parameter {name} {tuple(p.shape)} {p.dtype}, {kind}{trained}")
    return facts + [f"buffer {name} {tuple(b.shape)} {b.dtype}" for name, b in module.named_buffers()]
