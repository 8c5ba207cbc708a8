"""What the ranks of the pool do under torch's DistributedDataParallel, and the same in one process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from jobs import Group, batch, model, summed_loss, values
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import pytrain
from pytrain import optim
from pytrain.amp import LossScaler
from pytrain.ema import EMA

ROWS = 4


def train(
    group: Group, name: str, options: dict[str, Any], ddp: dict[str, Any], micros: int, dtype: torch.dtype
) -> Any:
    """Four steps, the second with an inf on the last rank: parameters, averages, norms, what was applied, the scale."""
    net, rank, size = model(dtype), dist.get_rank(group), dist.get_world_size(group)
    wrapped = DistributedDataParallel(net, process_group=group, **ddp)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.01, **options)
    scaler, ema = LossScaler(init_scale=8.0), EMA(net, 0.5)
    seen = []
    for n in range(4):
        for micro in range(micros):
            with nullcontext() if micro == micros - 1 else wrapped.no_sync():
                loss = summed_loss(wrapped, batch(100 * n + 10 * rank + micro, ROWS, dtype))
                loss = loss * float("inf") if n == 1 and rank == size - 1 and micro == 0 else loss
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        info = pytrain.step(optimizer, scaler, max_norm=0.5, grad_divisor=micros, ema=ema)
        seen.append((info.grad_norm.item(), bool(info.applied)))
        if not options.get("zero_grad_in_step"):
            optimizer.zero_grad()
    with ema.swap():
        averages = values(net)
    return values(net), averages, seen, scaler.get_scale()


def train_alone(size: int, name: str, options: dict[str, Any], micros: int, dtype: torch.dtype) -> Any:
    """The same in one process, on the joined batches."""
    net = model(dtype)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.01, **options)
    scaler, ema = LossScaler(init_scale=8.0), EMA(net, 0.5)
    seen = []
    for n in range(4):
        for rank in range(size):
            for micro in range(micros):
                loss = summed_loss(net, batch(100 * n + 10 * rank + micro, ROWS, dtype))
                loss = loss * float("inf") if n == 1 and rank == size - 1 and micro == 0 else loss
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        info = pytrain.step(optimizer, scaler, max_norm=0.5, grad_divisor=micros * size, ema=ema)
        seen.append((info.grad_norm.item(), bool(info.applied)))
        if not options.get("zero_grad_in_step"):
            optimizer.zero_grad()
    with ema.swap():
        averages = values(net)
    return values(net), averages, seen, scaler.get_scale()


def accumulate_from_the_start(group: Group, strategy: str) -> list[Tensor]:
    """Two steps of three micro-batches, the first of all of which is not synchronized; the parameters."""
    net, rank = model(), dist.get_rank(group)
    optimizer = optim.AdamW(net.parameters(), lr=0.01)
    ranks = getattr(pytrain.parallel, strategy)(net, optimizer, group=group)
    for n in range(2):
        for micro in range(3):
            with ranks.accumulate(last=micro == 2):
                summed_loss(net, batch(100 * n + 10 * rank + micro, ROWS, torch.float64)).backward()
        ranks.step(weight=3)
        optimizer.zero_grad()
    return values(net)


def accumulate_alone(size: int) -> list[Tensor]:
    """The same in one process."""
    net = model()
    optimizer = optim.AdamW(net.parameters(), lr=0.01)
    for n in range(2):
        for rank in range(size):
            for micro in range(3):
                summed_loss(net, batch(100 * n + 10 * rank + micro, ROWS, torch.float64)).backward()
        pytrain.step(optimizer, grad_divisor=3 * size)
        optimizer.zero_grad()
    return values(net)
