"""What the ranks of the pool do, and the same in one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

import pytrain
from pytrain import optim
from pytrain.amp import LossScaler
from pytrain.optim import AdamW
from pytrain.parallel import DDP, Ranks

Group = dist.ProcessGroup
ROWS = 6  # of each rank's batch


def model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(seed: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    x, y = (torch.randn(rows, n, dtype=torch.float64, generator=generator).to(dtype) for n in (5, 3))
    return x, y


def summed_loss(net: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    x, y = data
    loss: Tensor = (net(x) - y).square().mean(1).sum()
    return loss


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def train(group: Group, dtype: torch.dtype, options: dict[str, Any], step: dict[str, Any], name: str = "AdamW") -> Any:
    """Three steps of two micro-batches of unequal length; parameters, norms and scales."""
    rank = dist.get_rank(group)
    net = model(dtype, seed=rank)  # those of rank 0 win
    optimizer = getattr(optim, name)(net.parameters(), lr=0.01)
    ranks, scaler = DDP(net, optimizer, group=group, **options), LossScaler(init_scale=8.0)
    seen = []
    for n in range(3):
        rows = [ROWS - rank, 2 + n]
        for micro, count in enumerate(rows):
            with ranks.accumulate(last=micro == 1):
                data = batch(10 * n + rank + 100 * micro, count, dtype)
                scaler.scale(summed_loss(net, data)).backward()  # type: ignore[no-untyped-call]
        info = ranks.step(scaler, weight=sum(rows), **step)
        seen.append((info.grad_norm.item(), bool(info.applied)))
        optimizer.zero_grad()
    ranks.close()
    return values(net), seen, scaler.get_scale()


def train_alone(size: int, dtype: torch.dtype, step: dict[str, Any], name: str = "AdamW") -> Any:
    """The same in one process, on the joined batches."""
    net = model(dtype)
    optimizer, scaler = getattr(optim, name)(net.parameters(), lr=0.01), LossScaler(init_scale=8.0)
    seen = []
    for n in range(3):
        total = 0
        for rank in range(size):
            for micro, count in enumerate([ROWS - rank, 2 + n]):
                data = batch(10 * n + rank + 100 * micro, count, dtype)
                scaler.scale(summed_loss(net, data)).backward()  # type: ignore[no-untyped-call]
                total += count
        info = pytrain.step(optimizer, scaler, grad_divisor=total, **step)
        seen.append((info.grad_norm.item(), bool(info.applied)))
        optimizer.zero_grad()
    return values(net), seen, scaler.get_scale()


def overflow_on_one(group: Group, bad_rank: int) -> Any:
    """A step whose gradient is inf on one rank only."""
    net = model()
    optimizer, scaler = AdamW(net.parameters()), LossScaler(init_scale=8.0)
    ranks, before = DDP(net, optimizer, group=group), values(net)
    loss = summed_loss(net, batch(0, 4, torch.float64))
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if dist.get_rank(group) == bad_rank:  # too late for what has left: it comes with the next backward
        next(net.parameters()).register_hook(lambda g: g * float("inf"))
    first = bool(ranks.step(scaler).applied)
    optimizer.zero_grad()
    scaler.scale(summed_loss(net, batch(1, 4, torch.float64))).backward()  # type: ignore[no-untyped-call]
    kept = values(net)
    second = bool(ranks.step(scaler).applied)
    same = all(torch.equal(a, b) for a, b in zip(kept, values(net), strict=True))
    moved = not any(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    return first, moved, second, same, scaler.get_scale()


def branches(group: Group, unused: str, used_on: list[list[int]]) -> Any:
    """One step of a model with three branches, of which each rank uses some."""
    params = [Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
    net = nn.ParameterList(params)
    optimizer = torch.optim.SGD(params, lr=1.0, weight_decay=0.5)
    ranks = DDP(net, optimizer, group=group, unused=unused)  # type: ignore[arg-type]
    torch.stack([params[i].sum() for i in used_on[dist.get_rank(group)]]).sum().backward()
    try:
        ranks.step()
    except RuntimeError as error:
        return str(error)
    return [p[0].item() for p in params]


def stop_on(group: Group, stopping: list[int]) -> Any:
    """Which ranks know that one of them is to stop."""
    net = model()
    ranks = DDP(net, AdamW(net.parameters()), group=group)
    summed_loss(net, batch(0, 2, torch.float64)).backward()
    ranks.step(stop=dist.get_rank(group) in stopping)
    return ranks.stop


def differing(group: Group, what: str) -> str:
    """The error of models that are not alike."""
    rank = dist.get_rank(group)
    net: nn.Module = nn.Linear(3, 4 if what == "shape" and rank == 1 else 2)
    net = net.double() if what == "dtype" and rank == 1 else net
    if what == "frozen" and rank == 1:
        net.bias.requires_grad_(False)  # type: ignore[union-attr]
    if what == "more" and rank == 1:
        net = nn.Sequential(net, nn.Linear(2, 2))
    try:
        DDP(net, AdamW(net.parameters()), group=group)
    except RuntimeError as error:
        return str(error)
    return "no error"


def fp16_sum(group: Group, value: float) -> list[float]:
    """The gradient that fp16 ranks apply, each with one near fp16's largest number."""
    p = Parameter(torch.zeros(4, dtype=torch.float16))
    net = nn.ParameterList([p])
    ranks = DDP(net, torch.optim.SGD([p], lr=1.0), group=group)
    (p * value).sum().backward()
    ranks.step()
    out: list[float] = (-p.detach().float()).tolist()
    return out


def under_torchs_ddp(group: Group) -> Any:
    """Our optimizer and step below torch's wrapper."""
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net, process_group=group)
    optimizer = AdamW(net.parameters(), lr=0.01)
    for n in range(3):
        summed_loss(wrapped, batch(10 * n + dist.get_rank(group), 4, torch.float64)).backward()
        pytrain.step(optimizer, max_norm=1.0)
        optimizer.zero_grad()
    return values(net)


def numbers(group: Group, mine: list[list[float]], order: list[list[int]]) -> Any:
    """What `Ranks` agrees on."""
    ranks = Ranks(group)
    return ranks.sum(mine[ranks.rank]), ranks.from_first(order[ranks.rank])
