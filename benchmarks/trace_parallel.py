"""Does communication overlap backward? One step of DDP or Zero on two ranks, drawn, and as a trace for Perfetto.

The times of rank 0: forward, backward, each bucket's sum from when it left until it was there, and the step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_parallel import RANKS, STRATEGIES, Blocks

from pytrain.grads import Bucket, Work
from pytrain.optim import AdamW

Event = dict[str, Any]  # name, lane, begin and end in seconds
LANES = ("computing", "buckets")
WARM_UP = 3


def one_step(strategy: Any, width: int, blocks: int) -> list[Event]:
    """The events of a step, after some that warm up and lay the buckets out."""
    torch.manual_seed(0)
    model = Blocks(width, blocks, 20_000)
    optimizer = AdamW(model.parameters())
    ranks = strategy(model, optimizer)
    events: list[Event] = []
    watchers: list[threading.Thread] = []
    reduce = ranks.buckets.reduce

    def watched(bucket: Bucket) -> Work | None:
        begin, work = perf_counter(), reduce(bucket)

        def wait() -> None:
            if work is not None:
                work.wait()
            events.append({"name": f"bucket {bucket.index}", "lane": 1, "begin": begin, "end": perf_counter()})

        watchers.append(threading.Thread(target=wait))
        watchers[-1].start()
        return work

    for step in range(WARM_UP + 1):
        if step == WARM_UP:
            ranks.buckets.reduce = watched
        dist.barrier()
        times = [perf_counter()]
        loss = model()
        times.append(perf_counter())
        loss.backward()
        times.append(perf_counter())
        ranks.step(max_norm=1.0)
        times.append(perf_counter())
        optimizer.zero_grad()
    for watcher in watchers:
        watcher.join()
    parts = zip(("forward", "backward", "step"), times[:-1], times[1:], strict=True)
    events += [{"name": name, "lane": 0, "begin": begin, "end": end} for name, begin, end in parts]
    ranks.close()
    return [{**one, "begin": one["begin"] - times[0], "end": one["end"] - times[0]} for one in events]


def overlap(events: list[Event]) -> float:
    """The share of the time in which a bucket was under way that lies within backward."""
    backward = next(one for one in events if one["name"] == "backward")
    total = inside = now = 0.0
    for one in sorted((one for one in events if one["lane"] == 1), key=lambda one: float(one["begin"])):
        begin, end = max(now, one["begin"]), one["end"]
        if end > begin:
            total += end - begin
            inside += max(0.0, min(end, backward["end"]) - max(begin, backward["begin"]))
            now = end
    return inside / total if total else 0.0


def run_rank(rank: int, store: str, strategy: str, width: int, blocks: int, results: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    events = one_step(STRATEGIES[strategy], width, blocks)
    if rank == 0:
        results.put(events)
    dist.barrier()
    dist.destroy_process_group()


def write_trace(events: list[Event], path: Path) -> None:
    """In Chrome's trace format, which https://ui.perfetto.dev shows; buckets overlap, and have lanes of their own."""
    lines = [
        {
            "name": one["name"],
            "ph": "X",
            "pid": 0,
            "tid": LANES[0] if one["lane"] == 0 else one["name"],
            "ts": 1e6 * one["begin"],
            "dur": 1e6 * (one["end"] - one["begin"]),
        }
        for one in events
    ]
    path.write_text(json.dumps({"traceEvents": lines}))


def draw(events: list[Event], title: str, path: Path) -> None:
    """One bar an event, the buckets below the computing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    buckets = sorted((one for one in events if one["lane"] == 1), key=lambda one: float(one["begin"]))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.16 * len(buckets)), layout="constrained")
    colors = {"forward": "#8ab6d6", "backward": "#2f6f9f", "step": "#5b8c5a"}
    for one in events:
        if one["lane"] == 0:
            axes.barh(0, 1e3 * (one["end"] - one["begin"]), left=1e3 * one["begin"], color=colors[one["name"]])
            axes.text(1e3 * (one["begin"] + one["end"]) / 2, 0, one["name"], ha="center", va="center", color="white")
    for row, one in enumerate(buckets, 1):
        axes.barh(row, 1e3 * (one["end"] - one["begin"]), left=1e3 * one["begin"], color="#d08a3c")
    axes.invert_yaxis()
    axes.set_yticks([0, (len(buckets) + 1) / 2], ["computing", f"{len(buckets)} buckets"])
    axes.set_xlabel("ms since the step began")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> int:
    """Trace a step; 0."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    options.add_argument("--width", type=int, default=512, help="of the model (%(default)s)")
    options.add_argument("--blocks", type=int, default=12, help="of the model (%(default)s)")
    options.add_argument("--trace", type=Path, help="file for the trace (JSON)")
    options.add_argument("--plot", type=Path, help="file for the picture (PNG or SVG)")
    args = options.parse_args(argv)
    results: Any = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), args.strategy, args.width, args.blocks, results)
        mp.start_processes(run_rank, arguments, nprocs=RANKS, start_method="spawn")  # type: ignore[no-untyped-call]
        events = results.get()
    share = overlap(events)
    count = sum(one["lane"] == 1 for one in events)
    title = f"{args.strategy}, {RANKS} ranks: {100 * share:.0f} % of the time of {count} buckets lies within backward"
    print(title)
    if args.trace is not None:
        write_trace(events, args.trace)
    if args.plot is not None:
        draw(events, title, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
