"""A rank under torchrun that trains, writes checkpoints, and is killed once where its plan says; resumes what it finds.

    python -m torch.distributed.run --nproc-per-node 2 --max-restarts 3 worker.py FOLDER STRATEGY RANK STEP PLACE

FOLDER then has the parameters of rank 0 at the end (`end`), and what ranks said that ended with an error
(`error-RANK-ATTEMPT`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pytrain import heartbeat, parallel, sealed
from pytrain.optim import AdamW

STEPS, EVERY, SIZE = 12, 3, 2
# In a step: "backward": in the middle of it; "sum": a bucket has just left; "agree": before the agreement; "gather":
# before parameters are gathered; "between": after the step; "error": a batch is bad, and this rank raises ValueError.
IN_STEP = ("backward", "sum", "agree", "gather", "between", "error")
# Of a checkpoint, which rank 0 writes: "state": before the state is gathered; "write": in the middle of the file;
# "rename": before it has its name; "written": after that.
IN_CHECKPOINT = ("state", "write", "rename", "written")


class Plan:
    """Where a rank is killed: once, of all the times that the program is started with a folder."""

    def __init__(self, folder: Path, rank: int, step: int, place: str) -> None:
        self.folder, self.rank, self.step, self.place = folder, rank, step, place
        self.now = -1  # the step under way

    def reach(self, place: str) -> None:
        """Kill this rank if this is where; "error" raises ValueError instead."""
        done = self.folder / "done"
        if place != self.place or self.now != self.step or dist.get_rank() != self.rank or done.exists():
            return
        done.touch()
        if place == "error":
            raise ValueError("a batch of no rows")
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str, place: str) -> None:
        """Reach a place whenever a function is called, before it runs."""
        function = getattr(owner, name)

        def reaching(*args: Any, **options: Any) -> Any:
            self.reach(place)
            return function(*args, **options)

        setattr(owner, name, reaching)

    def after(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        """The function, which reaches a place before it returns."""

        def reaching(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self.reach(place)
            return result

        return reaching

    def place_in(self, strategy: parallel.Strategy, net: nn.Sequential) -> None:
        """Have all places be reached."""
        net[2].weight.register_hook(self.after(lambda grad: None, "backward"))
        strategy.buckets.reduce = self.after(strategy.buckets.reduce, "sum")
        self.before(strategy.ranks, "sum", "agree")
        if isinstance(strategy, parallel.Zero1):
            self.before(strategy, "agree_on", "agree")
            self.before(strategy, "publish", "gather")
        self.before(sealed._HashingFile, "write", "write")
        self.before(os, "replace", "rename")


def train(group: dist.ProcessGroup | None, strategy: str, plan: Plan | None = None) -> list[Tensor]:
    """Train on this rank's own data, from the last checkpoint in the plan's folder; the parameters at the end."""
    rank = dist.get_rank(group)
    torch.manual_seed(rank)  # those of rank 0 win
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = AdamW(net.parameters(), lr=0.01)
    first, saved = 0, None
    if plan is not None and (plan.folder / "last.ckpt").exists():
        saved = torch.load(plan.folder / "last.ckpt", weights_only=True)
        first = saved["step"]
        net.load_state_dict(saved["module"])
    ranks = getattr(parallel, strategy)(net, optimizer, group=group, bucket_cap_mb=1e-3)
    if saved is not None:
        ranks.load_state_dict(saved["optimizer"])
    if plan is not None:
        plan.place_in(ranks, net)
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        reach = (lambda place: None) if plan is None else plan.reach
        if plan is not None:
            plan.now = step
        net(torch.randn(4, 5, generator=generator)).square().mean().backward()
        reach("error")
        ranks.step(max_norm=0.5)
        optimizer.zero_grad()
        reach("between")
        if plan is not None and step % EVERY == EVERY - 1:
            reach("state")
            state = {"step": step + 1, "module": net.state_dict(), "optimizer": ranks.state_dict()}
            if rank == 0:
                sealed.write_checkpoint(plan.folder / "last.ckpt", state)
            reach("written")
    return [p.detach().clone() for p in net.parameters()]


def main() -> None:
    """Train as a rank of a launcher."""
    folder, strategy, rank, step, place = sys.argv[1:]
    heartbeat.BEAT_SECONDS = 0.2
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which torchrun ends the others before they can say anything
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    try:
        end = train(None, strategy, Plan(Path(folder), int(rank), int(step), place))
        if dist.get_rank() == 0:
            torch.save(end, Path(folder) / "end")
    except (RuntimeError, ValueError) as error:
        name = f"error-{dist.get_rank()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        (Path(folder) / name).write_text(f"{type(error).__name__}: {error}\n{error.__cause__}")
        raise


if __name__ == "__main__":
    main()
