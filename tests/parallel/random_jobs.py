"""A random model, what the ranks of the pool do with it, and the same in one process on all their data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

import pytrain
from pytrain import parallel

sys.path.insert(0, str(Path(__file__).parents[1] / "optim"))
from optim_cases import LAYOUTS, LR, ours

STEPS = 3


@dataclass(frozen=True)
class Tensors:
    """One parameter: its shape, strides, dtype and param group, and whether it is frozen, or has a second name."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float64
    group: int = 0
    frozen: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Attributes:
        exact: gradients are small whole numbers, whose sums are exact in any dtype and order; else they follow from
            all parameters, and are positive, so that no sum cancels.
        unused: as in Strategy; `used` says for each rank which parameters it uses, and None that it uses all.
        micros: how many micro-batches each rank has in a step.
        caps: of buckets, and of the first one, in MiB.
    """

    params: tuple[Tensors, ...]
    exact: bool
    name: str
    options: dict[str, Any]
    strategy: str
    micros: tuple[int, ...]
    caps: tuple[float, float]
    max_norm: float | None
    unused: str = "error"
    used: tuple[tuple[bool, ...], ...] | None = None
    seed: int = 0


class Model(nn.Module):
    """The parameters of a case, some under two names."""

    def __init__(self, case: Case, seed: int) -> None:
        super().__init__()
        self.params, self.again = nn.ParameterList(), nn.ParameterDict()
        generator = torch.Generator().manual_seed(seed)
        for i, one in enumerate(case.params):
            value = 1.0 + torch.rand(one.shape, dtype=torch.float64, generator=generator)
            p = Parameter(LAYOUTS[one.layout](value.to(one.dtype)), requires_grad=not one.frozen)
            self.params.append(p)
            if one.tied:
                self.again[str(i)] = p

    def forward(self, case: Case, rank: int, seed: int) -> Tensor:
        """The loss of a micro-batch."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64)
        for i, p in enumerate(self.params):
            for uses in [p, *([self.again[str(i)]] if str(i) in self.again else [])]:
                factors = torch.rand(p.shape, dtype=torch.float64, generator=generator)
                factors = (9 * factors).floor() - 4 if case.exact else factors + 0.5
                if case.used is None or case.used[rank][i]:
                    total = total + (uses * factors.to(p.dtype)).sum()
        if case.exact:
            return total
        return (total / sum(p.numel() + 1 for p in self.params)).square()


def make(case: Case, seed: int) -> tuple[Model, Any]:
    """The model, and its optimizer, of which each group has a rate of its own."""
    net = Model(case, seed)
    groups: dict[int, list[Tensor]] = {}
    for one, p in zip(case.params, net.params, strict=True):
        groups.setdefault(one.group, []).append(p)
    listed: Any = [{"params": params, "lr": LR * (1 + number)} for number, params in sorted(groups.items())]
    return net, ours(case.name, listed, **case.options)


def backward(net: Model, case: Case, rank: int, step: int, micro: int) -> None:
    """A micro-batch's gradients, if there are any."""
    loss = net(case, rank, case.seed + 100 * step + 10 * rank + micro)
    if loss.requires_grad:
        loss.backward()


def results(net: Model, case: Case, norms: list[float], state: dict[str, Any]) -> Any:
    """Parameters, norms, and the state of all that is trained and has elements."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    owners = sorted(range(len(case.params)), key=lambda i: case.params[i].group)
    kept = {
        i: {key: torch.as_tensor(value).clone() for key, value in state["state"].get(number, {}).items()}
        for i, number in zip(owners, numbers, strict=True)
        if net.params[i].numel() and not case.params[i].frozen
    }
    return [p.detach().clone() for p in net.params], norms, kept


def train(group: dist.ProcessGroup, case: Case) -> Any:
    """A rank's part."""
    rank = dist.get_rank(group)
    net, optimizer = make(case, seed=case.seed + rank)  # those of rank 0 win
    cap, first = case.caps
    ranks = getattr(parallel, case.strategy)(
        net, optimizer, group=group, bucket_cap_mb=cap, first_bucket_mb=first, unused=case.unused
    )
    norms = []
    for step in range(STEPS):
        for micro in range(case.micros[rank]):
            with ranks.accumulate(last=micro == case.micros[rank] - 1):
                backward(net, case, rank, step, micro)
        norms.append(ranks.step(weight=case.micros[rank], max_norm=case.max_norm).grad_norm.item())
        optimizer.zero_grad()
    state = ranks.state_dict()
    ranks.abandon()
    return results(net, case, norms, state)


def train_alone(case: Case) -> Any:
    """All ranks' parts in one process."""
    net, optimizer = make(case, seed=case.seed)
    norms = []
    for step in range(STEPS):
        for rank, count in enumerate(case.micros):
            for micro in range(count):
                backward(net, case, rank, step, micro)
        for p in net.params:
            if p.grad is None and p.requires_grad and case.unused == "zero":
                p.grad = torch.zeros_like(p)
        info = pytrain.step(optimizer, grad_divisor=sum(case.micros), max_norm=case.max_norm)
        norms.append(info.grad_norm.item())
        optimizer.zero_grad()
    return results(net, case, norms, optimizer.state_dict())
