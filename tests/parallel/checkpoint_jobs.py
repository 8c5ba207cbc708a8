"""What ranks do for the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pytrain import optim, parallel
from pytrain.parallel import Strategy, checkpoint
from pytrain.sealed import CheckpointError

Group = dist.ProcessGroup
STEPS = 3


class Model(nn.Module):
    """Has what a checkpoint may meet: memory of another order, no dimensions, shared, frozen, buffers."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, rows: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide, self.norm, self.last = jobs.wide(dtype), nn.BatchNorm1d(3).to(dtype), nn.Linear(3, rows).to(dtype)
        self.again = nn.Linear(3, 3).to(dtype)
        self.frozen = nn.Parameter(torch.randn(7, dtype=torch.float64).to(dtype), requires_grad=False)
        self.tied = self.again
        with torch.no_grad():
            for p in self.parameters():
                p.add_(0.01 * seed)

    def forward(self, x: Tensor) -> Tensor:
        """Any number that all parameters take part in."""
        out: Tensor = self.last(self.tied(self.again(self.norm(self.wide(x))))) + self.frozen.sum()
        return out


def made(
    group: Group, strategy: str, name: str, options: dict[str, Any], dtype: torch.dtype, seed: int, cap: float = 0.02
) -> Strategy:
    """A strategy over a model and an optimizer with two param groups; "torch.X" is torch's own."""
    net = Model(dtype, seed)
    params = list(net.parameters())
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02 + seed}]
    kind = getattr(torch.optim if name.startswith("torch.") else optim, name.removeprefix("torch."))
    optimizer = kind(groups, lr=0.01 + seed, **options)
    out: Strategy = getattr(parallel, strategy)(net, optimizer, group=group, bucket_cap_mb=cap, unused="zero")
    return out


def steps(ranks: Strategy, dtype: torch.dtype, begin: int, end: int) -> None:
    """Rank 0 alone has data, so that any number of ranks does the same to the bit."""
    for n in range(begin, end):
        if ranks.ranks.rank == 0:
            x = jobs.batch(n, 4, dtype)[0]
            ranks.module(x).square().mean().backward()
        ranks.step(weight=float(ranks.ranks.rank == 0))
        ranks.optimizer.zero_grad()


def begun(
    group: Group,
    strategy: str,
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    path: str,
    portable: bool = False,
) -> Any:
    """Steps, a checkpoint, and some steps more: what the model has then."""
    ranks = made(group, strategy, name, options, dtype, 0)
    steps(ranks, dtype, 0, STEPS)
    extra = {"step": STEPS, "rank": ranks.ranks.rank, "rng": torch.arange(5)}
    checkpoint.save(ranks, path, extra=extra, portable=portable)
    steps(ranks, dtype, STEPS, 2 * STEPS)
    return tensors(ranks)


def resumed(group: Group, strategy: str, name: str, options: dict[str, Any], dtype: torch.dtype, path: str) -> Any:
    """The second half of `begun`, from its checkpoint, by a model and an optimizer that began otherwise."""
    ranks = made(group, strategy, name, options, dtype, 1, cap=0.003)
    extra = checkpoint.load(ranks, path)
    assert extra["step"] == STEPS and extra["rank"] == 0 and torch.equal(extra["rng"], torch.arange(5))
    steps(ranks, dtype, STEPS, 2 * STEPS)
    return tensors(ranks)


def tensors(ranks: Strategy) -> Any:
    """What the module has; of the buffers, those of the rank that had data."""
    names = {name for name, _ in ranks.module.named_parameters()}
    first = ranks.ranks.rank == 0
    return {k: v.clone() for k, v in ranks.module.state_dict().items() if first or k in names}


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "shape": lambda net: setattr(net, "last", nn.Linear(3, 4)),
    "more": lambda net: setattr(net, "more", nn.Linear(2, 2)),
    "fewer": lambda net: delattr(net, "norm"),
    "strides": lambda net: setattr(net.wide[2], "weight", nn.Parameter(net.wide[2].weight.detach().contiguous())),
}


def refused(group: Group, strategy: str, path: str, change: str = "", options: dict[str, Any] | None = None) -> Any:
    """The error of a load that does not fit; nothing is written then."""
    net = Model(torch.float32, 1)
    CHANGES.get(change, lambda net: None)(net)
    params = list(net.parameters())
    cut = 2 if change == "groups" else 3
    groups = [{"params": params[:cut]}, {"params": params[cut:]}]
    optimizer = optim.AdamW(groups, lr=0.5, **(options or {}))
    ranks = getattr(parallel, strategy)(net, optimizer, group=group, unused="zero", bucket_cap_mb=0.003)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        checkpoint.load(ranks, path)
    except CheckpointError as error:
        assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.5
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        return str(error)
    return "no error"


def unsaved(group: Group, strategy: str, path: str, what: str) -> Any:
    """The error of a save."""
    ranks = made(group, strategy, "AdamW", {}, torch.float32, 0)
    steps(ranks, torch.float32, 0, 1)
    if what == "state":
        for state in ranks.optimizer.state.values():
            state["note"] = "no tensor"
    try:
        checkpoint.save(ranks, path, extra=Path() if what == "extra" else None)
    except CheckpointError as error:
        return str(error)
    return "no error"
