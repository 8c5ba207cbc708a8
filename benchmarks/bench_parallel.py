"""How fast is a whole step on two ranks? pytrain.parallel against torch's DistributedDataParallel and its optimizers.

Every rank is a process of one thread; a step is forward, backward, reduction, clip and update, timed until the slower
rank is done.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Timing, free_memory, machine, markdown, parser, summary, write_json
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytrain.optim import AdamW
from pytrain.parallel import DDP, Zero1, Zero2

RANKS = 2
STRATEGIES = {"ddp": DDP, "zero1": Zero1, "zero2": Zero2}  # the last two against ZeroRedundancyOptimizer
MAX_NORM, LR = 1.0, 1e-4
TARGETS = {
    ("ddp", "GPT-2 small"): 1.05,
    ("ddp", "1,000 x 1,000"): 1.3,
    ("zero1", "GPT-2 small"): 1.3,
    ("zero1", "1,000 x 1,000"): 1.3,
}


class Blocks(nn.Module):
    """A model of GPT-2's shapes, without attention: embedding, blocks of four matrices, tied output."""

    def __init__(self, width: int, blocks: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), *(nn.Linear(a * width, b * width) for a, b in shapes)])
            for shapes in [((1, 3), (3, 1), (1, 4), (4, 1))] * blocks
        )
        self.tokens = torch.randint(words, (4, 8), generator=torch.Generator().manual_seed(0))

    def forward(self) -> Tensor:
        """A loss."""
        x = self.embedding(self.tokens)
        for norm, up, down, wider, back in self.blocks:  # type: ignore[misc]
            y = norm(x)
            x = x + down(torch.relu(up(y))) + back(torch.relu(wider(y)))
        loss: Tensor = (x @ self.embedding.weight.t()).square().mean()
        return loss


class Small(nn.Module):
    """Many small tensors, each in an operation of its own."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.ones(size) * 0.01 * (i % 7 + 1) for i in range(count))

    def forward(self) -> Tensor:
        """A loss."""
        return torch.stack([p.dot(p) for p in self.params]).sum()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2 small": lambda: Blocks(768, 12, 50257),
    "1,000 x 1,000": lambda: Small(1000, 1000),
}
QUICK: dict[str, Callable[[], nn.Module]] = {
    "tiny blocks": lambda: Blocks(16, 2, 50),
    "20 x 10": lambda: Small(20, 10),
}


def ours(make: Callable[[], nn.Module], strategy: Any) -> tuple[nn.Module, Callable[[], None]]:
    """The model, and a step."""
    torch.manual_seed(0)
    model = make()
    optimizer = AdamW(model.parameters(), lr=LR)
    ranks = strategy(model, optimizer)

    def step() -> None:
        model().backward()
        ranks.step(max_norm=MAX_NORM)
        optimizer.zero_grad()

    return model, step


def theirs(make: Callable[[], nn.Module], zero: bool) -> tuple[nn.Module, Callable[[], None]]:
    """The same by torch's parts."""
    torch.manual_seed(0)
    model = make()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer: torch.optim.Optimizer
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # which takes seconds: it compiles TorchScript

        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=LR, fused=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> None:
        wrapped().backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def measure(what: str, steps: dict[str, Any], repeat: int, budget: float) -> dict[str, Timing]:
    """Check that both models agree after two steps, then time them in turns, until the slower rank is done."""
    for _, step in steps.values():
        step()
        step()
    pairs = zip(steps["pytrain"][0].parameters(), steps["torch"][0].parameters(), strict=True)
    apart = max((p - q).abs().max().item() for p, q in pairs)
    assert apart <= 2e-2 * LR, f"{what}: {apart:.1e} from torch's after steps of {LR:.1e}"
    seconds: dict[str, list[float]] = {which: [] for which in steps}
    begin, over = perf_counter(), torch.zeros(())
    while not over:
        for which, (_, step) in steps.items():
            dist.barrier()
            start = perf_counter()
            step()
            took = torch.tensor(perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            seconds[which].append(took.item())
        rounds = len(seconds["torch"])
        over.fill_(rounds >= repeat or (rounds >= 3 and perf_counter() - begin > budget))
        dist.broadcast(over, 0)
    return {which: summary(times) for which, times in seconds.items()}


def run_rank(rank: int, store: str, quick: bool, repeat: int, budget: float, results: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = []
    for name, make in (QUICK if quick else MODELS).items():
        for which, strategy in STRATEGIES.items():
            steps = {"pytrain": ours(make, strategy), "torch": theirs(make, zero=which != "ddp")}
            found.append((name, which, measure(f"{name}, {which}", steps, repeat, budget)))
            del steps
            free_memory()
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def main(argv: list[str]) -> int:
    """Run the benchmark; an error where results do not agree."""
    options = parser(__doc__ or "")
    options.add_argument("--budget", type=float, default=30.0, help="seconds a row at most (%(default)s)")
    args = options.parse_args(argv)
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    repeat, budget = (3, 5.0) if args.quick else (args.repeat, args.budget)
    results: Any = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        arguments = (store, args.quick, repeat, budget, results)
        mp.start_processes(run_rank, arguments, nprocs=RANKS, start_method="spawn")  # type: ignore[no-untyped-call]
        found = results.get()
    rows, cells = [], []
    for name, which, timings in found:
        ratio, target = timings["torch"].median / timings["pytrain"].median, TARGETS.get((which, name))
        met = "" if target is None else f"{target:g} {'yes' if ratio >= target else 'NO'}"
        cells.append([name, which, timings["pytrain"].text(), timings["torch"].text(), f"{ratio:.2f}", met])
        rows.append({"machine": machine(), "model": name, "strategy": which, "ratio": ratio, "target": target})
    print(f"results agree; {RANKS} ranks of one thread; {machine()}")
    print(markdown(["model", "strategy", "pytrain, ms", "torch, ms", "torch / pytrain", "target"], cells))
    write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
