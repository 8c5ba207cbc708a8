"""What the ranks of the pool do in tests of what they say of each other."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jobs import batch, model, summed_loss

from pytrain.optim import AdamW
from pytrain.parallel import DDP, RankError, Ranks

Group = dist.ProcessGroup


def late(group: Group) -> Any:
    """A collective that rank 1 does not join: the error, and whether it has one of torch's as its cause."""
    short = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if dist.get_rank() > 1:
        dist.barrier(group)
        return "", True
    net = model()
    ranks = DDP(net, AdamW(net.parameters()), group=short)
    summed_loss(net, batch(0, 2, torch.float64)).backward()
    ranks.ranks.heart.steps = 0
    ranks.step()
    found = "no error", True
    if dist.get_rank() == 0:
        try:
            with ranks.ranks.at("the checkpoint"):
                dist.barrier(short)
        except RankError as error:
            found = str(error), isinstance(error.__cause__, RuntimeError)
    dist.barrier(group)
    return found


def other_error(group: Group) -> str:
    """The error that a user's own code raises in an operation."""
    try:
        with Ranks(group).at("the checkpoint"):
            raise RuntimeError("the disk is full")
    except RuntimeError as error:
        return str(error)


def hearts(group: Group) -> Any:
    """How many threads beat in this process, and whether all strategies have one heart."""
    ranks = [Ranks(group) for _ in range(3)]
    beating = [thread for thread in threading.enumerate() if thread.name == "pytrain-heart"]
    return len(beating), all(one.heart is ranks[0].heart for one in ranks)


def counts(group: Group, batches: list[int]) -> str:
    """The error of ranks that have unequal numbers of batches."""
    ranks = Ranks(group)
    try:
        ranks.check_alike("the number of batches", [str(batches[ranks.rank])])
    except RuntimeError as error:
        return str(error)
    return "no error"
