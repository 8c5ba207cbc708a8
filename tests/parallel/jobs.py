"""What the ranks of the pool do, and the same in one process."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

import pytrain
from pytrain import optim, parallel
from pytrain.amp import LossScaler
from pytrain.ema import EMA
from pytrain.optim import AdamW
from pytrain.parallel import DDP, Ranks, Zero1, Zero2

Group = dist.ProcessGroup
ROWS = 6  # of each rank's batch
# Optimizer, options, dtype: each storage format, rules with no state, scalars, and more than two states.
KINDS: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("AdamW", {}, torch.float32),
    ("SGD", {}, torch.float32),
    ("SGD", {"momentum": 0.9}, torch.float64),
    ("NAdam", {}, torch.float32),
    ("Lion", {"ema_decay": 0.5}, torch.float32),
    ("AdamW", {"state_dtype": "8bit"}, torch.float32),
    ("AdamW", {"state_dtype": "bf16", "master_weights": True}, torch.bfloat16),
    ("AdamW", {"kahan": True}, torch.bfloat16),
    ("Adan", {"master_weights": "compact"}, torch.bfloat16),
    ("AdamW", {"rounding": "stochastic", "seed": 5}, torch.bfloat16),
    ("Lion", {"rounding": "stochastic", "state_dtype": "8bit"}, torch.float32),
]
NAMES = [f"{name}-{dtype}-{'-'.join(map(str, options))}" for name, options, dtype in KINDS]


def kind(strategy: str) -> Any:
    """A strategy by its name; "Zero1, cpu" is one with offload."""
    name, *offload = strategy.split(", ")
    return partial(getattr(parallel, name), offload=offload[0]) if offload else getattr(parallel, name)


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


def train(
    group: Group,
    dtype: torch.dtype,
    options: dict[str, Any],
    step: dict[str, Any],
    name: str = "AdamW",
    strategy: str = "DDP",
) -> Any:
    """Three steps of two micro-batches of unequal length; parameters, norms and scales."""
    rank = dist.get_rank(group)
    net = model(dtype, seed=rank)  # those of rank 0 win
    optimizer = getattr(optim, name)(net.parameters(), lr=0.01)
    ranks = kind(strategy)(net, optimizer, group=group, **options)
    scaler = LossScaler(init_scale=8.0)
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


def overflow_on_one(group: Group, bad_rank: int, strategy: str = "DDP", name: str = "AdamW") -> Any:
    """A step whose gradient is inf on one rank only."""
    net = model()
    optimizer, scaler = getattr(optim, name)(net.parameters()), LossScaler(init_scale=8.0)
    ranks, before = kind(strategy)(net, optimizer, group=group), values(net)
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


def branches(group: Group, unused: str, used_on: list[list[int]], strategy: str = "DDP") -> Any:
    """One step of a model with three branches, of which each rank uses some."""
    params = [Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
    net = nn.ParameterList(params)
    optimizer = optim.SGD(params, lr=1.0, weight_decay=0.5)
    ranks = kind(strategy)(net, optimizer, group=group, unused=unused)
    try:
        if used_on[dist.get_rank(group)]:
            torch.stack([params[i].sum() for i in used_on[dist.get_rank(group)]]).sum().backward()
        ranks.step()
    except RuntimeError as error:
        return str(error)
    return [p[0].item() for p in params]


def idle(group: Group, unused: str, strategy: str) -> Any:
    """Steps in which one rank after the other has nothing to add."""
    p = Parameter(torch.zeros(4, dtype=torch.float64))
    net = nn.ParameterList([p])
    optimizer = optim.SGD([p], lr=1.0)
    ranks = kind(strategy)(net, optimizer, group=group, unused=unused)
    for step in range(4):
        if step % 2 == dist.get_rank(group):
            (3.0 * p.sum()).backward()
        ranks.step(weight=float(step % 2 == dist.get_rank(group)))
        optimizer.zero_grad()
    return p.tolist()


def joined(group: Group, counts: list[int], strategy: str, steps_a_batch: int = 1) -> Any:
    """Steps in which ranks have unlike numbers of batches: the parameters, and which batches this rank was given."""
    net = model()
    optimizer, scaler = AdamW(net.parameters(), lr=0.01), LossScaler(init_scale=8.0)
    ranks = kind(strategy)(net, optimizer, group=group)
    rank, seen = dist.get_rank(group), []
    for n in ranks.join(range(counts[rank])):
        seen.append(n)
        if n is not None:
            loss = summed_loss(net, batch(10 * n + rank, 3, torch.float64))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for _ in range(steps_a_batch):
            ranks.step(scaler, weight=0 if n is None else 3, max_norm=1.0)
        optimizer.zero_grad()
    return values(net), seen


def joined_alone(counts: list[int]) -> list[Tensor]:
    """The same in one process."""
    net = model()
    optimizer, scaler = AdamW(net.parameters(), lr=0.01), LossScaler(init_scale=8.0)
    for n in range(max(counts)):
        having = [rank for rank, count in enumerate(counts) if n < count]
        for rank in having:
            loss = summed_loss(net, batch(10 * n + rank, 3, torch.float64))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        pytrain.step(optimizer, scaler, grad_divisor=3 * len(having), max_norm=1.0)
        optimizer.zero_grad()
    return values(net)


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


def numbers(group: Group, mine: list[list[float]], order: list[list[int]]) -> Any:
    """What `Ranks` agrees on."""
    ranks = Ranks(group)
    return ranks.sum(mine[ranks.rank]), ranks.from_first(order[ranks.rank])


# ---- shards ---------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Multiplies by one number."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def wide(dtype: torch.dtype) -> nn.Sequential:
    """Large enough for 8-bit states; a parameter is not contiguous, and one has no dimensions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 70), nn.Tanh(), nn.Linear(70, 66), nn.Tanh(), nn.Linear(66, 3), Scaled())
    net[2].weight.data = net[2].weight.detach().t().contiguous().t()
    return net.to(dtype)


def run(net: nn.Module, stepper: Any, optimizer: Any, begin: int, end: int, rank: int, dtype: torch.dtype) -> None:
    """Steps on the same data on all ranks, so that any number of ranks, a power of two, does the same to the bit."""
    for n in range(begin, end):
        summed_loss(net, batch(n, 4, dtype)).backward()
        stepper(n)
        optimizer.zero_grad()


def alike(group: Group, strategy: str, name: str, options: dict[str, Any], dtype: torch.dtype, steps: int = 3) -> Any:
    """Parameters, whole state and the bytes of this rank's state after some steps; and after some more, resumed."""
    net = wide(dtype)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.01, **options)
    ranks = kind(strategy)(net, optimizer, group=group, bucket_cap_mb=0.02)
    rank = dist.get_rank(group)
    run(net, lambda n: ranks.step(), optimizer, 0, steps, rank, dtype)
    own = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    whole = optimizer.state_dict() if strategy == "DDP" else ranks.state_dict()
    saved = {
        "state": {i: {k: v.clone() for k, v in s.items()} for i, s in whole["state"].items()},
        "param_groups": whole["param_groups"],
    }
    between = values(net)
    run(net, lambda n: ranks.step(), optimizer, steps, 2 * steps, rank, dtype)
    return between, saved, own, values(net)


def resume(
    group: Group,
    strategy: str,
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    params: list[Tensor],
    saved: dict[str, Any],
    steps: int = 3,
) -> Any:
    """The second half of `alike`, from what its first half has saved."""
    net = wide(dtype)
    for p, value in zip(net.parameters(), params, strict=True):
        p.data.copy_(value)
    optimizer = getattr(optim, name)(net.parameters(), lr=0.5, **options)
    ranks = kind(strategy)(net, optimizer, group=group, bucket_cap_mb=0.003)
    saved = copy.deepcopy(saved)  # what came through a pipe is memory that processes share
    (optimizer if strategy == "DDP" else ranks).load_state_dict(saved)
    rank = dist.get_rank(group)
    run(net, lambda n: ranks.step(), optimizer, steps, 2 * steps, rank, dtype)
    return values(net)


def averaged(group: Group, strategy: str) -> Any:
    """A module's averages under a strategy, and a closed strategy's optimizer."""
    net = wide(torch.float64)
    optimizer, ema = AdamW(net.parameters(), lr=0.01), EMA(net, 0.5)
    ranks = kind(strategy)(net, optimizer, group=group)
    rank = dist.get_rank(group)
    run(net, lambda n: ranks.step(ema=ema), optimizer, 0, 3, rank, torch.float64)
    ranks.close()
    run(net, lambda n: optimizer.step(), optimizer, 3, 5, rank, torch.float64)
    return [ema.averages[id(p)] for p in net.parameters()], values(net)


def memory(group: Group) -> Any:
    """Bytes of Zero2's buckets between steps, and of its shards."""
    net = wide(torch.float32)
    optimizer = AdamW(net.parameters())
    ranks = Zero2(net, optimizer, group=group, bucket_cap_mb=0.01)
    run(net, lambda n: ranks.step(), optimizer, 0, 2, 0, torch.float32)
    buckets = ranks.buckets.buckets
    return sum(b.flat.untyped_storage().nbytes() for b in buckets), sum(b.flat.numel() * 4 for b in buckets)


def written_by_others(group: Group, strategy: str) -> Any:
    """A step after somebody has written the parameters: a state that was loaded."""
    net = wide(torch.float64)
    optimizer = optim.SGD(net.parameters(), lr=0.5)
    ranks, rank = kind(strategy)(net, optimizer, group=group), dist.get_rank(group)
    run(net, lambda n: ranks.step(), optimizer, 0, 1, rank, torch.float64)
    net.load_state_dict({name: torch.full_like(value, 0.25) for name, value in net.state_dict().items()})
    run(net, lambda n: ranks.step(), optimizer, 1, 2, rank, torch.float64)
    return values(net), [p.device.type for p in optimizer.param_groups[0]["params"]]


def whose(group: Group, strategy: str) -> list[list[int]]:
    """Which ranks have elements of each parameter of `model`."""
    net = model()
    ranks = kind(strategy)(net, optim.LAMB(net.parameters()), group=group)
    have = [(share.owner, share.end > share.begin) for share in ranks.shares()[0]]
    everyone = ranks.ranks.gather([any(owner is p and some for owner, some in have) for p in net.parameters()])
    return [[rank for rank, own in enumerate(everyone) if own[i]] for i in range(len(everyone[0]))]


def collectives_of(group: Group, strategy: str, name: str) -> list[str]:
    """In what operation of all ranks each all-reduce of a step is."""
    net = model()
    ranks = kind(strategy)(net, getattr(optim, name)(net.parameters()), group=group)
    seen: list[str] = []
    own = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(ranks.ranks.heart.now)
        return own(*args, **kwargs)

    summed_loss(net, batch(0, 4, torch.float64)).backward()
    dist.all_reduce = counted  # type: ignore[assignment]
    try:
        ranks.step()
    finally:
        dist.all_reduce = own
    return seen


def lonely(group: Group, strategy: str, name: str) -> list[float]:
    """Steps of a model so small that not every rank has a part of it."""
    p = Parameter(torch.arange(1.0, 6.0, dtype=torch.float64))
    ranks = kind(strategy)(nn.ParameterList([p]), getattr(optim, name)([p], lr=0.1), group=group)
    for n in range(3):
        (p * torch.arange(n, n + 5.0)).square().sum().backward()
        ranks.step()
        p.grad = None
    out: list[float] = p.tolist()
    return out


def refused(group: Group, what: str) -> str:
    """The error of an optimizer that shards do not take."""
    net = model(torch.float32)
    optimizer: torch.optim.Optimizer = AdamW(net.parameters())
    if what == "torch":
        optimizer = torch.optim.AdamW(net.parameters())
    if what in ("Adafactor", "Muon"):
        optimizer = getattr(optim, what)([p for p in net.parameters() if p.dim() == 2])
    if what == "release":
        optimizer = AdamW(net.parameters(), step_in_backward=True)
    try:
        Zero1(net, optimizer, group=group)
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"
