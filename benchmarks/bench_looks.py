"""What does looking at a small tensor cost before it is stepped? Each part, with warm caches and with cold ones.

In a virtual machine the caches are other guests' too: what a step finds after 10 ms of sleep tells how much of them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from time import perf_counter, sleep

import torch
from bench_step import Ours, Torch
from common import machine, markdown, nothing, parser, write_json
from contestants import Case

from pytrain import backend
from pytrain.control import FIT, WRITE

CASE, QUICK = Case("1,000 x 1,000", [(1000,)] * 1000, None), Case("100 x 16", [(16,)] * 100, None)
EVICTED = 32_000_000  # fp32 numbers: more than the caches hold
PARTS = {
    "collect": "p.grad",
    "gather": "p.grad, and where parameter and gradient lie",
    "fit": "state and step count: still where they were?",
    "watch": "param_groups and state: still the same objects?",
    "versions": "autograd versions",
    "update": "states, as above, and the update itself",
}


def parts_of(ours: Ours) -> dict[str, Callable[[], object]]:
    """The parts of a step's look at an optimizer that has stepped, each alone and on one thread."""
    optimizer, facts = ours.optimizer, backend.facts
    settled = optimizer._settled
    assert facts is not None and settled is not None and settled.watch is not None
    (plan,), watch = settled.plans, settled.watch
    place, numbers, n = settled.address, settled.numbers, len(plan.params)
    return {
        "collect": lambda: facts.collect(plan.params, "grad"),
        "gather": lambda: backend.reader.gather(plan.params, plan.address),
        "fit": lambda: facts.step(plan.table, plan.address, n, [], place, numbers, FIT, None),
        "watch": lambda: facts.check(watch, optimizer.param_groups, optimizer.state),
        "versions": lambda: torch.autograd.graph.increment_version(plan.params),
        "update": lambda: facts.step(plan.table, plan.address, n, [], place, numbers, WRITE, None),
    }


def seconds(run: Callable[[], object], evict: Callable[[], object]) -> float:
    """How long a run takes after something else."""
    evict()
    start = perf_counter()
    run()
    return perf_counter() - start


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    args = options.parse_args(argv)
    if backend.facts is None:
        raise SystemExit(f"bench_looks: needs the kernels: {backend.why_not_loaded}")
    torch.set_num_threads(1)
    case, repeat = (QUICK, 3) if args.quick else (CASE, args.repeat)
    ours, theirs, other = (
        Ours(case, whole=False),
        Torch(case, whole=False),
        torch.zeros(EVICTED // (100 if args.quick else 1)),
    )

    def evict() -> None:
        theirs.prepare()
        theirs.run()
        other.sum()

    before = {"warm": nothing, "idle": lambda: sleep(0.01), "cold": evict}
    ours.run()
    rows = []
    for name, run in parts_of(ours).items():
        row: dict[str, object] = {"case": case.name, "part": PARTS[name]}
        for what, first in before.items():
            median = statistics.median(seconds(run, first) for _ in range(repeat))
            row[f"{what}_ns"] = 1e9 * median / len(case.shapes)
        rows.append(row)
    print(f"{case.name}, ns a tensor; {machine()}")
    table = [[str(row["part"]), *(f"{row[f'{what}_ns']:.0f}" for what in before)] for row in rows]
    print(markdown(["part", "warm, ns", "after 10 ms of sleep, ns", "cold, ns"], table))
    write_json(args.json, [{"machine": machine(), **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
